"""Reading the images out of the files of a source: a file that is one, tar, Arrow, Parquet with bytes or addresses.

Where a file holds an image as it is (tar, uncompressed Arrow or Parquet), its place in bytes is noted, too: in the
pool's order neighbours are strangers, and a range of bytes is read without reading the thousand images around it.
Everything that could not be read is one image that was rejected, or failed; it never stops what is beside it.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import PurePosixPath
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from stic_ray.core.errors import Failed, Rejected, SourceError
from stic_ray.core.schemas import Reason
from stic_ray.core.storage import Location
from stic_ray.method.images import is_image
from stic_ray.stages.columns import Batch, arrow_batches, check_column, image_value, parquet_batches
from stic_ray.stages.reading import Found, Patience, Stream, check_size, read_file, unreadable
from stic_ray.stages.source_captions import Captions
from stic_ray.stages.tars import IMAGE_ENDINGS, images_in_tar

Kind = Literal["image", "parquet", "tar", "arrow", "list"]

NUM_THREADS = 16
"""Files that a task reads at a time: object stores answer late, but to many at once."""

_KINDS: Mapping[str, Kind] = {
    **dict.fromkeys((".parquet", ".pq", ".parq"), "parquet"),
    **dict.fromkeys((".arrow", ".feather"), "arrow"),
    ".tar": "tar",
    ".txt": "list",
}


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
    captions: Captions = Captions()
    """Where the images have theirs."""
    patience: Patience = field(default_factory=Patience)


def kind_of(uri: str) -> Kind:
    """Return what a file is by its name; what has no ending of a container is an image."""
    return _KINDS.get(_name_of(uri).suffix.lower(), "image")


def may_be_image(uri: str) -> bool:
    """Whether a file looks by its name like an image, or like a tar of images."""
    name = _name_of(uri)
    return kind_of(uri) == "tar" or (name.name[:1] not in "._" and bool(IMAGE_ENDINGS.fullmatch(name.suffix)))


def _name_of(uri: str) -> PurePosixPath:
    return PurePosixPath(uri.partition("?")[0] if "://" in uri else uri)


def images_in(uris: Iterable[str], reading: Reading, piece: int = 0, num_pieces: int = 1) -> Iterator[Found]:
    """Yield the images of files, a few in memory at a time.

    A file that cannot be read is one image with its outcome, and so is a damaged part of a container. `piece` of
    `num_pieces` is the share of a Parquet file's rows.
    """
    plain: list[str] = []
    for uri in uris:
        if reading.captions.is_file(_name_of(uri)):
            continue
        if kind_of(uri) in ("image", "list"):
            plain.append(uri)
            continue
        yield from _read_all(plain, reading, with_captions=True)
        plain = []
        try:
            yield from _in_container(_locate(uri, reading), reading, piece, num_pieces)
        except Failed as failed:
            yield Found(uri, failed)
        except Rejected as rejected:
            if piece == 0:  # the others meet the same
                yield Found(uri, rejected)
    yield from _read_all(plain, reading, with_captions=True)


def _locate(uri: str, reading: Reading) -> Location:
    """Open an address that the listing or a table has. Raises Rejected for one that cannot be one."""
    scheme, _, options = uri.partition("?") if "://" in uri and not uri.startswith("file:") else ("", "", "")
    if options and options != reading.options:
        raise Rejected(Reason.UNREADABLE_FILE, f"'{scheme}?...' has options of its own; those of pool.source count")
    try:
        return Location.of(uri)
    except (SourceError, ValueError) as error:
        raise unreadable(error) from error


def _read_all(files: Iterable[str | Location], reading: Reading, *, with_captions: bool = False) -> Iterator[Found]:
    """Read files that are images, several at a time, and yield them in order, perhaps with the captions beside them."""

    def read(file: str | Location) -> Found:
        uri = file if isinstance(file, str) else file.uri
        try:
            place = _locate(file, reading) if isinstance(file, str) else file
            encoded = read_file(place, reading.max_bytes, reading.patience)
            caption = reading.captions.beside(place, reading.patience) if with_captions else None
            return Found(uri, encoded, caption=caption)
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
            yield from _read_all([file], reading, with_captions=True)
        elif kind == "tar":
            yield from images_in_tar(file, stream, reading.max_bytes, reading.captions)
        elif kind == "arrow":
            for batch in arrow_batches(stream, file, reading.column, reading.captions.column):
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
    holds_bytes = check_column(file, parquet.schema_arrow, reading.column, reading.captions.column)
    begin, stop = (each * parquet.metadata.num_rows // num_pieces for each in (piece, piece + 1))

    def in_piece(rows: range) -> range:
        if holds_bytes:
            return rows if begin <= rows.start < stop else range(0)
        return range(max(begin, rows.start), min(stop, rows.stop))

    wanted = (lambda rows: bool(in_piece(rows)), reading.captions.column)
    for batch in parquet_batches(stream, parquet, reading.column, *wanted):
        yield from _in_batch(file, batch, batch.rows if holds_bytes else in_piece(batch.rows), reading)


def _in_batch(file: Location, batch: Batch, rows: range, reading: Reading) -> Iterator[Found]:
    """Yield the images of some rows of a batch; what cannot be read of it is one image."""
    if isinstance(batch.values, Rejected):
        yield Found(file.uri, batch.values, batch.rows.start if batch.rows else None)
        return
    begin = rows.start - batch.rows.start
    values = batch.values.slice(begin, len(rows))
    captions = [None] * len(rows) if batch.captions is None else batch.captions.slice(begin, len(rows))
    some = [_image_or_place(file, value, reading) for value in values]
    addressed = _read_all((value for value in some if isinstance(value, Location)), reading)
    for row, value, text in zip(rows, some, captions, strict=True):
        caption = reading.captions.of_value(text)
        if isinstance(value, Location):
            found = next(addressed)  # of what has failed, the table is to be read again
            is_failed = isinstance(found.encoded, Failed)
            yield Found(file.uri, found.encoded, row) if is_failed else replace(found, caption=caption)
        else:
            offset = batch.verbatim.offset_of(value) if batch.verbatim and isinstance(value, bytes) and value else None
            yield Found(file.uri, value, row, offset, caption)


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
