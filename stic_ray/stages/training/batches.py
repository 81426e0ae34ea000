"""Batches for both trainers, each checked to hold its image tokens."""

from typing import Any

import PIL.Image
import torch

from stic_ray.engines.sequences import SequenceBuilder, TokenSequence, labels_of
from stic_ray.engines.shared_prefix import make_batch

IGNORED = -100
"""Label of a position that the loss leaves out."""
GREY = (128, 128, 128)
"""Colour of a blank picture."""
_BLANK = {
    "image": PIL.Image.new("RGB", (64, 64), GREY),
    "messages": [{"role": "user", "content": "Look."}, {"role": "assistant", "content": "Yes."}],
    "weight": 0.0,
}
"""A row of which nothing is learned."""
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


class _Collator:
    def __init__(self, processor: Any) -> None:
        self.builder = SequenceBuilder(processor)

    def sequence(self, example: dict[str, Any], side: str = "chosen") -> TokenSequence:
        """Return the sequence of a conversation, or of a pair's answer, which has no end where it was cut off."""
        messages = example["messages"] if "messages" in example else [*example["prompt"], *example[side]]
        cut_off = example.get(f"{side}_finish_reason") == "length"
        return self.builder.build(messages, with_image=example["image"] is not None, cut_off=cut_off)


class PreferenceCollator(_Collator):
    """Preference pairs as sequences of their own: the B chosen ones first and the B rejected ones behind them."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, masks (`completion_mask`: the answers) and image inputs of 2B sequences, and B weights."""
        sequences = [self.sequence(example, side) for side in ("chosen", "rejected") for example in examples]
        batch = self.builder.batch(sequences, [example["image"] for example in examples] * 2)
        batch["completion_mask"] = batch.pop("is_answer").long()
        check_image_tokens(batch["input_ids"], self.builder.image_token_id, [True] * 2 * len(examples))
        return batch | _columns(examples, WEIGHT)


class SharedPrefixCollator(_Collator):
    """Preference pairs with image and prompt there once; rows may carry the reference's log-probabilities."""

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what `shared_prefix.make_batch` does; WEIGHT and REFERENCE_LOGPS, each (B,), where rows have them."""
        pairs = [(self.sequence(example), self.sequence(example, "rejected")) for example in examples]
        batch = make_batch(self.builder, [example["image"] for example in examples], pairs)
        check_image_tokens(batch["input_ids"], self.builder.image_token_id, [True] * len(examples))
        return batch | _columns(examples, WEIGHT, *REFERENCE_LOGPS)


class AnswersOnlyCollator(_Collator):
    """Conversations with the loss on what the assistant says, its end-of-turn token included, and nowhere else.

    Of a pair, that is the preferred answer. TRL's own mask needs generation markers in the chat template, which many
    checkpoints lack.
    """

    needs_image = False
    """Whether a blank picture is put beside rows which all lack one; it weighs nothing in the loss.

    The vision tower and the projector thus take part in every micro-batch. Otherwise a worker whose rows are all
    text has no gradients for them, or never asks for the weights that ZeRO-3 keeps elsewhere, and the others wait.
    LLaVA does the same (`prepare_inputs_labels_for_multimodal` and the trainer's dummy image of its data collator).
    """

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, attention_mask, labels and, where a row has an image, pixel values.

        A row of weight 0 has no label: the loss is a mean over labels.
        """
        if self.needs_image and all(example["image"] is None for example in examples):
            examples = [*examples, _BLANK]
        images = [example["image"] for example in examples]
        batch = self.builder.batch([self.sequence(example) for example in examples], images)
        batch["labels"] = labels_of(batch, IGNORED)
        del batch["is_answer"]
        batch["labels"][torch.tensor([example.get(WEIGHT) == 0 for example in examples])] = IGNORED
        check_image_tokens(batch["input_ids"], self.builder.image_token_id, [image is not None for image in images])
        return batch


def _columns(examples: list[dict[str, Any]], *names: str) -> dict[str, torch.Tensor]:
    """Return the columns that all rows have."""
    known = [name for name in names if all(example.get(name) is not None for example in examples)]
    return {name: torch.tensor([example[name] for example in examples]) for name in known}
