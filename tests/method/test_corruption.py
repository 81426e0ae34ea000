"""The corruption really happens, as it is recorded. (STIC's released code never applies its own.)"""

import colorsys
import random
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stic_ray.core.preferences import PreferencesConfig
from stic_ray.method.corruption import Corruption, corrupt, draw_corruption, low_resolution, pixel_change
from tests.method.pictures import photo

CONFIG = PreferencesConfig()
DRAWN = [draw_corruption(random.Random(seed), CONFIG) for seed in range(2000)]


def jitter(factor: float, turns: float, *, brightness_first: bool = True) -> Corruption:
    return Corruption(
        kind="colour_jitter",
        shorter_side_px=None,
        brightness_factor=factor,
        hue_shift_turns=turns,
        brightness_first=brightness_first,
    )


def pixels(picture: Image.Image) -> Any:
    return np.asarray(picture, dtype=float)


@pytest.mark.parametrize("seed", range(40))
def test_a_drawn_corruption_changes_the_pixels(seed: int) -> None:
    """Fails if `corrupt` returned its input, as the released code did."""
    clean = photo(seed)
    before = pixels(clean)
    corrupted = corrupt(clean, DRAWN[seed])
    np.testing.assert_array_equal(pixels(clean), before, err_msg="the clean picture is left alone")
    assert corrupted.mode == "RGB"
    seen = corrupted.resize(clean.size, Image.Resampling.BICUBIC)
    change = np.abs(pixels(seen) - before).mean()
    assert change > 1.0, DRAWN[seed]
    assert pixel_change(clean, corrupted) == pytest.approx(change)


