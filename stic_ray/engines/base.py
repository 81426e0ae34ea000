"""The vision-language model as the rest of the project sees it: requests in, answers out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from PIL import Image


@dataclass(frozen=True)
class Request:
    """One question to the model."""

    prompt: str
    image: Image.Image | None
    """An RGB picture, or None for a text-only question. Requests of one call with the same prompt and the same object
    here ask one question, which is read once where the engine can."""
    seed: int = 0
    """Makes the sampled answer repeatable, whatever else is in the batch."""
    image_id: str = ""
    """Requests with the same one travel together, so that what they share is computed once where that can be."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn."""

    max_new_tokens: int
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0


@dataclass(frozen=True)
class Answer:
    """What the model answered."""

    text: str
    num_tokens: int
    """Generated tokens, the end-of-text token not counted."""
    finish_reason: Literal["stop", "length"]
    """`stop`: the model ended its answer; `length`: it was cut off at the limit."""
    num_image_tokens: int
    """Positions of the prompt that hold a piece of the image; 0 without an image."""
    num_added_tokens: int
    """By how many tokens the image made the prompt longer than its text with a placeholder."""


@dataclass(frozen=True)
class AnsweredPrompt:
    """Answers to one prompt, to be scored."""

    prompt: str
    image: Image.Image | None
    """An RGB picture, or None for a text-only question."""
    answers: tuple[str, ...]
    cut_off: tuple[bool, ...] = ()
    """Which of them reached their limit, and so have no end; () for none."""


class TokenCounter(Protocol):
    """Knows how long a conversation is, without the weights of a model."""

    def count_text_tokens(self, messages: Sequence[dict[str, str]], *, with_image: bool) -> int:
        """Return the length of a conversation in tokens, its image counted as one placeholder."""
        ...

    def count_added_tokens(self, images: Sequence[Image.Image]) -> list[int]:
        """Return by how many tokens each image makes a conversation longer than its text with a placeholder."""
        ...


class Engine(TokenCounter, Protocol):
    """A loaded model. `generate` may be called from several threads at the same time."""

    name: str
    """Path or hub id, for the record."""
    revision: str
    """Revision of a hub id, or a fingerprint of the files."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        """Answer every request, in order."""
        ...


@runtime_checkable
class Scorer(Protocol):
    """An engine that can also say how likely given answers are."""

    def score_answers(self, asked: Sequence[AnsweredPrompt]) -> list[list[float]]:
        """Return log p of each answer given its prompt, summed over the tokens of training.

        Those are the answer's and what ends the turn, unless the answer was cut off.
        """
        ...

    def score_tokens(self, conversations: Sequence[Sequence[dict[str, str]]]) -> list[list[float]]:
        """Return log p of each token that training learns of a conversation, in order, no image being shown."""
        ...
