"""From encoded bytes of any kind to the upright RGB picture that models see."""

import hashlib
import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from stic_ray.core.config import PoolConfig
from stic_ray.core.schemas import Reason

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


class ImageRejected(Exception):
    """An image that cannot be used, and why."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message


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


def image_id(encoded: bytes) -> str:
    """Return the stable id of an image: the 128-bit BLAKE2b of its bytes, in hex."""
    return hashlib.blake2b(encoded, digest_size=16).hexdigest()


def inspect(encoded: bytes, limits: ImageLimits, *, with_hash: bool = False) -> ImageFacts:
    """Check that an image can be used, decoding it whole, and return its facts.

    With `with_hash` they include the 64-bit perceptual hash (pHash) of the picture as a viewer sees it. Raises
    ImageRejected. Size limits are applied to the header, before a decompression bomb is unpacked.
    """
    with _open(encoded) as image:
        _check_limits(*image.size, limits)
        mode = image.mode
        _load(image)
        width, height = image.size  # of a TIFF, Pillow has turned it upright by now
        if _orientation(image) in _TRANSPOSED:
            width, height = height, width
        hashed = _perceptual_hash(_upright_rgb(image)) if with_hash else None
        return ImageFacts(width, height, _format_name(image), mode, hashed)


def decode(encoded: bytes, limits: ImageLimits | None = None) -> Image.Image:
    """Return the picture upright and in 8-bit RGB, whatever its mode; of an animation, the first frame.

    Transparent parts become white, 16-bit values are scaled to 8 bits. Images that did not pass `inspect` need
    `limits`. Raises ImageRejected.
    """
    with _open(encoded) as image:
        if limits is not None:
            _check_limits(*image.size, limits)
        _load(image)
        return _upright_rgb(image)


def decode_for_storage(encoded: bytes, limits: ImageLimits | None = None) -> tuple[Image.Image, bytes]:
    """Return the picture as `decode` does, and the bytes to store so that every reader sees the same one.

    Bytes that any reader would show alike (upright, RGB, one frame) are kept as they came, others become PNG.
    Raises ImageRejected.
    """
    with _open(encoded) as image:
        if limits is not None:
            _check_limits(*image.size, limits)
        _load(image)
        plain = (
            image.mode == "RGB"
            and _format_name(image) in ("JPEG", "PNG", "WEBP", "BMP")
            and _orientation(image) == 1
            and "transparency" not in image.info
            and getattr(image, "n_frames", 1) == 1
        )
        picture = _upright_rgb(image)
    return picture, encoded if plain else encode_png(picture)


def encode_png(picture: Image.Image) -> bytes:
    """Encode a picture without loss."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _open(encoded: bytes) -> Image.Image:
    if not encoded:
        raise ImageRejected(Reason.EMPTY_FILE, "0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `inspect` has its own limit
            return Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError:
        allowed = ", ".join(FORMATS)
        raise ImageRejected(Reason.UNSUPPORTED_FORMAT, f"starts with {encoded[:8]!r}, none of {allowed}") from None
    except Image.DecompressionBombError as error:
        raise ImageRejected(Reason.TOO_MANY_PIXELS, str(error)) from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise ImageRejected(Reason.UNDECODABLE_IMAGE, _one_line(error)) from None


def _load(image: Image.Image) -> None:
    # Pillow's decoders raise any of these on damaged data.
    try:
        image.load()
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, TypeError, OverflowError) as error:
        raise ImageRejected(Reason.UNDECODABLE_IMAGE, _one_line(error)) from None


def _check_limits(width: int, height: int, limits: ImageLimits) -> None:
    if width * height > limits.max_pixels:
        raise ImageRejected(
            Reason.TOO_MANY_PIXELS, f"{width} x {height} px, more than pool.max_image_pixels={limits.max_pixels}"
        )
    if min(width, height) < limits.min_side_px:
        raise ImageRejected(Reason.TOO_SMALL, f"{width} x {height} px, less than pool.min_side_px={limits.min_side_px}")
    if max(width, height) > limits.max_aspect_ratio * min(width, height):
        raise ImageRejected(
            Reason.ASPECT_RATIO, f"{width} x {height} px, over pool.max_aspect_ratio={limits.max_aspect_ratio:g}"
        )


def _orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation, 1 for none; None when the EXIF block is damaged, on which other readers fail.

    Only for loaded images: of a PNG, Pillow reads the whole picture to find its EXIF block.
    """
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, KeyError):
        return None


def _format_name(image: Image.Image) -> str:
    return "JPEG" if image.format == "MPO" else str(image.format)


def _upright_rgb(image: Image.Image) -> Image.Image:
    return _to_rgb(ImageOps.exif_transpose(image) if _orientation(image) not in (None, 1) else image)


def _to_rgb(image: Image.Image) -> Image.Image:
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


def _perceptual_hash(picture: Image.Image) -> int:
    import imagehash  # brings scipy's transforms: only for pools that ask for it

    return int(np.packbits(imagehash.phash(picture).hash).view(">i8")[0])


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