@pytest.mark.parametrize("seed", range(10))
def test_the_same_corruption_gives_the_same_picture(seed: int) -> None:
    np.testing.assert_array_equal(
        pixels(corrupt(photo(), DRAWN[seed])), pixels(corrupt(photo(), Corruption(**DRAWN[seed])))
    )


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 480), (27, 20)),
        ((480, 640), (20, 27)),
        ((400, 100), (80, 20)),
        ((100, 100), (20, 20)),
        ((21, 2000), (20, 1905)),
    ],
)
def test_low_resolution_brings_the_shorter_side_to_what_is_recorded(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    corrupted = corrupt(photo(width=size[0], height=size[1]), low_resolution(20))
    assert corrupted.size == expected


@pytest.mark.parametrize("size", [(20, 20), (10, 300), (64, 20)])
def test_low_resolution_never_enlarges(size: tuple[int, int]) -> None:
    clean = photo(width=size[0], height=size[1])
    corrupted = corrupt(clean, low_resolution(20))
    assert pixel_change(clean, corrupted) == 0.0
    assert corrupted is not clean


def jittered_by_hand(clean: Image.Image, corruption: Corruption) -> Any:
    """Brightness and hue one pixel at a time, with Python's own colour conversion."""

    def brighten(colour: tuple[float, float, float]) -> tuple[float, float, float]:
        red, green, blue = (min(1.0, channel * (corruption["brightness_factor"] or 0.0)) for channel in colour)
        return red, green, blue

    def turn(colour: tuple[float, float, float]) -> tuple[float, float, float]:
        hue, saturation, value = colorsys.rgb_to_hsv(*colour)
        return colorsys.hsv_to_rgb((hue + (corruption["hue_shift_turns"] or 0.0)) % 1.0, saturation, value)

    steps = (brighten, turn) if corruption["brightness_first"] else (turn, brighten)
    changed = [steps[1](steps[0](tuple(colour))) for colour in (pixels(clean) / 255).reshape(-1, 3)]
    return np.array(changed).reshape(*pixels(clean).shape) * 255


@pytest.mark.parametrize(
    ("factor", "turns"), [(0.5, 0.0), (1.5, 0.0), (1.0, 1 / 3), (1.0, -1 / 3), (0.7, 0.3), (1.4, -0.2), (1.5, 0.25)]
)
@pytest.mark.parametrize("brightness_first", [True, False])
def test_jitter_does_what_is_recorded(factor: float, turns: float, brightness_first: bool) -> None:
    clean = photo(3, width=24, height=18)
    corruption = jitter(factor, turns, brightness_first=brightness_first)
    difference = np.abs(pixels(corrupt(clean, corruption)) - jittered_by_hand(clean, corruption))
    assert difference.mean() < 3.0, "8-bit steps of hue and saturation"


def test_the_recorded_order_of_jitter_matters() -> None:
    """A pure blue made half as bright again is cut off at 255; turned first, the cut falls elsewhere."""
    clean = Image.new("RGB", (8, 8), (100, 180, 250))
    first = corrupt(clean, jitter(1.5, 0.3, brightness_first=True))
    last = corrupt(clean, jitter(1.5, 0.3, brightness_first=False))
    assert pixel_change(first, last) > 1.0


def test_a_third_of_a_turn_makes_red_green_and_green_blue() -> None:
    clean = Image.new("RGB", (2, 1), (255, 0, 0))
    clean.putpixel((1, 0), (0, 255, 0))
    np.testing.assert_allclose(
        pixels(corrupt(clean, jitter(1.0, 1 / 3)))[0], [[0, 255, 0], [0, 0, 255]], atol=8, rtol=0
    )


def test_jitter_of_no_brightness_and_no_hue_changes_nothing() -> None:
    """So that `pixel_change` is 0 and the row is rejected, not kept with a rounding error for a corruption."""
    assert pixel_change(photo(), corrupt(photo(), jitter(1.0, 0.0))) == 0.0


def test_parameters_are_drawn_from_the_whole_of_their_ranges() -> None:
    jitters = [drawn for drawn in DRAWN if drawn["kind"] == "colour_jitter"]
    factors = [drawn["brightness_factor"] or 0.0 for drawn in jitters]
    shifts = [drawn["hue_shift_turns"] or 0.0 for drawn in jitters]
    assert 0.5 <= min(factors) < 0.52 and 1.48 < max(factors) <= 1.5
    assert -0.3 <= min(shifts) < -0.29 and 0.29 < max(shifts) <= 0.3
    assert 0.45 < np.mean([bool(drawn["brightness_first"]) for drawn in jitters]) < 0.55
    assert all(drawn["shorter_side_px"] is None for drawn in jitters)


def test_the_two_kinds_are_half_and_half_and_complete() -> None:
    """2,000 draws of a half: 1,000 with a standard deviation of 22."""
    low = [drawn for drawn in DRAWN if drawn["kind"] == "low_resolution"]
    assert {drawn["kind"] for drawn in DRAWN} == {"low_resolution", "colour_jitter"}
    assert 910 < len(low) < 1090
    assert {drawn["shorter_side_px"] for drawn in low} == {20}
    assert all(drawn["brightness_factor"] is None and drawn["hue_shift_turns"] is None for drawn in low)


@pytest.mark.parametrize(("share", "kind"), [(1.0, "low_resolution"), (0.0, "colour_jitter")])
def test_the_settings_are_followed(share: float, kind: str) -> None:
    config = PreferencesConfig(low_resolution_share=share, low_resolution_px=7, jitter_brightness=0.1, jitter_hue=0.05)
    drawn = [draw_corruption(random.Random(seed), config) for seed in range(200)]
    assert {one["kind"] for one in drawn} == {kind}
    for one in drawn:
        assert one["shorter_side_px"] in (None, 7)
        assert one["brightness_factor"] is None or 0.9 <= one["brightness_factor"] <= 1.1
        assert one["hue_shift_turns"] is None or abs(one["hue_shift_turns"]) <= 0.05


def test_the_change_is_the_mean_over_all_channels() -> None:
    """(3 + 0 + 6 + 0 + 0 + 255) / 6 = 44; differences of unsigned bytes must not wrap around."""
    clean, other = Image.new("RGB", (2, 1), (10, 20, 30)), Image.new("RGB", (2, 1), (13, 20, 24))
    clean.putpixel((1, 0), (0, 0, 0))
    other.putpixel((1, 0), (0, 0, 255))
    assert pixel_change(clean, other) == pixel_change(other, clean) == 44.0
    assert pixel_change(clean, clean) == 0.0
