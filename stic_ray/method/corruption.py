"""The corruptions that make a picture harder to describe (STIC section 4.1, and others beside its two).

`draw_corruption` or `graded` decides, `corrupt` does it and nothing else does, and `pixel_change` measures what it
did: the row of a pair stores the measured effect, so that a corruption which never happened cannot go unnoticed.

Of the graded kinds, strength s from 0 to 1 means:

| kind | what is done | 0 | 1 |
|---|---|---|---|
| `diffusion_noise` | noise of step 1000 s of a diffusion (POVID, SeVa: 500 and 800) | a grey level | 3 x the picture |
| `crop` | a part of 0.01^s of the area, enlarged (mDPO: 1-20%, s from 1 to 0.35) | all | 1% of the area |
| `mask` | s of the picture, from one side on, in its mean colour (SIcog: 30%) | nothing | all |
| `blur` | Gaussian, sigma s^3 of the shorter side (SIcog: 3-5 px of 336, s 0.21-0.25) | nothing | one colour |
"""

import random
from typing import Any, TypedDict

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from stic_ray.core.preferences import CorruptionKind, GradedCorruption, PreferencesConfig

_NUM_STEPS = 1000
_BETAS = 1e-5 + (0.005 - 1e-5) / (1 + np.exp(-np.linspace(-6, 6, _NUM_STEPS)))
_KEPT = np.cumprod(1 - _BETAS)
"""Share of the picture in the variance of each step; POVID's schedule (sigmoid of a line, 1e-5 to 0.005)."""
_NOISED_SIDE_PX = 336
"""Noise is seen as it is made only where no processor shrinks the picture behind it; CLIP's towers take 336 px."""
_CLIP_MEAN, _CLIP_STD = (
    np.array(values, dtype=np.float32) * 255
    for values in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
)
"""CLIP's normalisation: noise of 1 is one standard deviation of photographs, as in POVID's and SeVa's code."""
_SMALLEST_CROP = 0.01


class Corruption(TypedDict):
    """What is done to an image; the fields of schemas.CORRUPTION."""

    kind: CorruptionKind
    shorter_side_px: int | None
    brightness_factor: float | None
    hue_shift_turns: float | None
    brightness_first: bool | None
    strength: float | None
    seed: int | None


_NOTHING: dict[str, Any] = dict.fromkeys(Corruption.__annotations__)


def draw_corruption(generator: random.Random, config: PreferencesConfig) -> Corruption:
    """Draw low resolution or colour jitter, with its parameters."""
    kind = "low_resolution" if generator.random() < config.low_resolution_share else "colour_jitter"
    return draw_of_kind(kind, generator, config, config.strength)


def draw_of_kind(
    kind: CorruptionKind, generator: random.Random, config: PreferencesConfig, strength: float
) -> Corruption:
    """Draw what is open of a corruption; the graded kinds have this strength, the others their own settings."""
    match kind:
        case "low_resolution":
            return low_resolution(config.low_resolution_px)
        case "colour_jitter":
            return Corruption(
                **_NOTHING
                | {
                    "kind": kind,
                    "brightness_factor": generator.uniform(1 - config.jitter_brightness, 1 + config.jitter_brightness),
                    "hue_shift_turns": generator.uniform(-config.jitter_hue, config.jitter_hue),
                    "brightness_first": generator.random() < 0.5,
                }
            )
        case _:
            return graded(kind, strength, generator.getrandbits(32))


def low_resolution(shorter_side_px: int) -> Corruption:
    """Return the corruption that shrinks the shorter side to so many pixels."""
    return Corruption(**_NOTHING | {"kind": "low_resolution", "shorter_side_px": shorter_side_px})


def graded(kind: GradedCorruption, strength: float, seed: int) -> Corruption:
    """Return a corruption of a strength, 0 to 1; the seed decides on its noise, place or side."""
    side_px = _NOISED_SIDE_PX if kind == "diffusion_noise" else None
    return Corruption(**_NOTHING | {"kind": kind, "strength": strength, "seed": seed, "shorter_side_px": side_px})


