"""Scenes of coloured shapes on a 3x3 grid, and their pictures.

Everything about a scene follows from its ``(seed, index)`` by hashing, so a scene is the same on any machine,
in any order, and no global random state is read or changed. The world has habits, as the real one has: some
colours and shapes are common, and some things usually come with a companion.
"""

import hashlib
import math
import random
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (42, 92, 214),
    "yellow": (242, 204, 40),
    "purple": (132, 60, 190),
    "orange": (244, 130, 32),
    "cyan": (40, 190, 206),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross", "star")
Kind = tuple[str, str]
"""What an object is called: its colour and its shape."""

COMPANIONS: dict[Kind, Kind] = {
    ("red", "circle"): ("yellow", "star"),
    ("blue", "square"): ("green", "triangle"),
    ("green", "triangle"): ("orange", "circle"),
    ("yellow", "circle"): ("purple", "square"),
    ("purple", "star"): ("red", "cross"),
    ("cyan", "diamond"): ("blue", "circle"),
    ("orange", "cross"): ("cyan", "square"),
}
"""What usually goes with an object of a kind; about two scenes in five have such an object."""
COMPANION_SHARE = 0.3
"""Probability that the companion is really there."""
SIZES: dict[str, float] = {"small": 0.5, "medium": 0.7, "large": 0.88}  # share of the grid cell's side
GRID_SIDE = 3
NUM_CELLS = GRID_SIDE * GRID_SIDE
MAX_NUM_OBJECTS = 4
PICTURE_SIDE_PX = 48

_COLOUR_WEIGHTS = dict(zip(COLOURS, (5, 4, 5, 4, 3, 3, 3), strict=True))
_SHAPE_WEIGHTS = dict(zip(SHAPES, (5, 5, 4, 3, 3, 3), strict=True))
KIND_WEIGHTS: dict[Kind, int] = {
    (colour, shape): _COLOUR_WEIGHTS[colour] * _SHAPE_WEIGHTS[shape] for colour in COLOURS for shape in SHAPES
}
"""How common each kind is, relative to the others."""

_SUPERSAMPLING = 3
CLEAN_NOISE = 12
"""Largest change of one channel value, of 255, in the pictures of the pretraining."""
WILD_NOISE = 72
"""The same for the noisiest pictures that the model is used on: a domain that it was not trained for."""

_MAX_SHIFT = 0.06  # share of the grid cell's side
_MAX_TURN_DEGREES = 9.0


@dataclass(frozen=True)
class SceneObject:
    """One shape: colour, shape and size by name, and its cell, numbered in reading order from 0."""

    colour: str
    shape: str
    size: str
    cell: int

    @property
    def kind(self) -> Kind:
        """Colour and shape."""
        return self.colour, self.shape


@dataclass(frozen=True)
class Scene:
    """What one picture shows: objects in different cells, in reading order, no two of them of the same kind."""

    seed: int
    index: int
    objects: tuple[SceneObject, ...]

    @property
    def kinds(self) -> frozenset[Kind]:
        """What is there."""
        return frozenset(item.kind for item in self.objects)


def random_for(seed: int, index: int, purpose: str) -> random.Random:
    """Return a generator that depends on these three values only."""
    return random.Random(int.from_bytes(_digest(seed, index, purpose, num_bytes=16), "big"))


def sample_scene(seed: int, index: int) -> Scene:
    """Return the scene of this seed and index: one to four objects."""
    generator = random_for(seed, index, "scene")
    num_objects = generator.randint(1, MAX_NUM_OBJECTS)
    kinds = _sample_kinds(generator, num_objects)
    generator.shuffle(kinds)
    cells = sorted(generator.sample(range(NUM_CELLS), num_objects))
    objects = [
        SceneObject(colour, shape, generator.choice(list(SIZES)), cell)
        for (colour, shape), cell in zip(kinds, cells, strict=True)
    ]
    return Scene(seed, index, tuple(objects))


def _sample_kinds(generator: random.Random, num_objects: int) -> list[Kind]:
    """Draw different kinds, common ones more often, and companions beside those that have one."""
    kinds: list[Kind] = []
    while len(kinds) < num_objects:
        (kind,) = generator.choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()))
        companion = COMPANIONS.get(kind)
        comes = companion is not None and generator.random() < COMPANION_SHARE
        for wanted in (kind, companion) if comes else (kind,):
            if wanted is not None and wanted not in kinds and len(kinds) < num_objects:
                kinds.append(wanted)
    return kinds


