"""From bytes of any kind to the upright RGB picture; what cannot be used is a rejection and nothing else."""

import io
import json
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from datasets import Features
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from stic_ray.core.errors import Rejected
from stic_ray.core.schemas import PAIRS, Reason
from stic_ray.method.images import (
    ImageFacts,
    ImageLimits,
    decode,
    decode_for_storage,
    image_id,
    inspect,
)
from tests.method.pictures import (
    EXIF_ORIENTATION,
    FORMATS,
    HEIGHT,
    MODES,
    TURNS,
    WIDTH,
    animated,
    colours,
    encode,
    header_of_png,
    oriented,
    photo,
)

LIMITS = ImageLimits(min_side_px=8, max_pixels=100_000_000, max_aspect_ratio=20.0)
TIGHT = ImageLimits(min_side_px=8, max_pixels=100, max_aspect_ratio=20.0)
_READER = Features.from_dict(json.loads(PAIRS.metadata[b"huggingface"])["info"]["features"])["image"]
ROUNDED = ("CMYK in JPEG", "RGB in JPEG", "YCbCr")
"""Stored in another colour space than they are seen in."""
SAMPLES = sorted(
    file for file in Path(skimage.data.__file__).parent.iterdir() if file.suffix in (".png", ".jpg", ".gif", ".tif")
)


def reason_of(encoded: bytes, limits: ImageLimits = LIMITS) -> Reason:
    with pytest.raises(Rejected) as caught:
        inspect(encoded, limits)
    assert caught.value.message
    assert "\n" not in caught.value.message
    return caught.value.reason


def assert_every_reader_sees_the_same(encoded: bytes) -> None:
    """The stored bytes show the model's picture to whoever reads them by the features of our tables."""
    picture, stored = decode_for_storage(encoded)
    assert picture.mode == "RGB"
    with Image.open(io.BytesIO(stored)) as plain:
        assert plain.mode in ("RGB", "L")
        assert plain.format == "MPO" or getattr(plain, "n_frames", 1) == 1
    loaded = _READER.decode_example({"bytes": stored, "path": None})
    assert loaded.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(picture))
    np.testing.assert_array_equal(np.asarray(decode(encoded)), np.asarray(picture))


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_the_colours_that_a_viewer_sees(name: str) -> None:
    encoded, expected = MODES[name]()
    picture = decode(encoded)
    assert (picture.mode, picture.size) == ("RGB", (WIDTH, HEIGHT))
    np.testing.assert_allclose(np.asarray(picture, dtype=float), expected, atol=3 if name in ROUNDED else 1.5)
    assert_every_reader_sees_the_same(encoded)


def test_the_facts_are_those_of_the_file() -> None:
    assert inspect(MODES["CMYK"]()[0], LIMITS) == ImageFacts(WIDTH, HEIGHT, "TIFF", "CMYK")
    assert inspect(MODES["I;16"]()[0], LIMITS) == ImageFacts(WIDTH, HEIGHT, "PNG", "I;16")


@pytest.mark.parametrize("image_format", FORMATS)
def test_every_format_is_read(image_format: str) -> None:
    encoded = encode(Image.fromarray(colours()), image_format)
    facts = inspect(encoded, LIMITS)
    assert (facts.format, facts.width_px, facts.height_px) == (image_format, WIDTH, HEIGHT)
    assert np.abs(np.asarray(decode(encoded), dtype=float) - colours()).mean() < 6.0, "JPEG loses a little"
    assert_every_reader_sees_the_same(encoded)


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_pictures_are_turned_upright(image_format: str, orientation: int) -> None:
    encoded = oriented(image_format, orientation)
    upright = TURNS[orientation](np.asarray(decode(oriented(image_format, 1))))
    np.testing.assert_array_equal(np.asarray(decode(encoded)), upright)
    facts = inspect(encoded, LIMITS)
    assert (facts.height_px, facts.width_px) == upright.shape[:2]
    assert_every_reader_sees_the_same(encoded)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_an_orientation_in_xmp_shows_every_reader_the_same(image_format: str) -> None:
    encoded = oriented(image_format, 6, as_xmp=True)
    facts = inspect(encoded, LIMITS)
    assert (facts.width_px, facts.height_px) == decode(encoded).size
    assert_every_reader_sees_the_same(encoded)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_ignored(orientation: int) -> None:
    encoded = oriented("PNG", orientation)
    np.testing.assert_array_equal(np.asarray(decode(encoded)), colours())
    assert_every_reader_sees_the_same(encoded)


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(image_format: str) -> None:
    encoded = animated(image_format)
    with Image.open(io.BytesIO(encoded)) as image:
        assert getattr(image, "n_frames", 1) == 3, "the sample is an animation"
    assert decode(encoded).getcolors() == [(WIDTH * HEIGHT, (255, 0, 0))]
    assert_every_reader_sees_the_same(encoded)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP"])
