"""Batches for both trainers, each checked to hold its image tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from stic_ray.engines.loading import image_token_id
from stic_ray.engines.rendering import Pieces, split_answers, turn_end
from stic_ray.engines.shared_prefix import PADDING, make_batch, split_pair

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


@dataclass
class PreferenceCollator(DataCollatorForVisionPreference):
    """TRL's collator of preference pairs; ends answers that the chat template leaves open."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, masks and pixel values of the chosen, then of the rejected sequences, and their weights."""
        end = turn_end(self.processor)
        closed = [
            {
                "image": example["image"],
                "prompt": example["prompt"],
                **{
                    side: [{**m, "content": m["content"] + end} for m in example[side]]
                    for side in ("chosen", "rejected")
                },
            }
            for example in examples
        ]
        batch = super().torch_call(closed)
        check_image_tokens(batch["input_ids"], image_token_id(self.processor), [True] * 2 * len(examples))
        return {**batch, **_weights(examples)}


@dataclass
class SharedPrefixCollator:
    """Preference pairs with image and prompt there once; rows may carry the reference's log-probabilities."""

    processor: Any

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what `shared_prefix.make_batch` does; WEIGHT and REFERENCE_LOGPS, each (B,), where rows have them."""
        split = [
            [
                split_pair(self.processor, example["prompt"][0]["content"], example[side][0]["content"])
                for side in ("chosen", "rejected")
            ]
            for example in examples
        ]
        prompts = [chosen[0] for chosen, _ in split]
        answers = [(chosen[1], rejected[1]) for chosen, rejected in split]
        batch = make_batch(self.processor, [example["image"] for example in examples], prompts, answers)
        check_image_tokens(batch["input_ids"], image_token_id(self.processor), [True] * len(examples))
        if all(example.get(name) is not None for example in examples for name in REFERENCE_LOGPS):
            batch |= {name: torch.tensor([example[name] for example in examples]) for name in REFERENCE_LOGPS}
        return {**batch, **_weights(examples)}


@dataclass
class AnswersOnlyCollator:
    """Conversations with the loss on what the assistant says, its end-of-turn token included, and nowhere else.

    TRL's own mask needs generation markers in the chat template, which many checkpoints lack. Here the rendered
    conversation is cut at its answers instead, and every piece is tokenised by itself.
    """

    processor: Any

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids, attention_mask, labels and, where a row has an image, pixel values.

        A row of weight 0 has no label: the loss is a mean over labels.
        """
        has_image = [example["image"] is not None for example in examples]
        pieces = [
            split_answers(self.processor, example["messages"], with_image=with_image)
            for example, with_image in zip(examples, has_image, strict=True)
        ]
        batch, openings = self._open(examples, pieces)
        rows = [self._tokenise(opening, row[1:]) for opening, row in zip(openings, pieces, strict=True)]
        pad = self.processor.tokenizer.pad_token_id
        batch["input_ids"] = pad_sequence([ids for ids, _ in rows], batch_first=True, padding_value=pad)
        batch["attention_mask"] = pad_sequence([torch.ones_like(ids) for ids, _ in rows], batch_first=True)
        batch["labels"] = pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=IGNORED)
        if WEIGHT in examples[0]:
            batch["labels"][_weights(examples)[WEIGHT] == 0] = IGNORED
        check_image_tokens(batch["input_ids"], image_token_id(self.processor), has_image)
        return batch

    def _open(self, examples: list[dict[str, Any]], pieces: list[Pieces]) -> tuple[dict[str, Any], list[list[int]]]:
        """Return the model's image inputs, and the tokens of each row up to its first answer, the image's included."""
        openings = [self._ids(row[0][0]) for row in pieces]
        places = [place for place, example in enumerate(examples) if example["image"] is not None]
        if not places:
            return {}, openings
        inputs = self.processor(
            images=[[examples[place]["image"]] for place in places],
            text=[pieces[place][0][0] for place in places],
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
        )
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask").bool()
        for number, place in enumerate(places):
            openings[place] = ids[number][mask[number]].tolist()
        return dict(inputs), openings

    def _tokenise(self, opening: list[int], pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor]:
        ids, labels = list(opening), [IGNORED] * len(opening)
        for text, is_answer in pieces:
            piece = self._ids(text)
            ids += piece
            labels += piece if is_answer else [IGNORED] * len(piece)
        return torch.tensor(ids), torch.tensor(labels)

    def _ids(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])