def corrupt(picture: Image.Image, corruption: Corruption) -> Image.Image:
    """Apply a corruption to an RGB picture and return a new one.

    Low resolution never enlarges: a picture whose shorter side is already that small comes back unchanged.
    """
    strength, seed = corruption.get("strength") or 0.0, corruption.get("seed") or 0
    match corruption["kind"]:
        case "low_resolution":
            return _shrink(picture, corruption["shorter_side_px"])
        case "colour_jitter":
            return _jitter(picture, corruption)
        case "diffusion_noise":
            return _add_noise(_shrink(picture, corruption["shorter_side_px"]), strength, seed)
        case "crop":
            return _crop(picture, strength, random.Random(seed))
        case "mask":
            return _mask(picture, strength, random.Random(seed))
        case "blur":
            return picture.filter(ImageFilter.GaussianBlur(strength**3 * min(picture.size)))


def pixel_change(clean: Image.Image, corrupted: Image.Image) -> float:
    """Return the mean absolute difference of two RGB pictures, on the scale 0 to 255.

    A picture of another size is brought to the clean one's size first, as every model's processor would.
    """
    if corrupted.size != clean.size:
        corrupted = corrupted.resize(clean.size, Image.Resampling.BICUBIC)
    difference = np.asarray(clean, dtype=np.int16) - np.asarray(corrupted, dtype=np.int16)
    return float(np.abs(difference).mean())


def _shrink(picture: Image.Image, shorter_side_px: int | None) -> Image.Image:
    assert shorter_side_px is not None, "shrinking needs a shorter side"
    scale = shorter_side_px / min(picture.size)
    if scale >= 1:
        return picture.copy()
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BILINEAR)


def _jitter(picture: Image.Image, corruption: Corruption) -> Image.Image:
    factor, shift = corruption["brightness_factor"], corruption["hue_shift_turns"]
    assert factor is not None and shift is not None, "colour jitter needs its factor and shift"
    if corruption["brightness_first"]:
        return _shift_hue(ImageEnhance.Brightness(picture).enhance(factor), shift)
    return ImageEnhance.Brightness(_shift_hue(picture, shift)).enhance(factor)


def _shift_hue(picture: Image.Image, turns: float) -> Image.Image:
    if round(turns * 256) == 0:
        return picture.copy()  # the way to HSV and back would change pixels by rounding alone
    hue, saturation, value = picture.convert("HSV").split()
    shifted = (np.asarray(hue, dtype=np.int16) + round(turns * 256)) % 256
    return Image.merge("HSV", (Image.fromarray(shifted.astype(np.uint8)), saturation, value)).convert("RGB")


def _add_noise(picture: Image.Image, strength: float, seed: int) -> Image.Image:
    """Draw the picture at a step of the forward diffusion: sqrt(kept) x + sqrt(1 - kept) noise (DDPM equation 4)."""
    kept = _KEPT[min(round(strength * _NUM_STEPS), _NUM_STEPS - 1)]
    pixels = (np.asarray(picture, dtype=np.float32) - _CLIP_MEAN) / _CLIP_STD
    noise = np.random.default_rng(seed).standard_normal(pixels.shape, dtype=np.float32)
    noised = np.float32(np.sqrt(kept)) * pixels + np.float32(np.sqrt(1 - kept)) * noise
    return Image.fromarray(np.clip(np.rint(noised * _CLIP_STD + _CLIP_MEAN), 0, 255).astype(np.uint8))


def _crop(picture: Image.Image, strength: float, generator: random.Random) -> Image.Image:
    side = _SMALLEST_CROP ** (strength / 2)
    width, height = (max(1, round(each * side)) for each in picture.size)
    left, top = generator.randint(0, picture.width - width), generator.randint(0, picture.height - height)
    box = (left, top, left + width, top + height)
    return picture.resize(picture.size, Image.Resampling.BICUBIC, box=box)


def _mask(picture: Image.Image, strength: float, generator: random.Random) -> Image.Image:
    colour = np.asarray(picture).mean((0, 1))
    width, height = (round(side * strength) for side in picture.size)
    box = generator.choice(
        (
            (0, 0, width, picture.height),
            (picture.width - width, 0, picture.width, picture.height),
            (0, 0, picture.width, height),
            (0, picture.height - height, picture.width, picture.height),
        )
    )
    masked = picture.copy()
    masked.paste((round(colour[0]), round(colour[1]), round(colour[2])), box)
    return masked
