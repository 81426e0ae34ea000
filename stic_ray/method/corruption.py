"""The corruption that makes a picture harder to describe (STIC section 4.1).

`draw_corruption` decides, `corrupt` does it and nothing else does, and `pixel_change` measures what it did: the
row of a pair stores the measured effect, so that a corruption which never happened cannot go unnoticed.
"""

import random
from typing import TypedDict

import numpy as np
from PIL import Image, ImageEnhance

from stic_ray.core.config import PreferencesConfig


class Corruption(TypedDict):
    """What is done to an image; the fields of schemas.CORRUPTION."""

    kind: str
    shorter_side_px: int | None
    brightness_factor: float | None
    hue_shift_turns: float | None
    brightness_first: bool | None
    strength: float | None


def draw_corruption(generator: random.Random, config: PreferencesConfig) -> Corruption:
    """Draw low resolution or colour jitter, with its parameters."""
    if generator.random() < config.low_resolution_share:
        return low_resolution(config.low_resolution_px)
    return Corruption(
        kind="colour_jitter",
        shorter_side_px=None,
        brightness_factor=generator.uniform(1 - config.jitter_brightness, 1 + config.jitter_brightness),
        hue_shift_turns=generator.uniform(-config.jitter_hue, config.jitter_hue),
        brightness_first=generator.random() < 0.5,
        strength=None,
    )


def low_resolution(shorter_side_px: int) -> Corruption:
    """Return the corruption that shrinks the shorter side to so many pixels."""
    return Corruption(
        kind="low_resolution",
        shorter_side_px=shorter_side_px,
        brightness_factor=None,
        hue_shift_turns=None,
        brightness_first=None,
        strength=None,
    )


def corrupt(picture: Image.Image, corruption: Corruption) -> Image.Image:
    """Apply a corruption to an RGB picture and return a new one.

    Low resolution never enlarges: a picture whose shorter side is already that small comes back unchanged.
    """
    if corruption["kind"] == "low_resolution":
        assert corruption["shorter_side_px"] is not None, "low resolution needs its shorter side"
        return _shrink(picture, corruption["shorter_side_px"])
    factor, shift = corruption["brightness_factor"], corruption["hue_shift_turns"]
    assert factor is not None and shift is not None, "colour jitter needs its factor and shift"
    if corruption["brightness_first"]:
        return _shift_hue(ImageEnhance.Brightness(picture).enhance(factor), shift)
    return ImageEnhance.Brightness(_shift_hue(picture, shift)).enhance(factor)


def pixel_change(clean: Image.Image, corrupted: Image.Image) -> float:
    """Return the mean absolute difference of two RGB pictures, on the scale 0 to 255.

    A picture of another size is brought to the clean one's size first, as every model's processor would.
    """
    if corrupted.size != clean.size:
        corrupted = corrupted.resize(clean.size, Image.Resampling.BICUBIC)
    difference = np.asarray(clean, dtype=np.int16) - np.asarray(corrupted, dtype=np.int16)
    return float(np.abs(difference).mean())


def _shrink(picture: Image.Image, shorter_side_px: int) -> Image.Image:
    scale = shorter_side_px / min(picture.size)
    if scale >= 1:
        return picture.copy()
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def _shift_hue(picture: Image.Image, turns: float) -> Image.Image:
    if round(turns * 256) == 0:
        return picture.copy()  # the way to HSV and back would change pixels by rounding alone
    hue, saturation, value = picture.convert("HSV").split()
    shifted = (np.asarray(hue, dtype=np.int16) + round(turns * 256)) % 256
    return Image.merge("HSV", (Image.fromarray(shifted.astype(np.uint8)), saturation, value)).convert("RGB")
