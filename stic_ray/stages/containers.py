"""Reading the images out of the files of a source: a file that is one, tar, Arrow, Parquet with bytes or addresses.

Where a file holds an image as it is (tar, uncompressed Arrow or Parquet), its place in bytes is noted, too: in the
pool's order neighbours are strangers, and a range of bytes is read without reading the thousand images around it.
Everything that could not be read is one image that was rejected, or failed; it never stops what is beside it.
"""

import io
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import IO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from stic_ray.core.errors import Failed, Rejected, SourceError
from stic_ray.core.schemas import Reason
from stic_ray.core.storage import Location
from stic_ray.method.images import is_image
from stic_ray.stages.columns import Batch, arrow_batches, check_column, image_value, parquet_batches
from stic_ray.stages.reading import Patience, Stream, check_size, read_file, unreadable

Kind = Literal["image", "parquet", "tar", "arrow", "list"]

NUM_THREADS = 16
"""Files that a task reads at a time: object stores answer late, but to many at once."""

_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys((".parquet", ".pq", ".parq"), "parquet"),
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
    ".tar": "tar",
    ".txt": "list",
}
_IMAGE_ENDINGS = re.compile(
    r"(|\.(jpe?g|jpe|jfif|jif|pjpeg|pjp|a?png|webp|gif|bmp|dib|tiff?|hei[cf]|avif|jp2|jxl))", re.IGNORECASE
)
"""Members of a tar that are to be images; of the others (.json, .txt, .cls) those are that begin as one."""
_BLOCK_BYTES = 512
_TAR_NAMES = (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)
_BUFFER_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Found:
    """An image of a source: where it is, and its bytes or why there are none."""

    path: str
    encoded: bytes | Rejected | Failed
    row: int | None = None
    offset: int | None = None


@dataclass(frozen=True)
class Reading:
    """How the files of a source are read."""

    column: str
    """The one of tables that holds images."""
    max_bytes: int
    root: Location | None = None
    """The folder that the addresses in tables stay below; that of the table, when None."""
    allow_outside: bool = False
    """Take addresses of other places, too."""
    options: str = ""
    """Those behind the '?' of the source as the user typed it; no others count."""
    patience: Patience = field(default_factory=Patience)


def kind_of(uri: str) -> Kind:
    """Return what a file is by its name; what has no ending of a container is an image."""
    return _KINDS.get(_name_of(uri).suffix.lower(), "image")


def may_be_image(uri: str) -> bool:
    """Whether a file looks by its name like an image, or like a tar of images."""
    name = _name_of(uri)
    return kind_of(uri) == "tar" or (name.name[:1] not in "._" and bool(_IMAGE_ENDINGS.fullmatch(name.suffix)))


def _name_of(uri: str) -> PurePosixPath:
    return PurePosixPath(uri.partition("?")[0] if "://" in uri else uri)


def images_in(uris: Iterable[str], reading: Reading, piece: int = 0, num_pieces: int = 1) -> Iterator[Found]:
    """Yield the images of files, a few in memory at a time.

    A file that cannot be read is one image with its outcome, and so is a damaged part of a container. `piece` of
    `num_pieces` is the share of a Parquet file's rows.
    """
    plain: list[str] = []
    for uri in uris:
        if kind_of(uri) in ("image", "list"):
            plain.append(uri)
            continue
        yield from _read_all(plain, reading)
        plain = []
        try:
            yield from _in_container(_locate(uri, reading), reading, piece, num_pieces)
        except Failed as failed:
            yield Found(uri, failed)
        except Rejected as rejected:
            if piece == 0:  # the others meet the same
                yield Found(uri, rejected)
    yield from _read_all(plain, reading)


def _locate(uri: str, reading: Reading) -> Location:
    """Open an address that the listing or a table has. Raises Rejected for one that cannot be one."""
    scheme, _, options = uri.partition("?") if "://" in uri and not uri.startswith("file:") else ("", "", "")
    if options and options != reading.options:
        raise Rejected(Reason.UNREADABLE_FILE, f"'{scheme}?...' has options of its own; those of pool.source count")
    try:
        return Location.of(uri)
    except (SourceError, ValueError) as error:
        raise unreadable(error) from error


def _read_all(files: Iterable[str | Location], reading: Reading) -> Iterator[Found]:
    """Read files that are images, several at a time, and yield them in order."""

    def read(file: str | Location) -> Found:
        uri = file if isinstance(file, str) else file.uri
        try:
            place = _locate(file, reading) if isinstance(file, str) else file
            return Found(uri, read_file(place, reading.max_bytes, reading.patience))
        except (Rejected, Failed) as outcome:
            return Found(uri, outcome)

    remaining = iter(files)
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        while some := list(islice(remaining, 2 * NUM_THREADS)):
            yield from threads.map(read, some)