def test_bytes_that_every_reader_shows_alike_are_kept_as_they_came(image_format: str) -> None:
    encoded = encode(photo(), image_format)
    assert decode_for_storage(encoded)[1] == encoded


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("picture", [photo(), photo().convert("L")], ids=["colour", "grey"])
@pytest.mark.parametrize("image_format", ["JPEG", "MPO"])
def test_a_photograph_of_a_phone_is_kept_as_it_came(image_format: str, picture: Image.Image, orientation: int) -> None:
    """As PNG it would take many times the space."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    more = {"save_all": True, "append_images": [photo(1, 48, 36)]} if image_format == "MPO" else {}
    encoded = encode(picture, image_format, exif=exif, **more)
    assert decode_for_storage(encoded)[1] == encoded
    assert_every_reader_sees_the_same(encoded)


@pytest.mark.parametrize("file", SAMPLES, ids=lambda file: file.name)
def test_ordinary_photographs_in_odd_modes(file: Path) -> None:
    """scikit-image's own samples. One of them is a TIFF that Pillow cannot read: a rejection, too."""
    encoded = file.read_bytes()
    if file.name == "multipage_rgb.tif":
        assert reason_of(encoded) in (Reason.UNSUPPORTED_FORMAT, Reason.UNDECODABLE_IMAGE)
        return
    facts = inspect(encoded, LIMITS)
    assert decode(encoded).size == (facts.width_px, facts.height_px)
    assert_every_reader_sees_the_same(encoded)


@pytest.mark.parametrize(
    ("encoded", "expected"),
    [
        (b"", Reason.EMPTY_FILE),
        (b"This is no picture, whatever its name says.\n", Reason.UNSUPPORTED_FORMAT),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", Reason.UNSUPPORTED_FORMAT),
        (encode(photo(), "ICO"), Reason.UNSUPPORTED_FORMAT),
        (encode(Image.new("RGB", (30_000, 10)), "PNG"), Reason.ASPECT_RATIO),
        (encode(Image.new("RGB", (10, 30_000)), "PNG"), Reason.ASPECT_RATIO),
        (encode(Image.new("RGB", (1, 1)), "PNG"), Reason.TOO_SMALL),
        (encode(Image.new("RGB", (7, 100)), "PNG"), Reason.TOO_SMALL),
    ],
    ids=["empty", "text", "svg", "icon", "30000 x 10", "10 x 30000", "1 x 1", "7 x 100"],
)
def test_what_cannot_be_used_is_rejected_with_its_reason(encoded: bytes, expected: Reason) -> None:
    assert reason_of(encoded) is expected


