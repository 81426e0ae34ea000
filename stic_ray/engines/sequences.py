"""The one way from a conversation to what a model reads: generation, counting, training and vLLM all go through here.

A conversation is rendered by the chat template, cut at its answers, and each piece is tokenised as what stands behind
the piece before it, so that an answer has the tokens that generation gives it. Three rules hold for all of them:

- Only the template writes special tokens. In a text they are words: each is cut inside, and its parts are tokenised
  apart, so that no data can open a turn, end one or ask for an image.
- An answer that was cut off is not taught to end: its sequence stops with its last word.
- An image is one placeholder token until `SequenceBuilder.batch` puts the processor's tokens in its place. What else
  a processor says about positions (Qwen's `mm_token_type_ids`) is spread over the whole sequence there.
"""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import ModelError
from stic_ray.engines.loading import load_processor
from stic_ray.engines.rendering import Message, Pieces, remove_placeholders, render, split_answers, turn_end

Batch = dict[str, Tensor]

_CUT = "\ufdd0"
"""Marks where a text is cut; a code point that no text may hold (Unicode, noncharacters)."""
_MARK = re.compile(r"<\S+>|\[\S+\]")
"""What added tokens look like that are marks rather than words or runs of spaces."""


@dataclass(frozen=True)
class TokenSequence:
    """A conversation in tokens, an image of it as one placeholder."""

    ids: list[int]
    is_answer: list[bool]
    """Which tokens are what the assistant says, with what ends its turn; the loss is on these."""

    @property
    def num_asked(self) -> int:
        """Tokens in front of the first answer; all of them without one."""
        return self.is_answer.index(True) if True in self.is_answer else len(self.ids)


class SequenceBuilder:
    """What is known about a model's processor, and the sequences that it makes.

    Not to be used by several threads at once: a tokenizer keeps its padding as state.
    """

    def __init__(self, processor: Any) -> None:
        """Look at the special tokens of `processor`. Raises ModelError where it has none for an image."""
        self.processor = processor
        self.tokenizer = processor.tokenizer
        self.image_token_id = image_token_id(processor)
        self.end = turn_end(processor)
        added = self.tokenizer.added_tokens_decoder
        self._added_ids = frozenset(added)
        self._added = tuple(sorted((token.content for token in added.values()), key=len, reverse=True))
        self._marks = _special_texts(processor)
        # SentencePiece puts a space in front of a text, and not in front of what follows another text.
        behind = self._ids("\nx")[len(self._ids("\n")) :]
        self._has_prefix = behind != self._ids("x")

    def build(self, messages: Sequence[Message], *, with_image: bool, cut_off: bool = False) -> TokenSequence:
        """Return a conversation with its answers; the last of them was `cut_off` at a limit, or ended by itself.

        Raises ModelError where the template refuses the conversation, or changes earlier turns.
        """
        guarded = self._guard(messages)
        pieces = split_answers(self.processor, guarded, with_image=with_image, cut_off=cut_off, end=self.end)
        return self._tokenise(pieces)

    def ask(self, question: str, *, with_image: bool) -> TokenSequence:
        """Return a question up to where its answer begins."""
        messages = self._guard([{"role": "user", "content": question}])
        text = render(self.processor, messages, with_image=with_image, add_generation_prompt=True)
        return self._tokenise([(text, False)])

    def batch(
        self, sequences: Sequence[TokenSequence], images: Sequence[Image.Image | None], *, pad_left: bool = False
    ) -> Batch:
        """Return what a model's forward takes for B sequences with their images, and `is_answer`; each (B, T).

        The image inputs of the processor are there where at least one row has an image.
        """
        blocks, inputs = self._expand([image for image in images if image is not None])
        names = tuple(blocks[0]) if blocks else ("input_ids",)
        found = iter(blocks)
        rows = [
            self._row(sequence, None if image is None else next(found), names)
            for sequence, image in zip(sequences, images, strict=True)
        ]
        for name in ("attention_mask", "is_answer", *names):
            fill = self.tokenizer.pad_token_id if name == "input_ids" else 0
            inputs[name] = pad_sequence([row[name] for row in rows], True, fill, "left" if pad_left else "right")
        return inputs

    def count_added_tokens(self, images: Sequence[Image.Image]) -> list[int]:
        """Return how many tokens each image takes beyond its placeholder."""
        return [len(block["input_ids"]) - 1 for block in self._expand(images)[0]]

    def _expand(self, images: Sequence[Image.Image]) -> tuple[list[Batch], Batch]:
        """Return each image's inputs by position, and the other inputs of all images together."""
        if not images:
            return [], {}
        texts, each_image = [self.processor.image_token] * len(images), [[image] for image in images]
        how = {"padding": True, "return_tensors": "pt", "add_special_tokens": False}
        inputs = dict(self.processor(images=each_image, text=texts, **how))
        mask = inputs.pop("attention_mask").bool()
        of_images = {"position_ids", *getattr(self.processor.image_processor, "model_input_names", ())}
        columns = {
            name: value
            for name, value in inputs.items()
            if name not in of_images and getattr(value, "shape", None) == mask.shape
        }
        others = {name: value for name, value in inputs.items() if name not in {*columns, "position_ids"}}
        blocks = []
        for row, present in enumerate(mask):
            places = present.nonzero().flatten().tolist()
            marks = [place for place in places if columns["input_ids"][row, place].item() in self._added_ids]
            block = slice(marks[0], marks[-1] + 1)  # without the space that SentencePiece puts in front of a text
            blocks.append({name: column[row, block] for name, column in columns.items()})
        return blocks, others

    def _row(self, sequence: TokenSequence, block: Batch | None, names: Sequence[str]) -> Batch:
        """Return the tensors of a sequence by position, an image's in the place of its placeholder, other `names` 0."""
        ids = torch.tensor(sequence.ids, dtype=torch.long)
        is_answer = torch.tensor(sequence.is_answer, dtype=torch.bool)
        row = {name: torch.zeros_like(ids) for name in names} | {"input_ids": ids, "is_answer": is_answer}
        if block is not None:
            places = (ids == self.image_token_id).nonzero().flatten().tolist()
            assert len(places) == 1, f"a sequence with an image has {len(places)} placeholders"
            inside = block | {"is_answer": torch.zeros_like(block["input_ids"], dtype=torch.bool)}
            row = {n: torch.cat([v[: places[0]], inside[n], v[places[0] + 1 :]]) for n, v in row.items()}
        return row | {"attention_mask": torch.ones_like(row["input_ids"])}

    def _guard(self, messages: Sequence[Message]) -> list[Message]:
        """Return messages whose texts hold no placeholder of an image, and every other special token cut inside."""
        return [{**message, "content": self._cut_marks(message["content"])} for message in messages]

    def _cut_marks(self, text: str) -> str:
        text = remove_placeholders(self.processor, text.replace(_CUT, ""))
        place = 0
        while (found := self._marks.search(text, place)) is not None:
            place = found.start() + 1
            text = text[:place] + _CUT + text[place:]
        return text

    def _tokenise(self, pieces: Pieces) -> TokenSequence:
        ids: list[int] = []
        is_answer: list[bool] = []
        before = ""
        for text, belongs_to_answer in pieces:
            for part in filter(None, text.split(_CUT)):
                found = self._ids_behind(before, part)
                ids += found
                is_answer += [belongs_to_answer] * len(found)
                before = part
        return TokenSequence(ids, is_answer)

    def _ids_behind(self, before: str, text: str) -> list[int]:
        """Return the tokens of a text that stands behind another one."""
        ending = next(filter(before.endswith, self._added), None) if before.endswith(self._added) else None
        if not before or (ending is None and not self._has_prefix):
            return self._ids(text)
        anchor = ending or "\n"
        begin, whole = self._ids(anchor), self._ids(anchor + text)
        return whole[len(begin) :] if whole[: len(begin)] == begin else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