def _in_container(file: Location, reading: Reading, piece: int, num_pieces: int) -> Iterator[Found]:
    """Yield the images of a container. Raises Rejected, where nothing more of it can be read, and Failed."""
    try:
        stream = Stream(file, reading.patience)
        if not stream.size:
            raise Rejected(Reason.EMPTY_FILE, "0 bytes")
        kind = kind_of(file.uri)
        if is_image(stream.read_at(16, 0)):
            yield Found(file.uri, read_file(file, reading.max_bytes, reading.patience))
        elif kind == "tar":
            yield from _in_tar(file, stream, reading.max_bytes)
        elif kind == "arrow":
            for batch in arrow_batches(stream, file, reading.column):
                yield from _in_batch(file, batch, batch.rows, reading)
        else:
            yield from _in_parquet(file, stream, reading, piece, num_pieces)
    except (Rejected, Failed):
        raise
    except Exception as error:  # whatever a damaged file makes its reader raise
        raise unreadable(error) from error


def _in_parquet(file: Location, stream: Stream, reading: Reading, piece: int, num_pieces: int) -> Iterator[Found]:
    """Yield the images of a piece of a Parquet file.

    Bytes are taken by whole row groups, those that begin in the piece; addresses, cheap to read twice, by row.
    """
    parquet = pq.ParquetFile(pa.PythonFile(stream, "r"))
    holds_bytes = check_column(file, parquet.schema_arrow, reading.column)
    begin, stop = (each * parquet.metadata.num_rows // num_pieces for each in (piece, piece + 1))

    def in_piece(rows: range) -> range:
        if holds_bytes:
            return rows if begin <= rows.start < stop else range(0)
        return range(max(begin, rows.start), min(stop, rows.stop))

    for batch in parquet_batches(stream, parquet, reading.column, lambda rows: bool(in_piece(rows))):
        yield from _in_batch(file, batch, batch.rows if holds_bytes else in_piece(batch.rows), reading)


def _in_batch(file: Location, batch: Batch, rows: range, reading: Reading) -> Iterator[Found]:
    """Yield the images of some rows of a batch; what cannot be read of it is one image."""
    if isinstance(batch.values, Rejected):
        yield Found(file.uri, batch.values, batch.rows.start if batch.rows else None)
        return
    values = batch.values.slice(rows.start - batch.rows.start, len(rows))
    some = [_image_or_place(file, value, reading) for value in values]
    addressed = _read_all((value for value in some if isinstance(value, Location)), reading)
    for row, value in zip(rows, some, strict=True):
        if isinstance(value, Location):
            found = next(addressed)  # of what has failed, the table is to be read again
            yield Found(file.uri, found.encoded, row) if isinstance(found.encoded, Failed) else found
        else:
            offset = batch.verbatim.offset_of(value) if batch.verbatim and isinstance(value, bytes) and value else None
            yield Found(file.uri, value, row, offset)


def _image_or_place(file: Location, value: pa.Scalar, reading: Reading) -> bytes | Location | Rejected:
    try:
        image = image_value(value.as_py())
        if image is None:
            return Rejected(Reason.EMPTY_FILE, "no value")
        if isinstance(image, bytes):
            check_size(len(image), reading.max_bytes)
            return image
        if reading.allow_outside:
            return _locate(file.folder.address_of(image), reading)
        root = reading.root
        return file.folder.inside(image, root if root and file.uri.startswith(root.uri.partition("?")[0]) else None)
    except Rejected as rejected:
        return rejected
    except UnicodeError as error:  # a path that is no UTF-8, which Arrow does not check
        return unreadable(error)


def _in_tar(file: Location, stream: Stream, max_bytes: int) -> Iterator[Found]:
    """Read a tar from its beginning to its end, as object stores like it; behind a damaged header it goes on."""
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
            yield from _member(file, buffered, PurePosixPath(long_name or member.name), begin, member.size, max_bytes)
            long_name = None
    if damaged_from is not None:
        yield Found(file.uri, unreadable(f"bytes {damaged_from} to {at} are no member of a tar"))
    elif stream.read_at(_BLOCK_BYTES, max(stream.size - _BLOCK_BYTES, 0)).strip(b"\0"):
        yield Found(file.uri, unreadable("ends without the mark of its end, as a file that was cut off does"))


def _member(
    file: Location, stream: IO[bytes], name: PurePosixPath, begin: int, size: int, max_bytes: int
) -> Iterator[Found]:
    """Yield the image that a member of a tar is or should be: its content says so, or its ending."""
    beginning = stream.read(min(size, 16))
    if not is_image(beginning) and not _IMAGE_ENDINGS.fullmatch(name.suffix):
        return
    try:
        check_size(size, max_bytes)
    except Rejected as rejected:
        yield Found(file.uri, rejected, offset=begin)
    else:
        yield Found(file.uri, beginning + stream.read(size - len(beginning)), offset=begin)


def _long_name(content: bytes) -> str | None:
    """Return the name of the next member that a tar holds apart: as it is (GNU), or as a record (pax)."""
    record = re.search(rb"^\d+ path=(.*)$", content, re.MULTILINE)
    is_records = re.match(rb"\d+ [\w.]+=", content)
    name = record[1] if record else b"" if is_records else content.rstrip(b"\0")
    return name.decode("utf-8", "replace") or None
