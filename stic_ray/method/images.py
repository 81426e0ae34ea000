"""From encoded bytes of any kind to the upright RGB picture that models see."""

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stic_ray.core.config import PoolConfig
from stic_ray.core.errors import Rejected, type_and_message
from stic_ray.core.schemas import Reason

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
GREY = (128, 128, 128)
"""Colour of a blank picture."""
_ORIENTATION = 0x0112  # EXIF tag
_Turn = Image.Transpose
_TURNS = {
    2: _Turn.FLIP_LEFT_RIGHT,
    3: _Turn.ROTATE_180,
    4: _Turn.FLIP_TOP_BOTTOM,
    5: _Turn.TRANSPOSE,
    6: _Turn.ROTATE_270,
    7: _Turn.TRANSVERSE,
    8: _Turn.ROTATE_90,
}
"""By EXIF orientation, what makes the picture upright."""
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class ImageLimits:
    """What a pool accepts."""

    min_side_px: int
    max_pixels: int
    max_aspect_ratio: float

    @property
    def max_bytes(self) -> int:
        """No image within `max_pixels` is larger: 8 bytes a pixel, as 16-bit RGBA without compression has."""
        return 8 * self.max_pixels + 2**20

    @staticmethod
    def of(pool: PoolConfig) -> "ImageLimits":
        """Return the limits that a pool's settings say; they hold for every image that a user brings."""
        return ImageLimits(pool.min_side_px, pool.max_image_pixels, pool.max_aspect_ratio)


@dataclass(frozen=True)
class ImageFacts:
    """What the header of an image says; width and height are those of the upright picture."""

    width_px: int
    height_px: int
    format: str
    mode: str
    perceptual_hash: int | None = None
    """64 bits as a signed number, as a table holds them."""


def blank_like(picture: Image.Image) -> Image.Image:
    """Return a uniform grey picture of the same size."""
    return Image.new("RGB", picture.size, GREY)


def image_id(encoded: bytes) -> str:
    """Return the stable id of an image: the 128-bit BLAKE2b of its bytes, in hex."""
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def is_image(beginning: bytes) -> bool:
    """Say by its first 16 bytes whether a file is of a format that is taken, whatever its name."""
    is_webp = beginning[:4] == b"RIFF" and beginning[8:12] == b"WEBP"
    is_bmp = beginning[:2] == b"BM" and beginning[6:10] == bytes(4)  # a text may begin with BM, too
    return beginning.startswith(_BEGINNINGS) or is_webp or is_bmp


def other_format(beginning: bytes) -> Rejected:
    """Return the rejection of a file that begins otherwise than an image."""
    return Rejected(Reason.UNSUPPORTED_FORMAT, f"starts with {beginning[:8]!r}, none of {', '.join(FORMATS)}")


def inspect(encoded: bytes, limits: ImageLimits, *, with_hash: bool = False) -> ImageFacts:
    """Check that an image can be used, decoding it whole, and return its facts.

    With `with_hash` they include the 64-bit perceptual hash (pHash) of the picture as a viewer sees it. Raises
    Rejected. Size limits are applied to the header, before a decompression bomb is unpacked.
    """
    with _opened(encoded, limits) as image:
        mode = image.mode
        picture = _upright_rgb(image)
        bits = None
        if with_hash:
            import imagehash  # brings scipy's transforms: only for pools that ask for it

            bits = int(np.packbits(imagehash.phash(picture).hash).view(">i8")[0])
        return ImageFacts(*picture.size, _format_name(image), mode, bits)


def decode(encoded: bytes, limits: ImageLimits | None = None) -> Image.Image:
    """Return the picture upright and in 8-bit RGB, whatever its mode; of an animation, the first frame.

    Transparent parts become white, 16-bit values are scaled to 8 bits. Images that did not pass `inspect` need
    `limits`. Raises Rejected.
    """
    with _opened(encoded, limits) as image:
        return _upright_rgb(image)


