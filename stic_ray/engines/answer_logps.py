"""Log-probabilities of given answers, each answer in a sequence of its own: for families that share no prefix."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stic_ray.engines.base import AnsweredPrompt
from stic_ray.engines.sequences import Batch, SequenceBuilder, TokenSequence


def answer_sequences(builder: SequenceBuilder, asked: AnsweredPrompt) -> list[TokenSequence]:
    """Return the conversation of each answer, alike up to the answer."""
    cut_off = asked.cut_off or [False] * len(asked.answers)
    question = {"role": "user", "content": asked.prompt}
    return [
        builder.build(
            [question, {"role": "assistant", "content": answer}], with_image=asked.image is not None, cut_off=ends_early
        )
        for answer, ends_early in zip(asked.answers, cut_off, strict=True)
    ]


def make_batch(
    builder: SequenceBuilder, images: Sequence[Image.Image | None], rows: Sequence[Sequence[TokenSequence]]
) -> Batch:
    """Return the inputs of B rows of one sequence each, padded on the right."""
    return builder.batch([sequence for [sequence] in rows], images)


def score_batch(model: Any, batch: Batch) -> Tensor:
    """Return the log-probability of each row's answer under a model, in float32, shape (B, 1)."""
    return torch.stack([logps.sum() for logps in token_logps(model, batch)]).unsqueeze(1)


@torch.inference_mode()
def token_logps(model: Any, batch: Batch) -> list[Tensor]:
    """Return the log-probability of each token of each row's answers under a model, in float32, row by row."""
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name != "is_answer"}
    is_answer, tokens = batch["is_answer"], batch["input_ids"]
    num_asked = int((~is_answer).all(0).cumprod(0).sum())
    if "logits_to_keep" in inspect.signature(_inner(model).forward).parameters:
        inputs["logits_to_keep"] = tokens.shape[1] - num_asked + 1  # the others' logits are not needed
    logits = model(**inputs, use_cache=False).logits[:, -(tokens.shape[1] - num_asked + 1) : -1]
    rows = []
    for row, own, counts in zip(logits, tokens[:, num_asked:], is_answer[:, num_asked:], strict=True):
        logps = row.float().log_softmax(-1).gather(1, own.unsqueeze(1)).squeeze(1)
        rows.append(logps[counts])
    return rows


def _inner(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
