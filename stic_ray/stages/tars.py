"""The images of a tar, read from its beginning to its end, and the captions that a WebDataset has beside them."""

import io
import re
import tarfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import IO

from stic_ray.core.errors import Rejected
from stic_ray.core.storage import Location
from stic_ray.method.images import is_image
from stic_ray.stages.reading import Found, Stream, check_size, unreadable
from stic_ray.stages.source_captions import Captions, check_file_size

IMAGE_ENDINGS = re.compile(
    r"(|\.(jpe?g|jpe|jfif|jif|pjpeg|pjp|a?png|webp|gif|bmp|dib|tiff?|hei[cf]|avif|jp2|jxl))", re.IGNORECASE
)
"""Members of a tar that are to be images; of the others (.json, .txt, .cls) those are that begin as one."""
_BLOCK_BYTES = 512
_TAR_NAMES = (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)
_BUFFER_BYTES = 4 * 2**20
_NUM_WAITING = 16
"""Images that wait in memory for their caption: in a WebDataset it stands beside them."""


@dataclass(frozen=True)
class _Member:
    """A file in a tar; the stream stands at its first byte until the next member is asked for."""

    name: PurePosixPath
    begin: int
    size: int
    stream: IO[bytes]


def images_in_tar(file: Location, stream: Stream, max_bytes: int, captions: Captions) -> Iterator[Found]:
    """Yield the images of a tar; behind a damaged header it goes on.

    An image has the caption under its own name, up to its ending or, as WebDataset counts, to its first dot. A caption
    may stand anywhere in the tar; an image far before it is read twice.
    """
    texts: dict[str, str | Rejected] = {}
    waiting: deque[tuple[_Member, Found]] = deque()
    late: list[_Member] = []
    for member in _members(file, stream):
        if isinstance(member, Found):
            yield member
        elif _holds_caption(member, captions):
            texts[_key(member.name, member.name.stem)] = _caption_in(member, captions)
        elif (image := _image_in(file, member, max_bytes)) is not None:
            if captions.ending is None or not isinstance(image.encoded, bytes):
                yield replace(image, caption=captions.missing(member.name.stem))
                continue
            waiting.append((member, image))
        while waiting and (_keys(waiting[0][0].name) & texts.keys()):
            first, image = waiting.popleft()
            yield replace(image, caption=_caption_of(first, texts, captions))
        if len(waiting) > _NUM_WAITING:
            late.append(waiting.popleft()[0])
    yield from (replace(image, caption=_caption_of(member, texts, captions)) for member, image in waiting)
    for member in late:
        encoded = stream.read_at(member.size, member.begin)
        yield Found(file.uri, encoded, offset=member.begin, caption=_caption_of(member, texts, captions))


def _keys(name: PurePosixPath) -> set[str]:
    return {_key(name, stem) for stem in _stems(name)}


def _key(name: PurePosixPath, stem: str) -> str:
    return f"{name.parent}/{stem}"


def _stems(name: PurePosixPath) -> list[str]:
    """Return what an image's caption may be called, without the ending; a hidden file has one name."""
    return list(dict.fromkeys([name.stem, name.name.partition(".")[0] or name.stem]))


def _caption_of(member: _Member, texts: dict[str, str | Rejected], captions: Captions) -> str | Rejected | None:
    keys = (_key(member.name, stem) for stem in _stems(member.name))
    return next((texts[key] for key in keys if key in texts), captions.missing(member.name.stem))


def _holds_caption(member: _Member, captions: Captions) -> bool:
    is_hidden = member.name.name.startswith(".")  # as what macOS notes of a file beside it
    return captions.ending is not None and member.name.suffix.lower() == f".{captions.ending}" and not is_hidden


def _caption_in(member: _Member, captions: Captions) -> str | Rejected:
    try:
        check_file_size(member.size)
    except Rejected as rejected:
        return rejected
    return captions.of_content(member.stream.read(member.size), str(member.name))


def _members(file: Location, stream: Stream) -> Iterator[_Member | Found]:
    """Read a tar as object stores like it; what is damaged of it is an image that cannot be read."""
    buffered, at, damaged_from, long_name = io.BufferedReader(stream, _BUFFER_BYTES), 0, None, None
    while at < stream.size:
        buffered.seek(at)
        header = buffered.read(_BLOCK_BYTES)
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            if header.strip(b"\0") and damaged_from is None:
                damaged_from = at
            at += _BLOCK_BYTES
            continue
        if damaged_from is not None:
            yield Found(file.uri, unreadable(f"bytes {damaged_from} to {at} are no member of a tar"))
            damaged_from = None
        begin = at = at + _BLOCK_BYTES
        if member.isreg() or member.type not in tarfile.SUPPORTED_TYPES or member.type in _TAR_NAMES:
            at += -(-member.size // _BLOCK_BYTES) * _BLOCK_BYTES
        if at > stream.size:
            yield Found(file.uri, unreadable(f"the file is cut off within its member '{member.name}'"))
            return
        if member.type in _TAR_NAMES:
            long_name = _long_name(buffered.read(member.size)) or long_name
        elif member.isreg():
            yield _Member(PurePosixPath(long_name or member.name), begin, member.size, buffered)
            long_name = None
    if damaged_from is not None:
        yield Found(file.uri, unreadable(f"bytes {damaged_from} to {at} are no member of a tar"))
    elif stream.read_at(_BLOCK_BYTES, max(stream.size - _BLOCK_BYTES, 0)).strip(b"\0"):
        yield Found(file.uri, unreadable("ends without the mark of its end, as a file that was cut off does"))


def _image_in(file: Location, member: _Member, max_bytes: int) -> Found | None:
    """Return the image that a member is or should be: its content says so, or its ending."""
    beginning = member.stream.read(min(member.size, 16))
    if not is_image(beginning) and not IMAGE_ENDINGS.fullmatch(member.name.suffix):
        return None
    try:
        check_size(member.size, max_bytes)
    except Rejected as rejected:
        return Found(file.uri, rejected, offset=member.begin)
    return Found(file.uri, beginning + member.stream.read(member.size - len(beginning)), offset=member.begin)


def _long_name(content: bytes) -> str | None:
    """Return the name of the next member that a tar holds apart: as it is (GNU), or as a record (pax)."""
    record = re.search(rb"^\d+ path=(.*)$", content, re.MULTILINE)
    is_records = re.match(rb"\d+ [\w.]+=", content)
    name = record[1] if record else b"" if is_records else content.rstrip(b"\0")
    return name.decode("utf-8", "replace") or None