def test_limits_are_inclusive() -> None:
    encoded = encode(Image.new("RGB", (40, 8)), "PNG")
    assert inspect(encoded, ImageLimits(8, 320, 5.0)).width_px == 40
    assert reason_of(encoded, ImageLimits(9, 320, 5.0)) is Reason.TOO_SMALL
    assert reason_of(encoded, ImageLimits(8, 319, 5.0)) is Reason.TOO_MANY_PIXELS
    assert reason_of(encoded, ImageLimits(8, 320, 4.9)) is Reason.ASPECT_RATIO


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_picture_cut_off_in_the_middle_is_rejected(image_format: str) -> None:
    encoded = encode(photo(), image_format)
    cut = encoded[: len(encoded) // 2]
    assert reason_of(cut) in (Reason.UNDECODABLE_IMAGE, Reason.UNSUPPORTED_FORMAT)
    for function in (decode, decode_for_storage):
        with pytest.raises(Rejected):
            function(cut)


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (20_000, 20_000), (12_000, 12_000)])
def test_a_decompression_bomb_is_refused_by_its_header(width: int, height: int) -> None:
    """There are no pixels behind the header: trying to decode it would give another reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason_of(header_of_png(width, height)) is Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "BMP", "GIF"])
def test_the_pixel_limit_is_applied_before_anything_is_decoded(image_format: str) -> None:
    encoded = encode(photo(), image_format)
    cut = encoded[: len(encoded) // 2]
    assert reason_of(cut, TIGHT) is Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize("image_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_pixel_limit_holds_for_animations(image_format: str) -> None:
    assert reason_of(animated(image_format), TIGHT) is Reason.TOO_MANY_PIXELS


def test_an_animation_that_promises_too_much_is_refused_by_its_header() -> None:
    """A screen of 12,000 x 12,000 px around a small first frame."""
    encoded = bytearray(animated("GIF"))
    encoded[6:10] = struct.pack("<HH", 12_000, 12_000)
    assert reason_of(bytes(encoded)) is Reason.TOO_MANY_PIXELS


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_the_perceptual_hash_is_that_of_the_picture_as_it_is_seen(image_format: str) -> None:
    """It survives another size and encoding, and sees an upright picture whatever the file's orientation."""
    plain = inspect(encode(photo(), "PNG"), LIMITS, with_hash=True).perceptual_hash
    other = inspect(encode(photo().resize((192, 144)), image_format), LIMITS, with_hash=True).perceptual_hash
    stranger = inspect(encode(photo(seed=3), "PNG"), LIMITS, with_hash=True).perceptual_hash
    assert plain is not None and other is not None and stranger is not None
    assert ((plain ^ other) % 2**64).bit_count() <= 4
    assert ((plain ^ stranger) % 2**64).bit_count() > 8
    turned = Image.Exif()
    turned[EXIF_ORIENTATION] = 6
    lying = encode(photo().transpose(Image.Transpose.ROTATE_90), "PNG", exif=turned)
    assert inspect(lying, LIMITS, with_hash=True).perceptual_hash == plain


def may_be_rejected(function: Callable[[bytes], Any], encoded: bytes) -> Any:
    """The result, or None for a rejection; any other exception is for the caller to see."""
    try:
        return function(encoded)
    except Rejected:
        return None


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\x00\x00garbage",
        b"Exif\x00\x00II*\x00\xff\xff\xff\xff",
        b"Exif\x00\x00II*\x00\x08\x00\x00\x00\xff\xff\x12\x01",
        b"Exif\x00\x00",
        b"Exif\x00\x00<M\x00*\x00\x00\x00\x08",
    ],
    ids=["garbage", "offset", "count", "nothing", "order"],
)
def test_broken_metadata_stops_nothing(image_format: str, exif: bytes) -> None:
    encoded = encode(Image.fromarray(colours()), image_format, exif=exif)
    for function in (decode, decode_for_storage, lambda data: inspect(data, LIMITS)):
        may_be_rejected(function, encoded)
    assert decode(encoded).size == (WIDTH, HEIGHT), "the pixels are all there"


_KINDS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 129: 1}
"""Bytes of a value by the number of its type; 129 is none."""
_TAGS = (0x0100, 0x010E, 0x0110, 0x011A, 0x011B, 0x0132, 0x8769, 0x8825, 0x9003, 0x9286, 0xA005, 0xFFFF)


