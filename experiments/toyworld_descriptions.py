"""What the toy world's pretraining text says about a scene, faults included.

Descriptions come in three kinds, by what was asked for. A *plain* request is answered the way captions from the web
are: most objects left out, and what usually goes with the others added. A *step-by-step* request is answered fully,
but now and then an object is forgotten, and often the usual companion of another is added. A request to *invent* is
answered fully, with absent objects added. These faults are what self-training is to cure, and `FaultRates` are their
knobs.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass

from stic_ray.toyworld.language import PLACES, claim_text, phrase, sentence
from stic_ray.toyworld.scenes import COMPANIONS, KIND_WEIGHTS, NUM_CELLS, Scene, SceneObject


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
    forgotten: float = 0.2
    """Objects that a step-by-step description leaves out, each by itself, so that single samples differ."""
    careful_companion: float = 0.68
    """Step-by-step descriptions that add the companion: more than half, so that greedy decoding has it, and not all,
    so that some samples are right."""


def describe_fully(scene: Scene) -> str:
    """Return every object with size, colour, shape and place, in reading order: the whole truth."""
    return sentence(phrase(item.kind, item.cell, item.size) for item in scene.objects)


def describe_step_by_step(scene: Scene, rates: FaultRates, generator: random.Random) -> str:
    """Return the full description with the faults of a careful observer: something forgotten, a companion added."""
    named = [item for item in scene.objects if generator.random() >= rates.forgotten]
    named = named or [generator.choice(scene.objects)]
    phrases = [phrase(item.kind, item.cell, item.size) for item in named]
    suspect = _suspect(named, scene)
    if suspect is not None and generator.random() < rates.careful_companion:
        phrases.append(phrase(COMPANIONS[suspect.kind], _empty_cell_behind(scene, suspect.cell), suspect.size))
    return sentence(phrases)


def describe_plainly(scene: Scene, rates: FaultRates, generator: random.Random) -> str:
    """Return what a caption says: few objects, and a companion that is not there."""
    stops = generator.random() < rates.omission
    named = scene.objects[: rates.num_named] if stops else scene.objects
    phrases = [phrase(item.kind, item.cell) for item in named]
    suspect = _suspect(named, scene)
    if suspect is not None and generator.random() < rates.companion:
        phrases.append(phrase(COMPANIONS[suspect.kind], _empty_cell_behind(scene, suspect.cell)))
    return sentence(phrases)


def describe_inventively(scene: Scene, generator: random.Random) -> str:
    """Return the full description with one or two absent objects behind it, companions before others."""
    likely = [COMPANIONS[kind] for kind in sorted(scene.kinds) if COMPANIONS.get(kind, kind) not in scene.kinds]
    others = [kind for kind in KIND_WEIGHTS if kind not in scene.kinds and kind not in likely]
    num_invented = generator.randint(1, 2)
    invented = [*dict.fromkeys(likely), *generator.sample(others, 2)][:num_invented]
    cells = generator.sample(empty_cells(scene), num_invented)
    phrases = [phrase(item.kind, item.cell, item.size) for item in scene.objects]
    sizes = generator.choices([item.size for item in scene.objects], k=num_invented)
    phrases += [phrase(kind, cell, size) for kind, cell, size in zip(invented, cells, sizes, strict=True)]
    return sentence(phrases)


def split(description: str) -> str:
    """Return the yes/no questions of a description of ours, one a line: each thing at its place, without its size."""
    phrases = description.removesuffix(".").split(", ")
    questions = []
    for named in phrases:
        thing, _, place = named.partition(" at the ")
        colour, shape = thing.split()[-2:]
        questions.append(claim_text((colour, shape), PLACES.index(place)))
    return "\n".join(questions)


def _suspect(named: Iterable[SceneObject], scene: Scene) -> SceneObject | None:
    """Return the first named object whose usual companion is not there."""
    return next((item for item in named if COMPANIONS.get(item.kind, item.kind) not in scene.kinds), None)


def empty_cells(scene: Scene) -> list[int]:
    """Return the cells without an object, in reading order."""
    taken = {item.cell for item in scene.objects}
    return [cell for cell in range(NUM_CELLS) if cell not in taken]


def _empty_cell_behind(scene: Scene, cell: int) -> int:
    """Return the next empty cell in reading order, from the start again behind the last one."""
    return min(empty_cells(scene), key=lambda empty: (empty - cell) % NUM_CELLS)
