"""What a scorer is: it opens once in each actor, and then gives values to the answers of a window of images.

Nothing here needs Ray, so scorers can be used in experiments: `open_scorer(NAME, Tools(config, engine))` gives a
function of `Answered.of(texts, picture, prompt)` (docs/verification.md).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

from PIL import Image

from stic_ray.core.config import RunConfig
from stic_ray.core.steps import StepRun
from stic_ray.core.workload import Sizes
from stic_ray.engines.base import Answer, AnsweredPrompt, Request, Sampling
from stic_ray.method.prompts import PromptSet, load_prompts


class Candidate(NamedTuple):
    """An answer that is scored."""

    number: int
    text: str
    prompt: str = ""
    """Under which its log-probability is taken."""
    num_tokens: int | None = None
    """Generated tokens, the end not counted; what is divided by them needs them."""
    cut_off: bool = False
    """Whether it reached its limit, and so has no end."""


@dataclass(frozen=True)
class Answered:
    """An image with its answers."""

    image_id: str
    answers: tuple[Candidate, ...]
    picture: Image.Image | None = None
    """None where no scorer of the step needs pictures."""
    outside: Mapping[int | None, float] = field(default_factory=dict)
    """What a scorer's `read` found: by the number of an answer, or under None for the image."""
    path: str = ""
    known: dict[Any, Any] = field(default_factory=dict, compare=False)
    """What scorers keep for one another, as log-probabilities that several of them need."""

    @staticmethod
    def of(
        texts: Sequence[str],
        picture: Image.Image | None = None,
        prompt: str = "",
        num_tokens: Sequence[int] | None = None,
    ) -> "Answered":
        """Return some answers to one prompt about one picture."""
        counts = num_tokens or [None] * len(texts)
        answers = [Candidate(n, text, prompt, count) for n, (text, count) in enumerate(zip(texts, counts, strict=True))]
        return Answered("", tuple(answers), picture)

    @property
    def texts(self) -> list[str]:
        """The answers as they are."""
        return [answer.text for answer in self.answers]


class Statement(NamedTuple):
    """What a candidate says, as a question, and how likely the model takes it to be true."""

    number: int
    question: str
    p_yes: float


class Scored(NamedTuple):
    """What a scorer says of an image's answers."""

    values: Mapping[int | None, float | None]
    """By the number of the answer, or under None for the image; None, or no finite number, is no score."""
    statements: Sequence[Statement] = ()


class ScoringEngine(Protocol):
    """A model that answers, and says how likely answers are (engines/base.py)."""

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        """Answer every request, in order."""
        ...

    def score_answers(self, asked: Sequence[AnsweredPrompt]) -> list[list[float]]:
        """Return log p of every answer to every prompt."""
        ...


@dataclass(frozen=True)
class Tools:
    """What a scorer may use."""

    config: RunConfig
    engine: ScoringEngine | None = None
    """There where a scorer needs `model`."""
    reference: ScoringEngine | None = None

    @cached_property
    def prompts(self) -> PromptSet:
        """The run's prompt set."""
        return load_prompts(self.config.prompts)

    @property
    def on_gpu(self) -> bool:
        """Whether the process holds a GPU."""
        return self.config.actors.num_gpus > 0


Needs = Literal["pictures", "model", "reference", "gpu"]
Score = Callable[[Sequence[Answered]], Sequence[Scored]]
Requests = Sequence[tuple[float, float, float]]
"""How many, and of each the tokens that are read and written."""


@dataclass(frozen=True)
class Scorer:
    """A way to say how good answers are."""

    open: Callable[[Tools], Score]
    """Loads what it needs, in each actor; what it returns is called by several threads."""
    needs: frozenset[Needs] = frozenset()
    """`pictures`; the run's `model`, with a `reference` beside it; `gpu` for a model of its own."""
    check: Callable[[StepRun], object] = lambda step: None
    """Finds the user's mistakes before anything is spent. Raises UserError."""
    check_model: Callable[[RunConfig], object] = lambda config: None
    """Finds that a model of its own cannot be opened here; loads no weights. Raises ModelError."""
    read: Callable[[RunConfig, Sequence[str]], dict[str, dict[int | None, float]]] | None = None
    """Reads what there is from outside for some images, by their id; called for each shard where it is loaded."""
    requests: Callable[[RunConfig, Sizes], Requests] = lambda config, sizes: ()
    """What the run's model is asked for an image with all its answers, for the estimate."""
    none_because: str = "the scorer gives none"
    """Why an answer may have no score."""


def of_texts(score: Callable[[Sequence[str]], Sequence[float | None]]) -> Score:
    """Return the scorer's function that takes each image's texts by themselves."""

    def scored(images: Sequence[Answered]) -> list[Scored]:
        return [by_answer(image, score(image.texts)) for image in images]

    return scored


def by_answer(image: Answered, values: Sequence[float | None], statements: Sequence[Statement] = ()) -> Scored:
    """Return values that are in the order of an image's answers. Raises ValueError for another number of them."""
    numbers = [answer.number for answer in image.answers]
    if len(values) != len(numbers):
        raise ValueError(f"{len(values)} values for the {len(numbers)} answers of an image")
    return Scored(dict(zip(numbers, values, strict=True)), statements)


def finite(value: float | None) -> float | None:
    """Return a score, or None for what is no number."""
    return float(value) if value is not None and math.isfinite(value) else None