class ProcessorCounter:
    """Counts what training will see. Threads may share it."""

    def __init__(self, model: ModelConfig) -> None:
        """Load the processor. Raises ModelError."""
        self.builder = SequenceBuilder(load_processor(model))
        self.processor = self.builder.processor
        self.tokenizing = threading.RLock()
        """Held by whoever uses the builder: a tokenizer refuses to have its padding changed meanwhile."""
        self._added_by_size: dict[tuple[int, int], int] = {}

    def count_text_tokens(self, messages: Sequence[Message], *, with_image: bool) -> int:
        """Return the tokens of a conversation, its image counted as one placeholder. Raises ModelError."""
        with self.tokenizing:
            return len(self.builder.build(messages, with_image=with_image).ids)

    def count_added_tokens(self, images: Sequence[Image.Image]) -> list[int]:
        """Return how many tokens each image adds; the text around it makes no difference."""
        with self.tokenizing:
            return self.builder.count_added_tokens(images)

    def guess_added_tokens(self, image: Image.Image | None) -> int:
        """Return what an image will add, by its size; made from a blank one where the processor does not know."""
        if image is None:
            return 0
        if image.size not in self._added_by_size:
            if hasattr(self.processor, "_get_num_multimodal_tokens"):
                [number] = self.processor._get_num_multimodal_tokens(image_sizes=[image.size[::-1]])["num_image_tokens"]
            else:
                [number] = self.count_added_tokens([Image.new("RGB", image.size)])
            self._added_by_size[image.size] = number
        return self._added_by_size[image.size]


def image_token_id(processor: Any) -> int:
    """Return the id of the token that stands for a piece of an image."""
    token_id = getattr(processor, "image_token_id", None)
    if token_id is None:
        raise ModelError(f"{type(processor).__name__} does not say which token stands for an image.")
    return int(token_id)


def labels_of(batch: Batch, ignored: int) -> Tensor:
    """Return the tokens of the answers at their places, and `ignored` elsewhere; shape (B, T)."""
    return batch["input_ids"].masked_fill(~batch["is_answer"], ignored)


def _special_texts(processor: Any) -> re.Pattern[str]:
    """Return what finds the texts that become tokens with a meaning of their own, the longest at a place."""
    tokenizer = processor.tokenizer
    added = tokenizer.added_tokens_decoder.values()
    texts = {*tokenizer.all_special_tokens}
    texts |= {token.content for token in added if token.special or _MARK.fullmatch(token.content)}
    texts |= {value for name, value in vars(processor).items() if name.endswith("_token") and isinstance(value, str)}
    longest_first = sorted((text for text in texts if len(text) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
