"""The default engine: batched generation with transformers, on a GPU or a CPU."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import EngineLost, ModelError
from stic_ray.engines.base import Answer, AnsweredPair, Request, Sampling
from stic_ray.engines.batching import BatchLimits, FittingBatches
from stic_ray.engines.fingerprints import fingerprint
from stic_ray.engines.loading import choose_dtype, image_token_id, load_model, load_processor, read_generation_config
from stic_ray.engines.rendering import end_token_ids, read_answer, render
from stic_ray.engines.shared_prefix import Batch, make_batch, score, split_pair, why_not

OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)


class TransformersCounter:
    """A model's processor in this process. Threads may share it."""

    def __init__(self, model: ModelConfig) -> None:
        """Load the processor. Raises ModelError."""
        self.processor: Any = load_processor(model)
        # A tokenizer keeps its padding as state, and refuses to have it changed while another thread uses it.
        self._tokenizing = threading.RLock()
        self._added_by_size: dict[tuple[int, int], int] = {}

    def count_text_tokens(self, messages: Sequence[dict[str, str]], *, with_image: bool) -> int:
        """Return the tokens of a conversation in the chat template, the image counted as its placeholder."""
        return self._num_tokens(render(self.processor, messages, with_image=with_image, add_generation_prompt=False))

    def count_added_tokens(self, images: Sequence[Image.Image]) -> list[int]:
        """Return how many tokens each image adds; the text around it makes no difference."""
        if not images:
            return []
        question = [{"role": "user", "content": "?"}]
        text = render(self.processor, question, with_image=True, add_generation_prompt=True)
        with self._tokenizing:
            inputs = self.processor(
                images=[[image] for image in images],
                text=[text] * len(images),
                padding=True,
                return_tensors="pt",
                add_special_tokens=False,
            )
        return [num_tokens - self._num_tokens(text) for num_tokens in inputs["attention_mask"].sum(1).tolist()]

    def _guess_added_tokens(self, image: Image.Image | None) -> int:
        """Return what an image will add, by its size; made from a blank one where the processor cannot say it."""
        if image is None:
            return 0
        if image.size not in self._added_by_size:
            if hasattr(self.processor, "_get_num_multimodal_tokens"):
                told = self.processor._get_num_multimodal_tokens(image_sizes=[image.size[::-1]])
                self._added_by_size[image.size] = told["num_image_tokens"][0]
            else:
                self._added_by_size[image.size] = self.count_added_tokens([Image.new("RGB", image.size)])[0]
        return self._added_by_size[image.size]

    def _num_tokens(self, text: str) -> int:
        with self._tokenizing:
            return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])


