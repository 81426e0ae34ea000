"""What is said and asked about a scene.

Descriptions come in three kinds, by what was asked for. A *plain* request is answered the way captions from the web
are: most objects left out, and what usually goes with the others added. A *step-by-step* request is answered fully and
truly. A request to *invent* is answered fully, with absent objects added. These faults are what self-training is to
cure, and `FaultRates` are their knobs.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from stic_ray.toyworld.scenes import COMPANIONS, KIND_WEIGHTS, NUM_CELLS, Kind, Scene, random_for

QuestionKind = Literal["colour", "count", "where", "is_there"]
QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)
Distractor = Literal["random", "popular", "adversarial"]
DISTRACTORS: tuple[Distractor, ...] = get_args(Distractor)

NUMBERS = ("zero", "one", "two", "three", "four")
PLACES = tuple(
    "centre" if (row, column) == ("middle", "centre") else f"{row} {column}"
    for row in ("top", "middle", "bottom")
    for column in ("left", "centre", "right")
)


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


@dataclass(frozen=True)
class Question:
    """A question and its true answers, the usual one first."""

    kind: QuestionKind
    text: str
    answers: tuple[str, ...]


def name_of(kind: Kind) -> str:
    """Return what an object of the kind is called, such as "red circle"."""
    return " ".join(kind)


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


def ask(scene: Scene, kind: QuestionKind, generator: random.Random) -> Question:
    """Return a question of this kind with its true answers."""
    item = generator.choice(scene.objects)
    place = PLACES[item.cell]
    match kind:
        case "colour":
            is_only_one = sum(other.shape == item.shape for other in scene.objects) == 1
            name = f"the {item.shape}" if is_only_one else f"the shape at the {place}"
            return Question(kind, f"What colour is {name}?", (item.colour,))
        case "count":
            # Of one shape there is mostly just one; asking for all shapes keeps the answers mixed.
            shape = "shape" if generator.random() < 0.7 else item.shape
            count = sum(shape in ("shape", other.shape) for other in scene.objects)
            return Question(kind, f"How many {_plural(shape)} are there?", (NUMBERS[count], str(count)))
        case "where":
            return Question(kind, f"Where is the {name_of(item.kind)}?", (place, f"at the {place}"))
        case "is_there":
            distractor = generator.choice(DISTRACTORS)
            is_there = generator.random() < 0.5
            return ask_presence(item.kind if is_there else absent_kind(scene, distractor, generator), scene)


def ask_presence(kind: Kind, scene: Scene) -> Question:
    """Return the question whether an object of the kind is there."""
    return Question("is_there", _presence_text(kind), ("yes" if kind in scene.kinds else "no",))


def absent_kind(scene: Scene, distractor: Distractor, generator: random.Random) -> Kind:
    """Return a kind that is not there: any, a common one, or what usually goes with what is there (POPE's three).

    A scene without an absent companion gives a common kind for `adversarial`.
    """
    absent = [kind for kind in KIND_WEIGHTS if kind not in scene.kinds]
    if distractor == "random":
        return generator.choice(absent)
    companions = [COMPANIONS[kind] for kind in sorted(scene.kinds) if COMPANIONS.get(kind, kind) in absent]
    if distractor == "adversarial" and companions:
        return generator.choice(companions)
    return generator.choice(sorted(absent, key=lambda kind: -KIND_WEIGHTS[kind])[:5])


def told_answer(question: Question, scene: Scene, rates: FaultRates, generator: random.Random) -> str:
    """Return the answer in the base model's training text: the usual true one, or a wrong yes to a companion."""
    tempting = any(_presence_text(COMPANIONS[kind]) == question.text for kind in scene.kinds & COMPANIONS.keys())
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
    return f"{_with_article(name)} at the {PLACES[cell]}"


def _presence_text(kind: Kind) -> str:
    return f"Is there {_with_article(name_of(kind))} in the picture?"


def _empty_cells(scene: Scene) -> list[int]:
    taken = {item.cell for item in scene.objects}
    return [cell for cell in range(NUM_CELLS) if cell not in taken]


def _empty_cell_behind(scene: Scene, cell: int) -> int:
    """Return the next empty cell in reading order, from the start again behind the last one."""
    return min(_empty_cells(scene), key=lambda empty: (empty - cell) % NUM_CELLS)


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