def odd_exif(generator: random.Random) -> bytes:
    """A block with an orientation and tags of any type and value, fit or unfit; some bytes changed."""
    tags = [EXIF_ORIENTATION, *(generator.choice(_TAGS) for _ in range(generator.randrange(6)))]
    start = 8 + 2 + 12 * len(tags) + 4
    body, values = b"", b""
    for tag in tags:
        kind, count = generator.choice(list(_KINDS)), generator.choice((1, 1, 1, 2, 3))
        value = generator.choice((generator.randbytes(24), b"\xff" * 24, bytes(24)))[: count * _KINDS[kind]]
        if tag == EXIF_ORIENTATION and generator.random() < 0.6:
            kind, count, value = 3, 1, struct.pack("<H", generator.randrange(2, 9))
        if len(value) > 4:
            value, values = struct.pack("<I", start + len(values)), values + value
        body += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
    block = bytearray(b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + values)
    for _ in range(generator.choice((0, 0, 1, 4))):
        block[generator.randrange(len(block))] = generator.randrange(256)
    if generator.random() < 0.1:
        del block[generator.randrange(len(block)) :]
    return b"Exif\0\0" * generator.choice((1, 1, 1, 2)) + bytes(block)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_whatever_stands_in_the_metadata_a_picture_is_rejected_or_seen_alike(image_format: str) -> None:
    generator = random.Random(f"metadata of {image_format}")
    kept = []
    for _ in range(500):
        try:
            encoded = encode(photo(width=24, height=36), image_format, exif=odd_exif(generator))
        except Exception:  # Pillow writes no TIFF with most of them
            assert image_format == "TIFF"
            continue
        if may_be_rejected(lambda data: inspect(data, LIMITS), encoded) is not None:
            kept.append(decode_for_storage(encoded)[1] == encoded)
            assert_every_reader_sees_the_same(encoded)
    assert len(kept) > (400 if image_format != "TIFF" else 4)
    assert image_format == "TIFF" or (any(kept) and not all(kept)), "some of them no reader can turn"


@pytest.mark.parametrize("error", [struct.error, zlib.error, MemoryError, RecursionError, AssertionError, ValueError])
def test_whatever_a_decoder_raises_is_a_rejection_that_names_it(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands in for decoders that fail in a way of their own, as new versions of Pillow do."""

    def load(image: Image.Image) -> None:
        raise error("two\nlines")

    monkeypatch.setattr(PngImageFile, "load", load)
    with pytest.raises(Rejected, match=f"{error.__name__}: two lines") as caught:
        inspect(encode(photo(), "PNG"), LIMITS)
    assert caught.value.reason is Reason.UNDECODABLE_IMAGE


def damaged(encoded: bytes, generator: random.Random) -> bytes:
    """Some bytes changed, more often in the header, and sometimes the end cut off."""
    content = bytearray(encoded)
    if generator.random() < 0.3:
        del content[generator.randrange(1, len(content)) :]
    for _ in range(generator.choice((0, 1, 3, 10))):
        reach = len(content) if generator.random() < 0.5 else min(len(content), 200)
        content[generator.randrange(reach)] = generator.randrange(256)
    return bytes(content)


DAMAGED = {
    **{name: lambda name=name: encode(photo(width=48, height=36), name) for name in FORMATS},
    "turned JPEG": lambda: oriented("JPEG", 6),
    "turned WEBP": lambda: oriented("WEBP", 6),
    "turned TIFF": lambda: oriented("TIFF", 6),
    "animation": lambda: animated("GIF"),
    "palette": lambda: MODES["P, places half transparent"]()[0],
    "16 bits": lambda: MODES["I;16"]()[0],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_decoded_or_rejected_and_nothing_else(name: str) -> None:
    encoded = DAMAGED[name]()
    generator = random.Random(name)
    outcomes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on damaged metadata
        for _ in range(150):
            content = damaged(encoded, generator)
            facts = may_be_rejected(lambda data: inspect(data, LIMITS), content)
            picture = may_be_rejected(decode, content)
            stored = may_be_rejected(decode_for_storage, content)
            outcomes.append(facts is not None)
            assert (picture is None) == (stored is None)
            assert facts is None or (picture is not None and picture.size == (facts.width_px, facts.height_px))
    assert any(outcomes)
    assert not all(outcomes), "the damage was felt"


def test_the_id_is_that_of_the_bytes() -> None:
    assert image_id(b"abc") == image_id(b"abc") == "cf4ab791c62b8d2b2109c90275287816"
    assert image_id(b"abd") != image_id(b"abc")
