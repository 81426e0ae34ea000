"""What the toy world's base model is pretrained on: pictures with requests and answers, in courses.

Descriptions have their faults (`toyworld_descriptions.py`); questions are answered truly: to look for one thing is
easier than to describe all.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from experiments.toyworld_descriptions import (
    FaultRates,
    describe_fully,
    describe_inventively,
    describe_plainly,
    describe_step_by_step,
    empty_cells,
    split,
)
from stic_ray.toyworld.language import (
    PLACES,
    PROMPTS,
    QUESTION_KINDS,
    Question,
    absent_kind,
    ask,
    ask_claim,
    ask_presence,
    brief,
    name_of,
)
from stic_ray.toyworld.scenes import KIND_WEIGHTS, Kind, Scene, random_for, sample_scene

_OTHERS_FIRST_INDEX = 500_000_000
"""Scenes that descriptions are of which stand beside another picture; no other use takes theirs from here."""


def question_to_confirm(scene: Scene, generator: random.Random) -> Question:
    """Return a yes/no question, about the whole picture or a place; half are true, the others tempting.

    What is not there is the companion of what is, something that shares its colour or shape, or any other kind.
    """
    item = generator.choice(scene.objects)
    somewhere = generator.random() < 0.5
    if generator.random() < 0.5:
        return ask_presence(item.kind, scene) if somewhere else ask_claim(item.kind, item.cell, scene)
    absent = _tempting_kind(scene, generator)
    if somewhere:
        return ask_presence(absent, scene)
    if generator.random() < 0.15:  # there, but elsewhere
        return ask_claim(item.kind, generator.choice(empty_cells(scene)), scene)
    at_a_place = item.cell if generator.random() < 0.4 else generator.choice(empty_cells(scene))
    return ask_claim(absent, at_a_place, scene)


def _tempting_kind(scene: Scene, generator: random.Random) -> Kind:
    draw = generator.random()
    if draw < 0.4:
        return absent_kind(scene, "adversarial", generator)
    colours, shapes = ({item[part] for item in scene.kinds} for part in (0, 1))
    near = [kind for kind in KIND_WEIGHTS if kind not in scene.kinds and (kind[0] in colours or kind[1] in shapes)]
    return generator.choice(near) if draw < 0.8 else absent_kind(scene, "random", generator)


def sample_sentences(scenes: Iterable[Scene]) -> list[str]:
    """Return text to train a tokenizer on: every kind of description, question and answer about the scenes."""
    sentences = []
    for scene in scenes:
        generator = random_for(scene.seed, scene.index, "sentences")
        questions = [ask(scene, kind, generator) for kind in QUESTION_KINDS]
        sentences += [describe_plainly(scene, FaultRates(), generator), describe_inventively(scene, generator)]
        sentences += [f"{question.text} {answer}" for question in questions for answer in question.answers]
        sentences.append(split(describe_fully(scene)))
    return sentences


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


def _plain(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    return Lesson(generator.choice(PROMPTS["plain"]), describe_plainly(scene, rates, generator))


def _step_by_step(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    return Lesson(generator.choice(PROMPTS["step_by_step"]), describe_step_by_step(scene, rates, generator))


def _invented(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    return Lesson(generator.choice(PROMPTS["hallucination"]), describe_inventively(scene, generator))


def _question(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    question = ask(scene, generator.choice(QUESTION_KINDS), generator)
    return Lesson(brief(question.text), question.answers[0])


def _confirmed(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    question = question_to_confirm(scene, generator)
    return Lesson(brief(question.text), question.answers[0])


def _found(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    """Where a thing is, or that it is nowhere: says more of each picture than yes or no."""
    item = generator.choice(scene.objects)
    kind = item.kind if generator.random() < 0.6 else _tempting_kind(scene, generator)
    return Lesson(brief(f"Where is the {name_of(kind)}?"), PLACES[item.cell] if kind == item.kind else "nowhere")


def _split(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    """What a description states is asked."""
    draw = generator.random()
    make = generator.choice((describe_plainly, describe_step_by_step))
    description = make(scene, rates, generator) if draw < 0.7 else describe_inventively(scene, generator)
    return Lesson(PROMPTS["split"].replace("{answer}", description), split(description))


def _split_anothers(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    """Whatever the picture shows: the description is of another scene, or the model would look instead of read."""
    return _split(sample_scene(scene.seed, _OTHERS_FIRST_INDEX + scene.index), rates, generator)


def _asked(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    question = ask(scene, generator.choice(QUESTION_KINDS), generator)
    return Lesson(generator.choice(PROMPTS["ask"]), question.text)


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
    make = describe_step_by_step if generator.random() < 0.5 else describe_plainly
    return make(scene, rates, generator)


def _infused(description: str, request: str) -> str:
    return PROMPTS["infuse"].replace("{description}", description).replace("{question}", request)


Mix = dict[Callable[[Scene, FaultRates, random.Random], Lesson], float]
"""Kinds of lessons and their weights."""

_EVERYTHING: Mix = {
    _plain: 0.25,
    _step_by_step: 0.35,
    _invented: 0.1,
    _question: 0.2,
    _question_with_description: 0.05,
    _split: 0.05,
}
_DESCRIBE: Mix = {_plain: 0.5, _step_by_step: 0.35, _invented: 0.15}
_LOOK: Mix = {_confirmed: 0.6, _found: 0.3, _question: 0.1}
_ASK: Mix = {_confirmed: 0.4, _found: 0.1, _question: 0.4, _asked: 0.1}
_SPLIT: Mix = {_split_anothers: 1.0}
_WITH_DESCRIPTION: Mix = {
    _question_with_description: 0.5,
    _description_repeated: 0.25,
    _step_by_step_with_description: 0.25,
}

COURSES = {
    "language": Course("language", (_EVERYTHING,), FaultRates(companion=0.7, careful_companion=0.62)),
    "looking": Course("looking", (_LOOK,), FaultRates()),
    # Batches of one kind: beside descriptions, the few tokens of short answers would not count, and short prompts
    # would be padded to the length of those with a description.
    "habits": Course(
        "habits",
        (_DESCRIBE, _SPLIT, _ASK, _DESCRIBE, _SPLIT, _WITH_DESCRIPTION, _DESCRIBE),
        FaultRates(careful_companion=0.8),
    ),
    "practice": Course(
        "practice", (_ASK, _SPLIT, _DESCRIBE, _ASK, _SPLIT, _DESCRIBE, _ASK, _WITH_DESCRIPTION), FaultRates()
    ),
}
"""What to say about a picture; to find one thing in it; then the habits of captions, the careful companion more often
than it is to be, as it is learned slowly; and everything in its proportions, with much practice in questions."""