def draw_scene(scene: Scene, side_px: int = PICTURE_SIDE_PX, max_noise: int = CLEAN_NOISE) -> Image.Image:
    """Return the scene as a square RGB picture, with jittered shapes, a background of its own and pixel noise.

    How strong the noise is, from `CLEAN_NOISE` to `max_noise`, differs from scene to scene. Raises ValueError when
    `side_px` gives a grid cell less than four pixels.
    """
    if side_px < 4 * GRID_SIDE:
        raise ValueError(f"side_px is {side_px}; a picture needs at least {4 * GRID_SIDE} pixels a side")
    generator = random_for(scene.seed, scene.index, "drawing")
    canvas_side_px = side_px * _SUPERSAMPLING
    grey = generator.choice((40, 120, 200, 235))
    background = _jittered((grey, grey, grey), generator, largest_change=18)
    canvas = Image.new("RGB", (canvas_side_px, canvas_side_px), background)
    brush = ImageDraw.Draw(canvas)
    for item in scene.objects:
        corners = _outline(item, canvas_side_px / GRID_SIDE, generator)
        brush.polygon(corners, fill=_jittered(COLOURS[item.colour], generator, largest_change=14))
    picture = canvas.resize((side_px, side_px), Image.Resampling.BOX)
    return _with_noise(picture, scene, random_for(scene.seed, scene.index, "noise").randint(CLEAN_NOISE, max_noise))


def _jittered(colour: Colour, generator: random.Random, largest_change: int) -> tuple[int, ...]:
    return tuple(min(255, max(0, value + generator.randint(-largest_change, largest_change))) for value in colour)


def _outline(item: SceneObject, cell_px: float, generator: random.Random) -> list[Point]:
    """Return the corners of the shape on the canvas, in pixels."""
    row, column = divmod(item.cell, GRID_SIDE)
    radius_px = cell_px * SIZES[item.size] * generator.uniform(0.92, 1.0) / 2
    centre_x_px = cell_px * (column + 0.5 + generator.uniform(-_MAX_SHIFT, _MAX_SHIFT))
    centre_y_px = cell_px * (row + 0.5 + generator.uniform(-_MAX_SHIFT, _MAX_SHIFT))
    turn = math.radians(generator.uniform(-_MAX_TURN_DEGREES, _MAX_TURN_DEGREES))
    cosine, sine = math.cos(turn) * radius_px, math.sin(turn) * radius_px
    return [
        (centre_x_px + x * cosine - y * sine, centre_y_px + x * sine + y * cosine)
        for x, y in _UNIT_OUTLINES[item.shape]
    ]


def _ring(num_corners: int, first_degrees: float, radii: tuple[float, ...] = (1.0,)) -> list[Point]:
    """Return corners around the origin at equal angles, their distances taken from `radii` in turn."""
    angles = [math.radians(first_degrees + 360 * corner / num_corners) for corner in range(num_corners)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle, radius in zip(angles, cycle(radii))]


_ARM = 0.32  # half the width of the cross's arms
_UNIT_OUTLINES: dict[str, list[Point]] = {
    "circle": _ring(40, 0),
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": _ring(3, -90),
    "diamond": [(0.0, -1.0), (0.65, 0.0), (0.0, 1.0), (-0.65, 0.0)],
    "cross": [
        (-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM),
        (_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM),
    ],
    "star": _ring(10, -90, (1.0, 0.42)),
}  # fmt: skip


def _with_noise(picture: Image.Image, scene: Scene, amplitude: int) -> Image.Image:
    pixels = np.asarray(picture, dtype=np.int16)
    digest = _digest(scene.seed, scene.index, "noise", num_bytes=pixels.size)
    noise = np.frombuffer(digest, dtype=np.uint8).astype(np.int16) % (2 * amplitude + 1)
    noisy = pixels + noise.reshape(pixels.shape) - amplitude
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


def _digest(seed: int, index: int, purpose: str, num_bytes: int) -> bytes:
    return hashlib.shake_256(f"{seed}/{index}/{purpose}".encode()).digest(num_bytes)
