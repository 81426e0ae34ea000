"""True sentences, questions and answers about a scene.

The wording and the choice of object follow from the scene's ``(seed, index)``: the same scene is always
described and asked about in the same words.
"""

import random
from dataclasses import dataclass
from typing import Literal, get_args

from stic_ray.toyworld.scenes import (
    COLOURS,
    GRID_SIDE,
    MAX_NUM_OBJECTS,
    SHAPES,
    Scene,
    SceneObject,
    random_for,
    sample_scene,
)

QuestionKind = Literal["colour", "count", "where", "is_there"]
QUESTION_KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)
NUM_CHOICES = 4
SHORT_ANSWER_HINT = "Answer with one word or a short phrase."
DESCRIPTION_REQUESTS: tuple[str, ...] = (
    "Describe the picture.",
    "What does the picture show?",
    "Describe every shape in the image and say where it is.",
)

_NUMBERS = ("zero", "one", "two", "three", "four")
_PLACES = tuple(
    "centre" if (row, column) == ("middle", "centre") else f"{row} {column}"
    for row in ("top", "middle", "bottom")
    for column in ("left", "centre", "right")
)
# Words that requests are made of; the tokenizer learns them beside the sentences about scenes.
_GENERAL_SENTENCES = (
    "Please look at the image step by step and give a detailed description of it.",
    "Describe the main objects, their attributes, colours, sizes, positions and relations to each other.",
    "First describe the overall scene and the background, then the details in the foreground.",
    "Imagine and mention things that could be in the image but are not there, in a vivid way.",
    "Which of these is right? Answer with the letter of the correct option: A, B, C or D.",
    "Use the description of the image to answer the question with only what you can see.",
)


@dataclass(frozen=True)
class ShortQuestion:
    """A question and every answer that counts as right, the usual one first."""

    kind: QuestionKind
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question, the answers to choose from, and which of them is right."""

    kind: QuestionKind
    text: str
    choices: tuple[str, ...]
    answer_index: int


def describe(scene: Scene) -> str:
    """A few true sentences: how many shapes, each with size, colour and place, and how two of them lie."""
    generator = random_for(scene.seed, scene.index, "description")
    sentences = [_opening(len(scene.objects), generator)]
    sentences += [_object_sentence(item, generator) for item in scene.objects]
    if len(scene.objects) > 1:
        sentences.append(_relation_sentence(*generator.sample(scene.objects, 2)))
    if generator.random() < 0.5:
        colour, shape = _absent_kind(scene, generator)
        sentences.append(f"There is no {colour} {shape}.")
    return " ".join(sentences)


def ask_short(scene: Scene, kind: QuestionKind) -> ShortQuestion:
    """A question of this kind about the scene, to be answered in a word or two."""
    generator = random_for(scene.seed, scene.index, f"question {kind}")
    match kind:
        case "colour":
            return _ask_colour(scene, generator)
        case "count":
            return _ask_count(scene, generator)
        case "where":
            return _ask_where(scene, generator)
        case "is_there":
            return _ask_is_there(scene, generator)


def ask_choice(scene: Scene, kind: QuestionKind) -> ChoiceQuestion:
    """The question of :func:`ask_short` with answers to choose from, in a shuffled order."""
    short = ask_short(scene, kind)
    generator = random_for(scene.seed, scene.index, f"choices {kind}")
    right = short.answers[0]
    wrong = [answer for answer in _possible_answers(kind) if answer != right]
    choices = [right, *generator.sample(wrong, min(len(wrong), NUM_CHOICES - 1))]
    generator.shuffle(choices)
    return ChoiceQuestion(kind, short.text, tuple(choices), choices.index(right))


def sample_sentences(seed: int, first_index: int, num_scenes: int) -> list[str]:
    """Text to train a tokenizer on: general requests, and what is said and asked about this many scenes."""
    sentences = [*_GENERAL_SENTENCES, *DESCRIPTION_REQUESTS, SHORT_ANSWER_HINT]
    for index in range(first_index, first_index + num_scenes):
        scene = sample_scene(seed, index)
        sentences.append(describe(scene))
        for kind in QUESTION_KINDS:
            question = ask_short(scene, kind)
            sentences.append(f"{question.text} {question.answers[0]}")
    return sentences


def _ask_colour(scene: Scene, generator: random.Random) -> ShortQuestion:
    item = generator.choice(scene.objects)
    is_only_one = sum(other.shape == item.shape for other in scene.objects) == 1
    name = f"the {item.shape}" if is_only_one else f"the shape at the {_place(item)}"
    return ShortQuestion("colour", f"What colour is {name}?", (item.colour,))


def _ask_count(scene: Scene, generator: random.Random) -> ShortQuestion:
    # Of one kind there is mostly just one; asking for all shapes keeps the answers mixed.
    shape = "shape" if generator.random() < 0.7 else generator.choice(scene.objects).shape
    count = sum(shape in ("shape", item.shape) for item in scene.objects)
    return ShortQuestion("count", f"How many {_plural(shape)} are there?", (_NUMBERS[count], str(count)))


def _ask_where(scene: Scene, generator: random.Random) -> ShortQuestion:
    item = generator.choice(scene.objects)
    place = _place(item)
    return ShortQuestion("where", f"Where is the {item.colour} {item.shape}?", (place, f"at the {place}"))


def _ask_is_there(scene: Scene, generator: random.Random) -> ShortQuestion:
    answer = generator.choice(("yes", "no"))
    if answer == "yes":
        item = generator.choice(scene.objects)
        colour, shape = item.colour, item.shape
    else:
        colour, shape = _absent_kind(scene, generator)
    return ShortQuestion("is_there", f"Is there {_with_article(f'{colour} {shape}')}?", (answer,))


def _possible_answers(kind: QuestionKind) -> tuple[str, ...]:
    match kind:
        case "colour":
            return tuple(COLOURS)
        case "count":
            return _NUMBERS[1 : MAX_NUM_OBJECTS + 1]
        case "where":
            return _PLACES
        case "is_there":
            return ("yes", "no")


def _opening(num_objects: int, generator: random.Random) -> str:
    amount = f"{_NUMBERS[num_objects]} {'shape' if num_objects == 1 else 'shapes'}"
    verb = "is" if num_objects == 1 else "are"
    return generator.choice((f"The picture shows {amount}.", f"There {verb} {amount} in the image."))


def _object_sentence(item: SceneObject, generator: random.Random) -> str:
    name = _with_article(f"{item.size} {item.colour} {item.shape}")
    if generator.random() < 0.5:
        return f"At the {_place(item)} there is {name}."
    return f"{name.capitalize()} is at the {_place(item)}."


def _relation_sentence(first: SceneObject, second: SceneObject) -> str:
    if first.row != second.row:
        relation = "above" if first.row < second.row else "below"
    else:
        relation = "to the left of" if first.column < second.column else "to the right of"
    return f"The {first.colour} {first.shape} is {relation} the {second.colour} {second.shape}."


def _absent_kind(scene: Scene, generator: random.Random) -> tuple[str, str]:
    """A colour and a shape that no object of the scene has together."""
    present = {(item.colour, item.shape) for item in scene.objects}
    return generator.choice([(c, s) for c in COLOURS for s in SHAPES if (c, s) not in present])


def _place(item: SceneObject) -> str:
    return _PLACES[item.row * GRID_SIDE + item.column]


def _plural(shape: str) -> str:
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def _with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