class TransformersEngine(TransformersCounter):
    """A model in this process. Threads may share it: one batch is prepared while the model is busy with another."""

    def __init__(
        self, model: ModelConfig, *, limits: BatchLimits, on_gpu: bool, adapter: Path | None = None, merge: bool = False
    ) -> None:
        """Load the model, and the adapter onto it or, with `merge`, into it. Raises ModelError."""
        self.name = str(adapter) if adapter else model.path
        self.revision = fingerprint(model)
        self.batches = FittingBatches(limits, OUT_OF_MEMORY)
        self.device = torch.device("cuda" if on_gpu else "cpu")
        super().__init__(model)
        dtype = choose_dtype(model, on_gpu=on_gpu)
        self.model: Any = load_model(model, dtype=dtype, adapter=adapter, merge=merge, device=self.device).eval()
        self.end_ids = end_token_ids(self.processor, read_generation_config(model))
        self._ignore_generation_config()
        self._busy = threading.Lock()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        """Answer every request, in batches that depend on the requests alone (`batching.plan_batches`).

        Raises EngineError for a request that does not fit the memory by itself, and EngineLost when the GPU has failed.
        """
        texts = [self._render(request) for request in requests]
        lengths = [
            self._num_tokens(text) + self._guess_added_tokens(request.image) + sampling.max_new_tokens
            for text, request in zip(texts, requests, strict=True)
        ]

        def answer(rows: list[int]) -> list[Answer]:
            return self._generate_batch([requests[row] for row in rows], [texts[row] for row in rows], sampling)

        answers: dict[int, Answer] = {}
        for with_image in (True, False):  # processors take images for every text of a batch, or for none
            rows = [row for row, request in enumerate(requests) if (request.image is not None) == with_image]
            with _lost_with_its_gpu():
                answers |= self.batches.run(rows, lengths, [request.image_id for request in requests], answer)
        return [answers[row] for row in range(len(requests))]

    def score_pairs(self, pairs: Sequence[AnsweredPair]) -> list[tuple[float, float]]:
        """Return log p of the chosen and the rejected answer of each pair, summed over the tokens that training sees.

        Raises ModelError for a model that cannot share the prompt between answers.
        """
        reason = why_not(self.model.config)
        if reason is not None:
            raise ModelError(f"preferences.reference_logps=true: '{self.name}' cannot be scored: {reason}.")
        split = [
            [split_pair(self.processor, pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
            for pair in pairs
        ]
        lengths = [
            self._num_tokens(chosen[0] + chosen[1] + rejected[1]) + self._guess_added_tokens(pair.image)
            for pair, (chosen, rejected) in zip(pairs, split, strict=True)
        ]

        def score_rows(rows: list[int]) -> list[tuple[float, float]]:
            with self._tokenizing:
                batch = make_batch(
                    self.processor,
                    [pairs[row].image for row in rows],
                    [split[row][0][0] for row in rows],
                    [(split[row][0][1], split[row][1][1]) for row in rows],
                )
            return self._score(batch)

        with _lost_with_its_gpu():
            scores = self.batches.run(range(len(pairs)), lengths, [""] * len(pairs), score_rows)
        return [scores[row] for row in range(len(pairs))]

    def _score(self, batch: Batch) -> list[tuple[float, float]]:
        moved = {
            name: value.to(self.device, self.model.dtype if value.is_floating_point() else None)
            for name, value in batch.items()
        }
        with self._busy:
            chosen, rejected = score(self.model, moved)
        return list(zip(chosen.tolist(), rejected.tolist(), strict=True))

    def _ignore_generation_config(self) -> None:
        """Drop the penalties, beams, suppressed tokens and the like of the checkpoint's generation_config.json.

        vLLM is not given them either: both engines draw from the model's own distribution, which training trains.
        transformers would fill up the settings of a call with those of the model, and those of an adapter's base.
        """
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        for holder in {self.model, base}:
            holder.generation_config = GenerationConfig()

    def _render(self, request: Request) -> str:
        question = [{"role": "user", "content": request.prompt}]
        return render(self.processor, question, with_image=request.image is not None, add_generation_prompt=True)

    @torch.inference_mode()
    def _generate_batch(self, requests: Sequence[Request], texts: Sequence[str], sampling: Sampling) -> list[Answer]:
        images = [[request.image] for request in requests if request.image is not None] or None
        with self._tokenizing:
            inputs = self.processor(
                images=images,
                text=list(texts),
                padding=True,
                padding_side="left",
                return_tensors="pt",
                add_special_tokens=False,
            )
        num_prompt_tokens = inputs["attention_mask"].sum(1).tolist()
        num_image_tokens = (inputs["input_ids"] == image_token_id(self.processor)).sum(1).tolist()
        with self._busy:
            sequences = self.model.generate(
                **inputs.to(self.device, dtype=self.model.dtype),
                generation_config=GenerationConfig(
                    max_new_tokens=sampling.max_new_tokens,
                    do_sample=False,  # sampling is done by the seeded noise below
                    eos_token_id=self.end_ids or None,
                    pad_token_id=self.processor.tokenizer.pad_token_id,
                ),
                logits_processor=_processors([request.seed for request in requests], sampling, self.device),
            )
            new_ids = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        with self._tokenizing:
            return [
                read_answer(self.processor, ids, self.end_ids, num_image, num_prompt - self._num_tokens(text))
                for ids, num_image, num_prompt, text in zip(
                    new_ids, num_image_tokens, num_prompt_tokens, texts, strict=True
                )
            ]


@contextmanager
def _lost_with_its_gpu() -> Iterator[None]:
    try:
        yield
    except torch.AcceleratorError as error:  # every later call on this GPU would fail too
        raise EngineLost(str(error).splitlines()[0]) from error


class SeededNoise(LogitsProcessor):
    """Draws each row's token with the row's own generator.

    Adding Gumbel noise to log-probabilities and taking the largest is an exact draw from them; with one generator
    per request the draw does not depend on what else is in the batch.
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
