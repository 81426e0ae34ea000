"""Corruptions of one number: what they do is what they have always done, more of it with more strength."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stic_ray.core.preferences import GRADED
from stic_ray.method.corruption import Corruption, corrupt, graded, pixel_change
from tests.method.pictures import photo

GOLDEN = Path(__file__).with_name("golden")
"""`corrupt(photo(3), graded(kind, 0.4, 7))` of each kind as it was first made."""
KINDS: Any = sorted(GRADED)


def pixels(picture: Image.Image) -> Any:
    return np.asarray(picture, dtype=float)


def done(kind: Any, strength: float, seed: int = 7, clean: Image.Image | None = None) -> Image.Image:
    return corrupt(clean or photo(3), graded(kind, strength, seed))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_looks_as_it_always_did(kind: str) -> None:
    """Within what another version of Pillow may round otherwise."""
    golden = Image.open(GOLDEN / f"{kind}.png").convert("RGB")
    found = done(kind, 0.4)
    assert found.size == golden.size and found.mode == "RGB"
    difference = np.abs(pixels(found) - pixels(golden))
    assert difference.mean() < 0.5 and difference.max() <= 8


@pytest.mark.parametrize("kind", KINDS)
def test_strength_goes_from_nearly_nothing_to_nearly_everything(kind: str) -> None:
    clean = photo(3)
    before = pixels(clean)
    changes = [pixel_change(clean, done(kind, strength)) for strength in (0.0, 0.25, 0.5, 1.0)]
    assert changes[0] < 1 and changes == sorted(changes) and changes[-1] > 30
    np.testing.assert_array_equal(pixels(clean), before, err_msg="the clean picture is left alone")
    left = pixels(done(kind, 1.0))
    is_noise = np.corrcoef(before.ravel(), left.ravel())[0, 1] < 0.45
    assert is_noise if kind == "diffusion_noise" else left.std((0, 1)).max() < 10, "all of one colour"


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_alone_gives_the_picture_again(kind: str) -> None:
    recorded = graded(kind, 0.7, 11)
    again = Corruption(**recorded)
    assert (recorded["kind"], recorded["strength"], recorded["seed"]) == (kind, 0.7, 11)
    np.testing.assert_array_equal(pixels(corrupt(photo(), recorded)), pixels(corrupt(photo(), again)))


@pytest.mark.parametrize("kind", ["diffusion_noise", "crop", "mask"])
def test_the_seed_decides_on_noise_place_and_side(kind: str) -> None:
    assert pixel_change(done(kind, 0.5, seed=1), done(kind, 0.5, seed=5)) > 5


@pytest.mark.parametrize(("step", "signal", "noise"), [(500, 0.863, 0.505), (800, 0.467, 0.884), (999, 0.285, 0.959)])
def test_noise_has_the_share_of_povids_schedule(step: int, signal: float, noise: float) -> None:
    """Of a grey picture only the noise is left to vary, and the mean moves to CLIP's by the share of the signal."""
    clean = Image.new("RGB", (300, 200), (140, 140, 140))
    found = pixels(done("diffusion_noise", step / 1000, clean=clean)) / 255
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    inside = (found > 0) & (found < 1)
    np.testing.assert_allclose(np.median(found, (0, 1)), mean + signal * (140 / 255 - mean), atol=0.01)
    assert np.quantile(found[..., 0], 0.7) - np.quantile(found[..., 0], 0.3) == pytest.approx(
        1.0488 * noise * std[0], rel=0.04
    ), "of a normal distribution"
    assert inside.mean() > 0.9


def test_noise_is_made_at_the_size_that_a_model_sees() -> None:
    """Else a processor that shrinks a photograph of megapixels would average it away."""
    large = photo(width=900, height=700)
    assert done("diffusion_noise", 0.5, clean=large).size == (432, 336)
    assert done("diffusion_noise", 0.5, clean=photo()).size == photo().size
    assert graded("diffusion_noise", 0.5, 0)["shorter_side_px"] == 336


@pytest.mark.parametrize(("strength", "area"), [(1.0, 0.01), (0.5, 0.1), (0.35, 0.2), (0.0, 1.0)])
def test_a_crop_is_a_part_of_that_area_enlarged(strength: float, area: float) -> None:
    """In a picture whose colours say where they are."""
    y, x = np.mgrid[0:200, 0:250]
    clean = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    found = pixels(done("crop", strength, clean=clean))
    width, height = (np.ptp(found[..., channel]) + 1 for channel in (0, 1))
    assert width * height / (200 * 250) == pytest.approx(area, rel=0.15)
    assert found.shape == (200, 250, 3)


@pytest.mark.parametrize("seed", range(8))
def test_a_mask_hides_that_share_behind_the_mean_colour(seed: int) -> None:
    clean = photo(width=100, height=60)
    found, before = pixels(done("mask", 0.3, seed, clean)), pixels(clean)
    hidden = (found == np.round(before.mean((0, 1)))).all(-1)
    assert hidden.mean() == pytest.approx(0.3, abs=0.01)
    np.testing.assert_array_equal(found[~hidden], before[~hidden])
    assert hidden.all(0).mean() == pytest.approx(0.3) or hidden.all(1).mean() == pytest.approx(0.3), "from a side on"


def test_a_blur_is_as_wide_as_its_strength_says() -> None:
    """A thin line spreads to a Gaussian of s^3 of the shorter side: 0.5^3 of 80 px are 10 px."""
    line = np.zeros((80, 161, 3), dtype=np.uint8)
    line[:, 80] = 255
    found = pixels(done("blur", 0.5, clean=Image.fromarray(line)))[40, :, 0]
    places = np.arange(161) - 80
    assert np.sqrt((found * places**2).sum() / found.sum()) == pytest.approx(10, rel=0.15)
