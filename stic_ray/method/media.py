"""Which picture a row of data names, in whatever field or text: what is named and not there would be asked blind."""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from stic_ray.core.errors import Rejected
from stic_ray.core.schemas import Reason

IMAGE_FIELDS = ("image", "images")
"""Where a row's one image stands."""
PLACEHOLDER = "<image>"
"""Where the image belongs in LLaVA's texts; the chat template places it."""

_WORDS = {
    Reason.VIDEO: {"video", "videos"},
    Reason.AUDIO: {"audio", "audios", "sound", "sounds"},
    Reason.NO_IMAGE: {
        *("image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos"),
        *("photograph", "photographs", "figure", "screenshot"),
    },
}
_ENDINGS = {
    **dict.fromkeys(("mp4", "avi", "mov", "mkv", "webm", "m4v"), Reason.VIDEO),
    **dict.fromkeys(("wav", "mp3", "flac", "ogg", "m4a"), Reason.AUDIO),
    **dict.fromkeys(("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff"), Reason.NO_IMAGE),
    **dict.fromkeys(("heic", "avif"), Reason.NO_IMAGE),
}
_NUMBERED = re.compile(r"(image|img|picture)s?[ _-]?\d+", re.IGNORECASE)
_EMBEDDED = re.compile(r"data:image/|(iVBORw0KGgo|/9j/|R0lGOD|UklGR)[A-Za-z0-9+/]{80}")
"""How an image begins that stands in the data itself, in base64."""
_IN_TEXT = re.compile(
    r"<\|?(image|video|audio)[ _-]?(?:pad|placeholder|token|here)?[ _-]?\d*\|?>|<img>[^<\n]+</img>|\[IMG\]",
    re.IGNORECASE,
)
"""Placeholders of LLaVA and Qwen2-VL, InternLM-XComposer, Qwen-VL, and Pixtral."""
_MAX_PATH_CHARACTERS = 4096
_MAX_DEPTH = 8


def is_null(value: Any) -> bool:
    """Say whether a value is null, or NaN, which pandas makes of it."""
    return value is None or value != value


def is_absent(value: Any) -> bool:
    """Say whether a field holds nothing: null, pandas' NaN, an empty text, false, 0, or only such values."""
    if isinstance(value, Mapping):
        return all(map(is_absent, value.values()))
    if isinstance(value, list | tuple):
        return all(map(is_absent, value))
    return is_null(value) or value == "" or value == 0


def named_image(row: Mapping[str, Any], texts: tuple[str, ...]) -> Any:
    """Return what `image`, or `images` with one of them, holds in a row; None in a row that names no picture.

    `texts` are fields that may speak of pictures without naming one. Raises Rejected for several images, for a
    video or a sound, and for a picture that another field names.
    """
    found: list[Any] = []
    for field in IMAGE_FIELDS:
        value = row.get(field)
        values = value if isinstance(value, list | tuple) else [value]
        found += [each for each in values if not is_absent(each) and each not in found]
    others = {key: value for key, value in row.items() if key not in (*IMAGE_FIELDS, *texts)}
    numbered = [value for key, value in others.items() if _NUMBERED.fullmatch(key) and not is_absent(value)]
    if len(found) > 1 or (found and any(value != found[0] for value in numbered)):
        raise Rejected(Reason.SEVERAL_IMAGES, f"{len(found) + len(numbered)} images; one image per row")
    for key, value in others.items():
        reason = _medium(key, value)
        if reason and (not found or (reason is not Reason.NO_IMAGE and _is_medium(key, value, reason))):
            shown = f"'{key}': {value!r:.80}"
            problem = f"it has {shown}; only images can be shown"
            if reason is Reason.NO_IMAGE:
                problem = f"it names a picture as {shown}, and has none; the field is 'image', a path or URI."
            raise Rejected(reason, problem)
    return found[0] if found else None


def address_of(image: Any) -> str:
    """Return the path or URI that an image field holds. Raises Rejected where it holds no such thing."""
    value = image.get("path") if isinstance(image, Mapping) else image
    if not isinstance(value, str) or value.startswith("data:") or len(value) > _MAX_PATH_CHARACTERS or "\0" in value:
        held = f"an object with {', '.join(map(str, image))}" if isinstance(image, Mapping) else f"{image!r:.80}"
        raise Rejected(Reason.NO_IMAGE, f"the image is {held}, not the path of a file")
    return value


def check_placeholders(texts: Iterable[str], *, has_image: bool) -> None:
    """Check that the texts of a row ask for the picture that it has. Raises Rejected where they ask for another."""
    found = [match for text in texts for match in _IN_TEXT.finditer(text)]
    for reason, medium in ((Reason.VIDEO, "video"), (Reason.AUDIO, "audio")):
        if each := next((match[0] for match in found if str(match[1]).lower() == medium), None):
            raise Rejected(reason, f"the text has {each}; only images can be shown")
    if found and not has_image:
        raise Rejected(Reason.NO_IMAGE, f"the text has {found[0][0]}, but the row has no image")
    plain = [match[0] for match in found if match[0] == PLACEHOLDER]
    num_images = len(plain) + len({match[0] for match in found} - {PLACEHOLDER})
    if num_images > 1:
        raise Rejected(Reason.SEVERAL_IMAGES, f"{num_images} image placeholders; one image per row")


def without_placeholder(text: str, placeholder: str = PLACEHOLDER) -> str:
    """Remove a placeholder until none is left, those that come about by the removal of others, too."""
    left = text.replace(placeholder, "")
    if placeholder not in left:
        return left
    kept: list[str] = []
    for character in text:
        kept.append(character)
        if character == placeholder[-1] and "".join(kept[-len(placeholder) :]) == placeholder:
            del kept[-len(placeholder) :]
    return "".join(kept)


def _medium(key: str, value: Any, depth: int = 0) -> Reason | None:
    """Return what a field is about that is not empty, by its name or by what it holds; None for anything else."""
    if is_absent(value) or depth > _MAX_DEPTH:
        return None
    if reason := _about(key) or _ending(value):
        return reason
    inside: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        inside = list(value.items())
    elif isinstance(value, list | tuple):
        inside = [(key, each) for each in value]
    return next((found for inner, each in inside if (found := _medium(str(inner), each, depth + 1))), None)


def _is_medium(key: str, value: Any, reason: Reason) -> bool:
    """Say whether a field is the medium itself, and no remark about it."""
    return key.lower() in _WORDS[reason] or _ending(value) is reason


@lru_cache(maxsize=10_000)
def _about(key: str) -> Reason | None:
    words = set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", key).lower()))
    return next((reason for reason in _WORDS if words & _WORDS[reason]), None)


def _ending(value: Any) -> Reason | None:
    if isinstance(value, str) and _EMBEDDED.match(value):
        return Reason.NO_IMAGE
    if not isinstance(value, str) or "\n" in value or len(value) > _MAX_PATH_CHARACTERS:
        return None
    _, point, ending = value.partition("?")[0].rpartition(".")
    return _ENDINGS.get(ending.lower()) if point else None
