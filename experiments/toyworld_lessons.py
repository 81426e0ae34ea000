"""What the toy world's base model is pretrained on: pictures with requests and answers, faults included.

Descriptions come in three kinds, by what was asked for. A *plain* request is answered the way captions from the web
are: most objects left out, and what usually goes with the others added. A *step-by-step* request is answered fully and
truly. A request to *invent* is answered fully, with absent objects added. These faults are what self-training is to
cure, and `FaultRates` are their knobs.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from stic_ray.toyworld.language import (
    PLACES,
    PROMPTS,
    QUESTION_KINDS,
    Question,
    ask,
    brief,
    name_of,
    presence_text,
    with_article,
)
from stic_ray.toyworld.scenes import COMPANIONS, KIND_WEIGHTS, NUM_CELLS, Kind, Scene, random_for


@dataclass(frozen=True)
class FaultRates:
    """How often the text that the base model learns from is wrong.

    Faults below one half would be hidden by greedy decoding: the fault must be what is said most often.
    """

    omission: float = 0.9
    """Plain descriptions that stop after `num_named` objects."""
    num_named: int = 2
    companion: float = 0.85
    """Plain descriptions that add the usual companion of a named object when it is not there."""
    wrong_yes: float = 0.3
    """Questions after an absent companion that are answered with yes."""


def describe_fully(scene: Scene) -> str:
    """Return every object with size, colour, shape and place, in reading order: the whole truth."""
    return _sentence(_phrase(item.kind, item.cell, item.size) for item in scene.objects)


def describe_plainly(scene: Scene, rates: FaultRates, generator: random.Random) -> str:
    """Return what a caption says: few objects, and a companion that is not there."""
    stops = generator.random() < rates.omission
    named = scene.objects[: rates.num_named] if stops else scene.objects
    phrases = [_phrase(item.kind, item.cell) for item in named]
    suspect = next((item for item in named if COMPANIONS.get(item.kind, item.kind) not in scene.kinds), None)
    if suspect is not None and generator.random() < rates.companion:
        phrases.append(_phrase(COMPANIONS[suspect.kind], _empty_cell_behind(scene, suspect.cell)))
    return _sentence(phrases)


def describe_inventively(scene: Scene, generator: random.Random) -> str:
    """Return the full description with one or two absent objects behind it, companions before others."""
    likely = [COMPANIONS[kind] for kind in sorted(scene.kinds) if COMPANIONS.get(kind, kind) not in scene.kinds]
    others = [kind for kind in KIND_WEIGHTS if kind not in scene.kinds and kind not in likely]
    num_invented = generator.randint(1, 2)
    invented = [*dict.fromkeys(likely), *generator.sample(others, 2)][:num_invented]
    cells = generator.sample(_empty_cells(scene), num_invented)
    phrases = [_phrase(item.kind, item.cell, item.size) for item in scene.objects]
    sizes = generator.choices([item.size for item in scene.objects], k=num_invented)
    phrases += [_phrase(kind, cell, size) for kind, cell, size in zip(invented, cells, sizes, strict=True)]
    return _sentence(phrases)


def learnt_answer(question: Question, scene: Scene, rates: FaultRates, generator: random.Random) -> str:
    """Return the answer in the base model's training text: the usual true one, or a wrong yes to a companion."""
    tempting = any(presence_text(COMPANIONS[kind]) == question.text for kind in scene.kinds & COMPANIONS.keys())
    if question.answers == ("no",) and tempting and generator.random() < rates.wrong_yes:
        return "yes"
    return question.answers[0]


def sample_sentences(scenes: Iterable[Scene]) -> list[str]:
    """Return text to train a tokenizer on: every kind of description, question and answer about the scenes."""
    sentences = []
    for scene in scenes:
        generator = random_for(scene.seed, scene.index, "sentences")
        questions = [ask(scene, kind, generator) for kind in QUESTION_KINDS]
        sentences += [describe_plainly(scene, FaultRates(), generator), describe_inventively(scene, generator)]
        sentences += [f"{question.text} {answer}" for question in questions for answer in question.answers]
    return sentences


def _sentence(phrases: Iterable[str]) -> str:
    text = ", ".join(phrases)
    return f"{text[0].upper()}{text[1:]}."


def _phrase(kind: Kind, cell: int, size: str | None = None) -> str:
    name = f"{size} {name_of(kind)}" if size else name_of(kind)
    return f"{with_article(name)} at the {PLACES[cell]}"


def _empty_cells(scene: Scene) -> list[int]:
    taken = {item.cell for item in scene.objects}
    return [cell for cell in range(NUM_CELLS) if cell not in taken]


def _empty_cell_behind(scene: Scene, cell: int) -> int:
    """Return the next empty cell in reading order, from the start again behind the last one."""
    return min(_empty_cells(scene), key=lambda empty: (empty - cell) % NUM_CELLS)


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
    return Lesson(generator.choice(PROMPTS["step_by_step"]), describe_fully(scene))


def _invented(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    return Lesson(generator.choice(PROMPTS["hallucination"]), describe_inventively(scene, generator))


def _question(scene: Scene, rates: FaultRates, generator: random.Random) -> Lesson:
    question = ask(scene, generator.choice(QUESTION_KINDS), generator)
    return Lesson(brief(question.text), learnt_answer(question, scene, rates, generator))


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