def decode_for_storage(encoded: bytes, limits: ImageLimits | None = None) -> tuple[Image.Image, bytes]:
    """Return the picture as `decode` does, and bytes from which the Image feature of our tables gives the same one.

    The feature turns a picture by its orientation and converts it to RGB, so photographs, greys too, are kept as they
    came. What it would show otherwise (transparent parts, more than 8 bits, a palette, several frames), or could not
    read for damaged metadata, becomes an RGB PNG. Raises Rejected.
    """
    with _opened(encoded, limits) as image:
        picture = _upright_rgb(image)
        is_kept = (
            image.mode in ("RGB", "L")
            and _format_name(image) in ("JPEG", "PNG", "WEBP", "BMP")
            and "transparency" not in image.info
            and (image.format == "MPO" or getattr(image, "n_frames", 1) == 1)  # phones put a preview behind the picture
            and _is_turned_by_readers(image)
        )
        return picture, encoded if is_kept else encode_png(picture)


def encode_png(picture: Image.Image) -> bytes:
    """Encode a picture without loss."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def _opened(encoded: bytes, limits: ImageLimits | None) -> Iterator[Image.Image]:
    """Open an image within its limits: the one place where a stranger's bytes become a picture.

    Pillow's decoders raise all kinds of errors on damaged data; whatever the block raises is a rejection.
    """
    if not encoded:
        raise Rejected(Reason.EMPTY_FILE, "0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # there are limits of our own
            image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        with image:
            if limits is not None:
                _check_limits(*image.size, limits)
            yield image
    except Rejected:
        raise
    except UnidentifiedImageError:
        raise other_format(encoded) from None
    except Image.DecompressionBombError as error:
        raise Rejected(Reason.TOO_MANY_PIXELS, str(error)) from None
    except Exception as error:
        raise Rejected(Reason.UNDECODABLE_IMAGE, type_and_message(error)) from None


def _check_limits(width: int, height: int, limits: ImageLimits) -> None:
    size = f"{width} x {height} px"
    if width * height > limits.max_pixels:
        raise Rejected(Reason.TOO_MANY_PIXELS, f"{size}, more than pool.max_image_pixels={limits.max_pixels}")
    if min(width, height) < limits.min_side_px:
        raise Rejected(Reason.TOO_SMALL, f"{size}, less than pool.min_side_px={limits.min_side_px}")
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise Rejected(Reason.ASPECT_RATIO, f"{size}, over pool.max_aspect_ratio={limits.max_aspect_ratio:g}")


def _is_turned_by_readers(image: Image.Image) -> bool:
    """Whether a reader can turn the image as Pillow offers it (`datasets` does): it writes the metadata anew."""
    small = Image.new("L", (1, 1))
    small.info = dict(image.info)
    with suppress(Exception):
        ImageOps.exif_transpose(small)
        return True
    return False


def _format_name(image: Image.Image) -> str:
    return "JPEG" if image.format == "MPO" else str(image.format)


def _upright_rgb(image: Image.Image) -> Image.Image:
    image.load()
    turn = None
    with suppress(Exception):  # a block of metadata that cannot be read turns nothing
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        return _scale_to_8_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layered = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layered).convert("RGB")
    return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> Image.Image:
    """Map 16-bit greys by their full range, and 32-bit or float greys by the range that they use."""
    values = np.asarray(image).astype(np.float64)
    values = np.where(np.isfinite(values), values, 0.0)
    if image.mode.startswith("I;16") or (image.mode == "I" and values.min() >= 0 and 255 < values.max() <= 65535):
        low, high = 0.0, 65535.0
    elif values.min() >= 0 and values.max() <= 255 and values.max() > 1:
        low, high = 0.0, 255.0
    else:
        low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) * 255 if high > low else np.zeros_like(values)
    return Image.fromarray(np.round(scaled).astype(np.uint8))
