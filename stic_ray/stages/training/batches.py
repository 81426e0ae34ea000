"""Batches for both trainers, each checked to hold its image tokens."""

from typing import Any

import torch

from stic_ray.engines.sequences import SequenceBuilder, TokenSequence, labels_of
from stic_ray.engines.shared_prefix import PADDING, make_batch

IGNORED = -100
"""Label of a position that the loss leaves out."""
REFERENCE_LOGPS = ("reference_chosen_logp", "reference_rejected_logp")
"""Columns of pairs, and tensors of a batch, with the reference model's log-probabilities of both answers."""
WEIGHT = "weight"
"""Of a row in the mean over its batch: 1, or 0 for one that only fills up an epoch (training/data.py)."""


def check_image_tokens(input_ids: torch.Tensor, token_id: int, has_image: list[bool]) -> None:
    """Raise AssertionError unless exactly the rows with an image hold image tokens.

    A row that lost them would train the language model alone and nothing else would show it (STIC's released
    code trains so: docs/method.md).
    """
    found = (input_ids == token_id).any(dim=1).tolist()
    assert found == has_image, f"rows with an image {has_image}, rows with image tokens {found}"


def count_rows_and_tokens(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how many rows a batch trains on, without those of weight 0, and how many tokens a model makes of it."""
    rows = batch[WEIGHT] > 0 if WEIGHT in batch else (batch["labels"] != IGNORED).any(1)
    present = batch["segments"] != PADDING if "segments" in batch else batch["attention_mask"]
    return rows.sum(), present.sum()


def _weights(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {WEIGHT: torch.tensor([example[WEIGHT] for example in examples])} if WEIGHT in examples[0] else {}


class PreferenceCollator:
    """Preference pairs as sequences of their own: the B chosen ones first and the B rejected ones behind them."""

    def __init__(self, processor: Any) -> None:
        self.builder = SequenceBuilder(processor)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, masks (`completion_mask`: the answers) and image inputs of 2B sequences, and B weights."""
        chosen, rejected = zip(*(_build_pair(self.builder, example) for example in examples), strict=True)
        batch = self.builder.batch([*chosen, *rejected], [example["image"] for example in examples] * 2)
        batch["completion_mask"] = batch.pop("is_answer").long()
        check_image_tokens(batch["input_ids"], self.builder.image_token_id, [True] * 2 * len(examples))
        return {**batch, **_weights(examples)}


class SharedPrefixCollator:
    """Preference pairs with image and prompt there once; rows may carry the reference's log-probabilities."""

    def __init__(self, processor: Any) -> None:
        self.builder = SequenceBuilder(processor)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what `shared_prefix.make_batch` does; WEIGHT and REFERENCE_LOGPS, each (B,), where rows have them."""
        pairs = [_build_pair(self.builder, example) for example in examples]
        batch = make_batch(self.builder, [example["image"] for example in examples], pairs)
        check_image_tokens(batch["input_ids"], self.builder.image_token_id, [True] * len(examples))
        if all(example.get(name) is not None for example in examples for name in REFERENCE_LOGPS):
            batch |= {name: torch.tensor([example[name] for example in examples]) for name in REFERENCE_LOGPS}
        return {**batch, **_weights(examples)}


class AnswersOnlyCollator:
    """Conversations with the loss on what the assistant says, its end-of-turn token included, and nowhere else.

    TRL's own mask needs generation markers in the chat template, which many checkpoints lack.
    """

    def __init__(self, processor: Any) -> None:
        self.builder = SequenceBuilder(processor)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, attention_mask, labels and, where a row has an image, pixel values.

        A row of weight 0 has no label: the loss is a mean over labels.
        """
        images = [example["image"] for example in examples]
        sequences = [
            self.builder.build(
                example["messages"],
                with_image=example["image"] is not None,
                cut_off=example.get("cut_off", False),
            )
            for example in examples
        ]
        batch = self.builder.batch(sequences, images)
        batch["labels"] = labels_of(batch, IGNORED)
        del batch["is_answer"]
        if WEIGHT in examples[0]:
            batch["labels"][_weights(examples)[WEIGHT] == 0] = IGNORED
        has_image = [image is not None for image in images]
        check_image_tokens(batch["input_ids"], self.builder.image_token_id, has_image)
        return batch


def _build_pair(builder: SequenceBuilder, example: dict[str, Any]) -> tuple[TokenSequence, TokenSequence]:
    """Return the sequences of both answers; one that was cut off at its limit has no end."""
    chosen, rejected = (
        builder.build(
            [*example["prompt"], *example[side]],
            with_image=True,
            cut_off=example.get(f"{side}_finish_reason") == "length",
        )
        for side in ("chosen", "rejected")
    )
    return chosen, rejected
