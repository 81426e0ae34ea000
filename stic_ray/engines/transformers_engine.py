"""The default engine: batched generation with transformers, on a GPU or a CPU."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from stic_ray.core.config import ModelConfig
from stic_ray.engines.base import Answer, Request, Sampling
from stic_ray.engines.loading import choose_dtype, fingerprint, image_token_id, load_model, load_processor
from stic_ray.engines.rendering import end_token_ids, read_answer, render

logger = logging.getLogger(__name__)


class TransformersCounter:
    """A model's processor in this process."""

    def __init__(self, model: ModelConfig) -> None:
        """Load the processor. Raises ModelError."""
        self.processor: Any = load_processor(model)

    def count_text_tokens(self, messages: Sequence[dict[str, str]], *, with_image: bool) -> int:
        """Return the tokens of a conversation in the chat template, the image counted as its placeholder."""
        return self._num_tokens(render(self.processor, messages, with_image=with_image, add_generation_prompt=False))

    def count_added_tokens(self, images: Sequence[Image.Image]) -> list[int]:
        """Return how many tokens each image adds; the text around it makes no difference."""
        if not images:
            return []
        question = [{"role": "user", "content": "?"}]
        text = render(self.processor, question, with_image=True, add_generation_prompt=True)
        inputs = self.processor(
            images=[[image] for image in images],
            text=[text] * len(images),
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
        )
        return [num_tokens - self._num_tokens(text) for num_tokens in inputs["attention_mask"].sum(1).tolist()]

    def _num_tokens(self, text: str) -> int:
        return len(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])


class TransformersEngine(TransformersCounter):
    """A model in this process."""

    def __init__(self, model: ModelConfig, *, batch_size: int, on_gpu: bool, adapter: Path | None = None) -> None:
        """Load the model, and the adapter onto it. Raises ModelError."""
        self.name = str(adapter) if adapter else model.path
        self.revision = fingerprint(model)
        self.batch_size = batch_size
        self.device = torch.device("cuda" if on_gpu else "cpu")
        super().__init__(model)
        weights: Any = load_model(model, dtype=choose_dtype(model, on_gpu=on_gpu), adapter=adapter)
        self.model: Any = weights.to(self.device).eval()
        self.end_ids = end_token_ids(self.processor, self.model.generation_config)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        """Answer every request, `batch_size` at a time; batches depend on the order of requests alone.

        A batch that does not fit the GPU is halved, and the smaller size kept.
        """
        answers: dict[int, Answer] = {}
        for with_image in (True, False):  # processors take images for every text of a batch, or for none
            waiting = [i for i, request in enumerate(requests) if (request.image is not None) == with_image]
            while waiting:
                batch = waiting[: self.batch_size]
                try:
                    found = self._generate_batch([requests[i] for i in batch], sampling)
                except torch.cuda.OutOfMemoryError:
                    if len(batch) == 1:
                        raise
                    torch.cuda.empty_cache()
                    self.batch_size = len(batch) // 2
                    logger.warning("out of GPU memory with %d requests, going on with %d", len(batch), self.batch_size)
                    continue
                answers.update(zip(batch, found, strict=True))
                waiting = waiting[len(batch) :]
        return [answers[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _generate_batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        texts = [
            render(
                self.processor,
                [{"role": "user", "content": request.prompt}],
                with_image=request.image is not None,
                add_generation_prompt=True,
            )
            for request in requests
        ]
        images = [[request.image] for request in requests if request.image is not None] or None
        inputs = self.processor(
            images=images, text=texts, padding=True, padding_side="left", return_tensors="pt", add_special_tokens=False
        ).to(self.device, dtype=self.model.dtype)
        sequences = self.model.generate(
            **inputs,
            max_new_tokens=sampling.max_new_tokens,
            do_sample=False,  # sampling is done by the seeded noise below
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=self.end_ids or None,
            pad_token_id=self.processor.tokenizer.pad_token_id,
            logits_processor=_processors([request.seed for request in requests], sampling, self.device),
        )
        num_prompt_tokens = inputs["attention_mask"].sum(1).tolist()
        num_image_tokens = (inputs["input_ids"] == image_token_id(self.processor)).sum(1).tolist()
        new_ids = sequences[:, inputs["input_ids"].shape[1] :].tolist()
        return [
            read_answer(self.processor, ids, self.end_ids, num_image, num_prompt - self._num_tokens(text))
            for ids, num_image, num_prompt, text in zip(
                new_ids, num_image_tokens, num_prompt_tokens, texts, strict=True
            )
        ]


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
