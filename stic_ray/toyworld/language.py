"""Questions about a scene with their true answers, and the toy world's prompt set."""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import yaml

from stic_ray.toyworld.scenes import COMPANIONS, KIND_WEIGHTS, Kind, Scene, random_for

QuestionKind = Literal["colour", "count", "where", "is_there"]
QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)
Distractor = Literal["random", "popular", "adversarial"]
DISTRACTORS: tuple[Distractor, ...] = get_args(Distractor)

PROMPTS_FILE = Path(__file__).with_name("prompts.yaml")
PROMPTS = yaml.safe_load(PROMPTS_FILE.read_text(encoding="utf-8"))

NUMBERS = ("zero", "one", "two", "three", "four")
PLACES = tuple(
    "centre" if (row, column) == ("middle", "centre") else f"{row} {column}"
    for row in ("top", "middle", "bottom")
    for column in ("left", "centre", "right")
)


@dataclass(frozen=True)
class Question:
    """A question and its true answers, the usual one first."""

    kind: QuestionKind
    text: str
    answers: tuple[str, ...]


def name_of(kind: Kind) -> str:
    """Return what an object of the kind is called, such as "red circle"."""
    return " ".join(kind)


def brief(question: str) -> str:
    """Return a question in the form that asks for a short answer."""
    return PROMPTS["answer_briefly"].replace("{question}", question)


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
    return Question("is_there", presence_text(kind), ("yes" if kind in scene.kinds else "no",))


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


def presence_text(kind: Kind) -> str:
    """Return the question whether an object of the kind is there, as text."""
    return f"Is there {with_article(name_of(kind))} in the picture?"


def claim_text(kind: Kind, cell: int) -> str:
    """Return the question whether an object of the kind is at a place, as text."""
    return f"Is there {with_article(name_of(kind))} at the {PLACES[cell]}?"


def ask_claim(kind: Kind, cell: int, scene: Scene) -> Question:
    """Return the question whether an object of the kind is at a place."""
    is_there = any((item.kind, item.cell) == (kind, cell) for item in scene.objects)
    return Question("is_there", claim_text(kind, cell), ("yes" if is_there else "no",))


def caption_of(scene: Scene) -> str:
    """Return the caption that the scene's picture has in a pool with captions: true, of half of the objects or of one.

    Which objects are named follows from the scene alone, in the form of a plain description.
    """
    generator, number = random_for(scene.seed, scene.index, "caption"), len(scene.objects)
    num_named = max(1, generator.choice((number // 2, (number + 1) // 2)))
    named = sorted(generator.sample(scene.objects, num_named), key=lambda item: item.cell)
    return sentence(phrase(item.kind, item.cell) for item in named)


def sentence(phrases: Iterable[str]) -> str:
    """Return a description of its phrases."""
    text = ", ".join(phrases)
    return f"{text[0].upper()}{text[1:]}."


def phrase(kind: Kind, cell: int, size: str | None = None) -> str:
    """Return how a description names an object of the kind at its place."""
    name = f"{size} {name_of(kind)}" if size else name_of(kind)
    return f"{with_article(name)} at the {PLACES[cell]}"


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def with_article(name: str) -> str:
    """Return "a red circle" for "red circle"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
