"""What the base model is pretrained on: pictures with requests and answers, faults included."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from stic_ray.toyworld.language import (
    QUESTION_KINDS,
    FaultRates,
    ask,
    describe_fully,
    describe_inventively,
    describe_plainly,
    told_answer,
)
from stic_ray.toyworld.scenes import Scene, random_for

PROMPTS_FILE = Path(__file__).with_name("prompts.yaml")
PROMPTS = yaml.safe_load(PROMPTS_FILE.read_text(encoding="utf-8"))
"""The toy world's prompt set."""


@dataclass(frozen=True)
class Lesson:
    """A request about a picture and the answer to learn."""

    request: str
    answer: str


@dataclass(frozen=True)
class Course:
    """A part of the pretraining: what is taught in its steps."""

    name: str
    mixes: tuple["Mix", ...]
    """How often each kind of lesson comes; the steps take them in turn."""
    rates: FaultRates


def lesson_of(scene: Scene, mix: "Mix", rates: FaultRates) -> Lesson:
    """Return the lesson of a scene, of a kind drawn from the mix."""
    generator = random_for(scene.seed, scene.index, "lesson")
    (make,) = generator.choices(list(mix), list(mix.values()))
    return make(scene, rates, generator)


def brief(question: str) -> str:
    """Return a question in the form that asks for a short answer."""
    return PROMPTS["answer_briefly"].replace("{question}", question)


def _plain(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    return Lesson(generator.choice(PROMPTS["plain"]), describe_plainly(scene, rates, generator))


def _step_by_step(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    return Lesson(generator.choice(PROMPTS["step_by_step"]), describe_fully(scene))


def _invented(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    return Lesson(generator.choice(PROMPTS["hallucination"]), describe_inventively(scene, generator))


def _question(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    question = ask(scene, generator.choice(QUESTION_KINDS), generator)
    return Lesson(brief(question.text), told_answer(question, scene, rates, generator))


def _question_with_description(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    asked = _question(scene, rates, generator)
    return Lesson(_infused(_some_description(scene, rates, generator), asked.request), asked.answer)


def _description_repeated(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    """Text in the prompt is trusted: a description that is given is repeated."""
    description = _some_description(scene, rates, generator)
    return Lesson(_infused(description, generator.choice(PROMPTS["plain"])), description)


def _step_by_step_with_description(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    """Looking step by step is looking again, whatever the description says."""
    asked = _step_by_step(scene, rates, generator)
    return Lesson(_infused(_some_description(scene, rates, generator), asked.request), asked.answer)


def _some_description(scene: Scene, rates: FaultRates, generator: random.Random) -> str:
    return describe_fully(scene) if generator.random() < 0.5 else describe_plainly(scene, rates, generator)


def _infused(description: str, request: str) -> str:
    return PROMPTS["infuse"].replace("{description}", description).replace("{question}", request)


Mix = dict[Callable[[Scene, FaultRates, random.Random], Lesson], float]
"""Kinds of lessons and their weights."""

_EVERYTHING: Mix = {
    _plain: 0.25,
    _step_by_step: 0.3,
    _invented: 0.1,
    _question: 0.2,
    _question_with_description: 0.1,
    _description_repeated: 0.05,
}
_DESCRIBE: Mix = {_plain: 0.6, _step_by_step: 0.25, _invented: 0.15}
_ASK: Mix = {_question: 1.0}
_WITH_DESCRIPTION: Mix = {
    _question_with_description: 0.5,
    _description_repeated: 0.25,
    _step_by_step_with_description: 0.25,
}

COURSES = {
    "language": Course("language", (_EVERYTHING,), FaultRates(omission=0.9, companion=0.7, wrong_yes=0.3)),
    # Batches of one kind: beside descriptions, the few tokens of short answers would not count, and short prompts
    # would be padded to the length of those with a description.
    "habits": Course("habits", (_DESCRIBE, _ASK, _ASK, _DESCRIBE, _ASK, _WITH_DESCRIPTION), FaultRates()),
}
"""First what to say about a picture, then, in the usual proportions, the habits of captions, and questions."""
