"""The default engine: batched generation with transformers, on a GPU or a CPU."""

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import EngineLost
from stic_ray.engines import shared_prefix
from stic_ray.engines.answer_logps import answer_sequences, make_batch, score_batch, token_logps
from stic_ray.engines.base import Answer, AnsweredPrompt, Request, Sampling
from stic_ray.engines.batching import BatchLimits, FittingBatches
from stic_ray.engines.fingerprints import fingerprint
from stic_ray.engines.loading import choose_dtype, load_model, read_generation_config
from stic_ray.engines.rendering import end_token_ids, read_answer
from stic_ray.engines.sequences import Batch, ProcessorCounter, TokenSequence
from stic_ray.engines.shared_prefill import questions_of, read_once
from stic_ray.engines.shared_prefix import is_tested_family, reason_against

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
_GPU_FAILURE = re.compile(
    r"CUDA error|device-side assert|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE|CUFFT)_|cuDNN error|NCCL error"
)
"""What torch's libraries say in a RuntimeError when a GPU has failed under them."""


class TransformersEngine(ProcessorCounter):
    """A model in this process. Threads may share it: one batch is prepared while the model is busy with another."""

    def __init__(self, model: ModelConfig, *, limits: BatchLimits, on_gpu: bool, merge: bool = False) -> None:
        """Load the model, and its adapter, a local folder, onto it or, with `merge`, into it. Raises ModelError."""
        self.name = model.adapter or model.path
        self.revision = fingerprint(model)
        self.batches = FittingBatches(limits, OUT_OF_MEMORY, torch.cuda.empty_cache)
        self.device = torch.device("cuda" if on_gpu else "cpu")
        super().__init__(model)
        dtype = choose_dtype(model, on_gpu=on_gpu)
        self.model: Any = load_model(model, dtype=dtype, merge=merge, device=self.device).eval()
        self.end_ids = end_token_ids(self.processor, read_generation_config(model))
        # Without the checkpoint's penalties, beams and the like, which transformers would add to those of a call: both
        # engines draw from the model's own distribution, which is what is trained.
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        for holder in {self.model, base}:
            holder.generation_config = GenerationConfig()
        self._busy = threading.Lock()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        """Answer every request, in batches that depend on the requests alone (`batching.plan_batches`).

        Raises EngineError for a request that does not fit the memory by itself, and EngineLost when the GPU has failed.
        """
        with self.tokenizing:
            asked = [self.builder.ask(request.prompt, with_image=request.image is not None) for request in requests]
        lengths = [
            len(sequence.ids) + self.guess_added_tokens(request.image) + sampling.max_new_tokens
            for sequence, request in zip(asked, requests, strict=True)
        ]

        def answer(rows: list[int]) -> list[Answer]:
            return self._generate_batch([requests[row] for row in rows], [asked[row] for row in rows], sampling)

        answers: dict[int, Answer] = {}
        for with_image in (True, False):  # processors take images for every text of a batch, or for none
            rows = [row for row, request in enumerate(requests) if (request.image is not None) == with_image]
            with _lost_with_its_gpu():
                answers |= self.batches.run(rows, lengths, [request.image_id for request in requests], answer)
        return [answers[row] for row in range(len(requests))]

    def score_answers(self, asked: Sequence[AnsweredPrompt]) -> list[list[float]]:
        """Return log p of each answer to each prompt, summed over the tokens that training sees.

        A prompt is computed once for all its answers where the family can share it (`shared_prefix.reason_against`);
        else each answer makes a sequence of its own. Raises as `generate` does.
        """
        shares = reason_against(self.model.config) is None
        make, score = (shared_prefix.make_batch, shared_prefix.score) if shares else (make_batch, score_batch)
        with self.tokenizing:
            built = [(each.image, answer_sequences(self.builder, each)) for each in asked]
        rows = [(image, row) for image, own in built for row in ([own] if shares else [[each] for each in own]) if row]
        lengths = [
            row[0].num_asked + sum(len(each.ids) - each.num_asked for each in row) + self.guess_added_tokens(image)
            for image, row in rows
        ]

        def score_rows(places: list[int]) -> list[list[float]]:
            images, sequences = zip(*(rows[place] for place in places), strict=True)
            with self.tokenizing:
                batch = make(self.builder, images, sequences)
            with self._busy:
                logps = score(self.model, self._move(batch)).tolist()
            return [found[: len(own)] for found, own in zip(logps, sequences, strict=True)]

        with _lost_with_its_gpu():
            scores = self.batches.run(range(len(rows)), lengths, [""] * len(rows), score_rows)
        found = iter(logp for place in range(len(rows)) for logp in scores[place])
        return [[next(found) for _ in each.answers] for each in asked]

    def score_tokens(self, conversations: Sequence[Sequence[dict[str, str]]]) -> list[list[float]]:
        """Return log p of each token of the answers of conversations without an image; raises as `generate` does."""
        with self.tokenizing:
            built = [self.builder.build(messages, with_image=False) for messages in conversations]

        def score_rows(places: list[int]) -> list[list[float]]:
            with self.tokenizing:
                batch = self.builder.batch([built[place] for place in places], [None] * len(places))
            with self._busy:
                return [logps.tolist() for logps in token_logps(self.model, self._move(batch))]

        lengths = [len(sequence.ids) for sequence in built]
        with _lost_with_its_gpu():
            found = self.batches.run(range(len(built)), lengths, [""] * len(built), score_rows)
        return [found[place] for place in range(len(built))]

    def _move(self, batch: Batch) -> Batch:
        floats = self.model.dtype
        return {n: value.to(self.device, floats if value.is_floating_point() else None) for n, value in batch.items()}

    @torch.inference_mode()
    def _generate_batch(
        self, requests: Sequence[Request], asked: Sequence[TokenSequence], sampling: Sampling
    ) -> list[Answer]:
        questions = self._questions(requests, asked)
        _, firsts = np.unique(questions, return_index=True)  # the first row of each
        shares = len(firsts) < len(requests)
        with self.tokenizing:
            images = [requests[row].image for row in firsts]
            inputs = self.builder.batch([asked[row] for row in firsts], images, pad_left=True)
        inputs.pop("is_answer")
        num_prompt = inputs["attention_mask"].sum(1)[questions].tolist()
        num_image = (inputs["input_ids"] == self.builder.image_token_id).sum(1)[questions].tolist()
        with self._busy:
            moved = self._move(inputs)
            sequences = self.model.generate(
                **(read_once(self.model, moved, questions) if shares else moved),
                generation_config=GenerationConfig(
                    max_new_tokens=sampling.max_new_tokens,
                    do_sample=False,  # sampling is done by the seeded noise below
                    eos_token_id=self.end_ids or None,
                    pad_token_id=self.processor.tokenizer.pad_token_id,
                ),
                logits_processor=_processors([request.seed for request in requests], sampling, self.device),
            )
            new_ids = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        num_added = [num - len(sequence.ids) for num, sequence in zip(num_prompt, asked, strict=True)]
        with self.tokenizing:
            return [
                read_answer(self.processor, ids, self.end_ids, *counts)
                for ids, *counts in zip(new_ids, num_image, num_added, strict=True)
            ]

    def _questions(self, requests: Sequence[Request], asked: Sequence[TokenSequence]) -> list[int]:
        """Return which question each request asks; each one of its own where questions cannot be shared."""
        # What is shared is all but a question's last token, which must stand for itself.
        ends_in_text = all(sequence.ids[-1] != self.builder.image_token_id for sequence in asked)
        return questions_of(requests) if is_tested_family(self.model.config) and ends_in_text else [*range(len(asked))]


@contextmanager
def _lost_with_its_gpu() -> Iterator[None]:
    try:
        yield
    except OUT_OF_MEMORY:
        raise
    except RuntimeError as error:
        if not isinstance(error, torch.AcceleratorError) and not _GPU_FAILURE.search(str(error)):
            raise
        raise EngineLost(str(error).splitlines()[0]) from error  # every later call on this GPU would fail too


class SeededNoise(LogitsProcessor):
    """Draws each row's token with the row's own generator.

    Adding Gumbel noise to log-probabilities and taking the largest is an exact draw from them, and does not depend on
    what else is in the batch.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        """Seed one generator per row."""
        self.generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Add the noise of the next token to scores of shape (rows, vocabulary)."""
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()  # type: ignore[return-value]


def _processors(seeds: Sequence[int], sampling: Sampling, device: torch.device) -> LogitsProcessorList:
    if sampling.temperature == 0:
        return LogitsProcessorList()
    steps = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_p < 1:
        steps.append(TopPLogitsWarper(sampling.top_p))
    steps.append(SeededNoise(seeds, device))
    return steps
