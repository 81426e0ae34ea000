"""Scenes follow from their seed and index, and pictures show them."""

import io
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from stic_ray.toyworld.scenes import (
    COLOURS,
    COMPANIONS,
    MAX_NUM_OBJECTS,
    NUM_CELLS,
    PICTURE_SIDE_PX,
    SHAPES,
    Scene,
    SceneObject,
    draw_scene,
    sample_scene,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(5, index) for index in range(3000)]


def test_objects_are_in_different_cells_of_different_kinds_in_reading_order(scenes: list[Scene]) -> None:
    for scene in scenes:
        cells = [item.cell for item in scene.objects]
        assert 1 <= len(cells) <= MAX_NUM_OBJECTS
        assert cells == sorted(set(cells)) and max(cells) < NUM_CELLS
        assert len(scene.kinds) == len(cells)


def test_every_number_of_objects_cell_and_kind_comes_up(scenes: list[Scene]) -> None:
    assert set(Counter(len(scene.objects) for scene in scenes)) == {1, 2, 3, 4}
    assert {item.cell for scene in scenes for item in scene.objects} == set(range(NUM_CELLS))
    assert len(frozenset().union(*(scene.kinds for scene in scenes))) == len(COLOURS) * len(SHAPES)


def test_some_kinds_are_common_and_companions_come_along(scenes: list[Scene]) -> None:
    kinds = Counter(kind for scene in scenes for kind in scene.kinds)
    assert kinds["red", "circle"] > 1.5 * kinds["cyan", "cross"]
    roomy = [scene for scene in scenes if len(scene.objects) > 1 and ("red", "circle") in scene.kinds]
    share = sum(COMPANIONS["red", "circle"] in scene.kinds for scene in roomy) / len(roomy)
    elsewhere = sum(("yellow", "star") in scene.kinds for scene in scenes) / len(scenes)
    assert share > 0.2 > elsewhere


def test_a_scene_depends_on_seed_and_index_alone() -> None:
    assert sample_scene(1, 7) == sample_scene(1, 7)
    assert len({sample_scene(seed, index) for seed in range(3) for index in range(30)}) == 90
    assert len({sample_scene(seed, index).objects for seed in range(3) for index in range(30)}) > 85
    first, second = draw_scene(sample_scene(1, 7)), draw_scene(sample_scene(1, 7))
    assert first.tobytes() == second.tobytes()


def test_a_picture_shows_each_object_in_its_colour_and_cell() -> None:
    cell_px = PICTURE_SIDE_PX // 3
    for cell in range(NUM_CELLS):
        item = SceneObject("red", "square", "large", cell)
        pixels = np.asarray(draw_scene(Scene(0, cell, (item,))), dtype=float)
        cells = pixels.reshape(3, cell_px, 3, cell_px, 3).mean(axis=(1, 3)).reshape(NUM_CELLS, 3)
        redness = cells[:, 0] - cells[:, 1:].max(axis=1)
        assert redness.argmax() == cell and redness[cell] > 40


def test_pictures_of_the_same_objects_differ_in_background_and_noise() -> None:
    objects = (SceneObject("blue", "star", "small", 4),)
    corners = [np.asarray(draw_scene(Scene(0, index, objects)))[:3, :3].mean() for index in range(20)]
    assert np.ptp(corners) > 100
    flat = np.asarray(draw_scene(Scene(0, 0, objects)))[:8, :8, 0]
    assert flat.std() > 2


def test_sides_that_leave_no_room_are_refused() -> None:
    with pytest.raises(ValueError, match="side_px is 8"):
        draw_scene(sample_scene(0, 0), 8)


def test_pictures_survive_jpeg() -> None:
    buffer = io.BytesIO()
    picture = draw_scene(sample_scene(0, 3), 96)
    picture.save(buffer, "JPEG", quality=90)
    again = np.asarray(Image.open(buffer), dtype=float)
    assert np.abs(again - np.asarray(picture)).mean() < 12
