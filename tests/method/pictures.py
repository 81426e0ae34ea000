"""Encoded pictures of every kind, and what a viewer sees of them."""

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 36, 24
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
EXIF_ORIENTATION = 0x0112

Pixels = np.ndarray[Any, Any]


def noise(seed: int, *shape: int, top: int = 256) -> Pixels:
    return np.random.default_rng(seed).integers(0, top, shape)


def colours(seed: int = 0, width: int = WIDTH, height: int = HEIGHT) -> Pixels:
    """Blocks of colour: JPEG keeps them nearly as they are."""
    blocks = noise(seed, height // 12, width // 12, 3)
    return np.kron(blocks, np.ones((12, 12, 1))).astype(np.uint8)


def photo(seed: int = 0, width: int = 96, height: int = 72) -> Image.Image:
    """Gradients and grain in all colours, as in a photograph."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    channels = [128 + 90 * np.sin(3 * x + 2 * channel + seed) * np.cos(4 * y + channel) for channel in range(3)]
    grain = noise(seed, height, width, 3, top=17) - 8
    return Image.fromarray(np.clip(np.stack(channels, -1) + grain, 0, 255).astype(np.uint8))


def encode(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    lossless = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    image.save(buffer, image_format, **lossless, **options)
    return buffer.getvalue()


def header_of_png(width: int, height: int) -> bytes:
    """A PNG that promises so many pixels and holds none of them."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1000) + b"IDAT"


def on_white(pixels: Pixels, alpha: Pixels) -> Pixels:
    opacity = alpha[..., None] / 255
    return pixels * opacity + 255 * (1 - opacity)


def grey(values: Pixels) -> Pixels:
    return np.repeat(values[..., None], 3, axis=-1)


def _bits() -> tuple[bytes, Pixels]:
    values = noise(1, HEIGHT, WIDTH, top=2) * 255
    return encode(Image.fromarray(values.astype(np.uint8)).convert("1"), "PNG"), grey(values)


def _greys() -> tuple[bytes, Pixels]:
    values = noise(2, HEIGHT, WIDTH).astype(np.uint8)
    return encode(Image.fromarray(values), "PNG"), grey(values)


def _greys_with_alpha() -> tuple[bytes, Pixels]:
    values = noise(3, HEIGHT, WIDTH, 2).astype(np.uint8)
    return encode(Image.fromarray(values, "LA"), "PNG"), on_white(grey(values[..., 0]), values[..., 1])


def _palette(**transparency: Any) -> tuple[bytes, Pixels]:
    places = noise(4, HEIGHT, WIDTH, top=4).astype(np.uint8)
    table = np.array([[250, 10, 20], [10, 240, 30], [30, 40, 230], [90, 90, 10]])
    image = Image.fromarray(places, "P")
    image.putpalette(table.astype(np.uint8).tobytes())
    alpha = np.full(4, 255)
    given = transparency.get("transparency")
    if isinstance(given, int):
        alpha[given] = 0
    elif given is not None:
        alpha[: len(given)] = list(given)
    return encode(image, "PNG", **transparency), on_white(table[places], alpha[places])


def _rgb_with_key() -> tuple[bytes, Pixels]:
    pixels = colours(5)
    key = tuple(int(channel) for channel in pixels[0, 0])
    alpha = np.where((pixels == pixels[0, 0]).all(-1), 0, 255)
    return encode(Image.fromarray(pixels), "PNG", transparency=key), on_white(pixels, alpha)


def _rgba(image_format: str) -> tuple[bytes, Pixels]:
    pixels = noise(6, HEIGHT, WIDTH, 4).astype(np.uint8)
    return encode(Image.fromarray(pixels), image_format), on_white(pixels[..., :3], pixels[..., 3])


def _cmyk(image_format: str) -> tuple[bytes, Pixels]:
    inks = np.kron(noise(7, HEIGHT // 12, WIDTH // 12, 4), np.ones((12, 12, 1))).astype(np.uint8)
    seen = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255
    options = {"quality": 100} if image_format == "JPEG" else {}
    return encode(Image.fromarray(inks, "CMYK"), image_format, **options), seen


def _greys_of_16_bits(image_format: str) -> tuple[bytes, Pixels]:
    values = noise(8, HEIGHT, WIDTH, top=65536).astype(np.uint16)
    return encode(Image.fromarray(values), image_format), grey(values / 65535 * 255)


def _greys_of_32_bits() -> tuple[bytes, Pixels]:
    values = noise(9, HEIGHT, WIDTH, top=2_000_000).astype(np.int32) - 1_000_000
    low, high = values.min(), values.max()
    return encode(Image.fromarray(values), "TIFF"), grey((values - low) / (high - low) * 255)


def _greys_of_floats() -> tuple[bytes, Pixels]:
    values = noise(10, HEIGHT, WIDTH, top=1001).astype(np.float32) / 1000
    values[0, :2] = 0.0, 1.0
    return encode(Image.fromarray(values), "TIFF"), grey(values * 255)


def _rgb(image_format: str) -> tuple[bytes, Pixels]:
    options = {"quality": 100, "subsampling": 0} if image_format == "JPEG" else {}
    return encode(Image.fromarray(colours()), image_format, **options), colours()


def _luma_and_chroma() -> tuple[bytes, Pixels]:
    return encode(Image.fromarray(colours()).convert("YCbCr"), "TIFF"), colours()


MODES: dict[str, Callable[[], tuple[bytes, Pixels]]] = {
    "1": _bits,
    "L": _greys,
    "LA": _greys_with_alpha,
    "P": _palette,
    "P, one place transparent": lambda: _palette(transparency=2),
    "P, places half transparent": lambda: _palette(transparency=bytes([255, 128, 0])),
    "RGB": lambda: _rgb("PNG"),
    "RGB, one colour transparent": _rgb_with_key,
    "RGBA": lambda: _rgba("PNG"),
    "RGBA in WebP": lambda: _rgba("WEBP"),
    "CMYK": lambda: _cmyk("TIFF"),
    "CMYK in JPEG": lambda: _cmyk("JPEG"),
    "YCbCr": _luma_and_chroma,
    "I;16": lambda: _greys_of_16_bits("PNG"),
    "I;16 in TIFF": lambda: _greys_of_16_bits("TIFF"),
    "I": _greys_of_32_bits,
    "F": _greys_of_floats,
    **{f"RGB in {name}": lambda name=name: _rgb(name) for name in ("JPEG", "WEBP", "BMP", "TIFF")},
}
"""Encoded bytes of every pixel layout, and the colours that a viewer on white paper sees."""


def oriented(image_format: str, orientation: int, *, as_xmp: bool = False) -> bytes:
    """A picture whose metadata says how to turn it."""
    image = Image.fromarray(colours())
    options: dict[str, Any] = {"quality": 95} if image_format == "JPEG" else {}
    if as_xmp:
        description = f'<rdf:Description tiff:Orientation="{orientation}"/>'
        return encode(image, image_format, xmp=f"<x:xmpmeta>{description}</x:xmpmeta>".encode(), **options)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return encode(image, image_format, exif=exif, **options)


TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda stored: stored,
    2: np.fliplr,
    3: lambda stored: np.rot90(stored, 2),
    4: np.flipud,
    5: lambda stored: np.swapaxes(stored, 0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(np.swapaxes(stored, 0, 1), 2),
    8: lambda stored: np.rot90(stored, 1),
}
"""By EXIF orientation, how stored pixels become the upright picture."""


def animated(image_format: str) -> bytes:
    """Several frames, the first of them red."""
    first, *others = (Image.new("RGB", (WIDTH, HEIGHT), colour) for colour in ("red", "blue", "green"))
    return encode(first, image_format, save_all=True, append_images=others)
