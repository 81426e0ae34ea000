"""Reading the images out of the files of a source: a file that is one, tar, Arrow, Parquet with bytes or addresses.

Where a file holds an image as it is (tar, uncompressed Arrow or Parquet), its place in bytes is told too: in the
pool's order neighbours are strangers, and a range of bytes is read without reading the thousand images around it.
"""

import tarfile
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from stic_ray.core.errors import SourceError, nearest
from stic_ray.core.outcomes import Rejected
from stic_ray.core.schemas import Reason
from stic_ray.core.storage import Location

Kind = Literal["image", "parquet", "tar", "arrow", "list"]

NUM_THREADS = 16
"""Files that a task reads at a time: object stores answer late, but to many at once."""

_KINDS: Mapping[str, Kind] = {".parquet": "parquet", ".tar": "tar", ".arrow": "arrow", ".txt": "list"}
_IMAGE_NAMES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
"""Members of a tar that are images; others (.json, .txt, .cls) belong to one."""
_ARROW_FILE = b"ARROW1\0\0"
_BUFFER_BYTES = 4 * 2**20
_TAR_BLOCK_BYTES = 512


@dataclass(frozen=True)
class Found:
    """An image of a source: where it is, and its bytes or why there are none."""

    path: str
    encoded: bytes | Rejected
    row: int | None = None
    offset: int | None = None


def kind_of(uri: str) -> Kind:
    """Return what a file is by its name; what has no ending of a container is an image."""
    path = uri.partition("?")[0] if "://" in uri else uri
    return _KINDS.get(PurePosixPath(path).suffix.lower(), "image")


def check_column(file: Location, schema: pa.Schema, column: str) -> bool:
    """Return whether the image column holds bytes (else addresses). Raises SourceError where it can hold neither."""
    if column not in schema.names:
        raise SourceError(
            f"'{file.uri}' has no column '{column}'.{nearest(column, schema.names)} Its columns: "
            f"{', '.join(schema.names)}. Name the one with the images with pool.image_column."
        )
    kind = schema.field(column).type
    fields = [kind.field(i) for i in range(kind.num_fields)] if pa.types.is_struct(kind) else []
    kinds = {field.name: field.type for field in fields} if fields else {"bytes": kind, "path": kind}
    if "bytes" in kinds and _is_bytes(kinds["bytes"]):
        return True
    if "path" in kinds and _is_text(kinds["path"]):
        return False
    raise SourceError(
        f"Column '{column}' of '{file.uri}' is {kind}; images are bytes, a path or URI, or a struct with a field "
        "'bytes' or 'path'."
    )


def images_in(
    files: Iterable[tuple[str, int | None]], column: str, max_bytes: int, piece: int = 0, num_pieces: int = 1
) -> Iterator[Found]:
    """Yield the images of files (URI and size, if known), a few in memory at a time.

    A file that cannot be read is one image with its rejection, and so is the rest of a damaged container. An image
    of more than `max_bytes` is not read. `piece` of `num_pieces` is the share of a Parquet file's rows.
    """
    plain: list[tuple[str, int | None]] = []
    for uri, size in files:
        kind = kind_of(uri)
        if kind in ("image", "list"):
            plain.append((uri, size))
            continue
        yield from read_all(plain, max_bytes)
        plain = []
        file = Location.of(uri)
        try:
            if kind == "tar":
                yield from _in_tar(file, max_bytes)
            elif kind == "arrow":
                yield from _in_arrow(file, column, max_bytes)
            else:
                yield from _in_parquet(file, column, max_bytes, piece, num_pieces)
        except (OSError, pa.ArrowInvalid, tarfile.TarError) as error:
            yield Found(uri, _unreadable(error))
    yield from read_all(plain, max_bytes)


def read_all(files: Iterable[tuple[str, int | None]], max_bytes: int) -> Iterator[Found]:
    """Read files that are images, several at a time, and yield them in order."""

    def read(file: tuple[str, int | None]) -> Found:
        uri, size = file
        try:
            place = Location.of(uri)
            size = place.info().size or 0 if size is None else size
            return Found(uri, _too_large(size, max_bytes) if size > max_bytes else place.read())
        except (OSError, SourceError) as error:
            return Found(uri, _unreadable(error))

    remaining = iter(files)
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        while some := list(islice(remaining, 2 * NUM_THREADS)):
            yield from threads.map(read, some)


def _in_tar(file: Location, max_bytes: int) -> Iterator[Found]:
    """Read a tar from its beginning to its end, as object stores like it."""
    stream = file.filesystem.open_input_stream(file.path, compression=None, buffer_size=_BUFFER_BYTES)
    with stream, tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            if not member.isfile() or PurePosixPath(member.name).suffix.lower() not in _IMAGE_NAMES:
                continue
            if member.size > max_bytes:
                yield Found(file.uri, _too_large(member.size, max_bytes), offset=member.offset_data)
                continue
            content = archive.extractfile(member)
            assert content is not None, "a regular file has content"
            yield Found(file.uri, content.read(), offset=member.offset_data)
    with file.open() as whole:  # cut off between two members, a tar reads as one that is shorter
        if whole.read_at(_TAR_BLOCK_BYTES, max(whole.size() - _TAR_BLOCK_BYTES, 0)).strip(b"\0"):
            raise tarfile.ReadError("ends without the mark of its end, as a file that was cut off does")


def _in_arrow(file: Location, column: str, max_bytes: int) -> Iterator[Found]:
    with file.open() as stream:
        reader = open_arrow(stream)
        check_column(file, reader.schema, column)
        row = 0
        while True:
            start = stream.tell()
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                return
            end = stream.tell()
            raw = stream.read_at(end - start, start)
            stream.seek(end)
            yield from _values(file, batch[column].to_pylist(), row, _Verbatim(raw, start), max_bytes)
            row += batch.num_rows


def _in_parquet(file: Location, column: str, max_bytes: int, piece: int, num_pieces: int) -> Iterator[Found]:
    with file.open() as stream:
        parquet = pq.ParquetFile(stream)
        holds_bytes = check_column(file, parquet.schema_arrow, column)
        num_rows = parquet.metadata.num_rows
        begin, stop = piece * num_rows // num_pieces, (piece + 1) * num_rows // num_pieces
        first = 0
        for group in range(parquet.num_row_groups):
            length = parquet.metadata.row_group(group).num_rows
            # Bytes are taken by whole row groups, those that begin in this piece; addresses are cheap to read twice.
            lowest, highest = (first, first + length) if holds_bytes else (max(begin, first), min(stop, first + length))
            if begin <= first < stop if holds_bytes else lowest < highest:
                raw = _uncompressed_chunk(stream, parquet, group, column) if holds_bytes else None
                row = first
                for batch in parquet.iter_batches(batch_size=64, row_groups=[group], columns=[column]):
                    values = batch[column].to_pylist()
                    wanted = slice(max(lowest - row, 0), max(highest - row, 0))
                    yield from _values(file, values[wanted], row + wanted.start, raw, max_bytes)
                    row += len(values)
            first += length


class _Verbatim:
    """Finds images in a part of a file that may hold them as they are, one behind the other."""

    def __init__(self, raw: bytes, start: int) -> None:
        self.raw, self.start, self.behind = raw, start, 0

    def offset_of(self, encoded: bytes) -> int | None:
        """Return where in the file the bytes are; None when they are compressed there."""
        at = self.raw.find(encoded, self.behind)
        if at < 0:  # of equal images, a dictionary holds one
            at = self.raw.find(encoded, 0, self.behind)
        if at < 0:
            return None
        self.behind = max(self.behind, at + len(encoded))
        return self.start + at


def _uncompressed_chunk(stream: pa.NativeFile, parquet: pq.ParquetFile, group: int, column: str) -> _Verbatim | None:
    """Return the image bytes of a row group as they are in the file, or None where they are compressed."""
    metadata = parquet.metadata.row_group(group)
    chunks = [metadata.column(i) for i in range(metadata.num_columns)]
    chunk = next((c for c in chunks if c.path_in_schema in (column, f"{column}.bytes")), None)
    if chunk is None or chunk.compression != "UNCOMPRESSED":
        return None
    pages = [chunk.data_page_offset, chunk.dictionary_page_offset]
    start = min(page for page in pages if page)
    return _Verbatim(stream.read_at(chunk.total_compressed_size, start), start)


def _values(
    file: Location, values: list[Any], first_row: int, verbatim: _Verbatim | None, max_bytes: int
) -> Iterator[Found]:
    """Yield the images of a column's values: bytes, addresses, or structs of both."""
    folder = file.folder
    for start in range(0, len(values), 2 * NUM_THREADS):
        some = [image_value(value) for value in values[start : start + 2 * NUM_THREADS]]
        addressed = read_all([(folder.address_of(v), None) for v in some if isinstance(v, str)], max_bytes)
        for row, value in enumerate(some, start=first_row + start):
            if isinstance(value, str):
                yield next(addressed)
            elif value is None:
                yield Found(file.uri, Rejected(Reason.EMPTY_FILE, "no value"), row)
            elif len(value) > max_bytes:
                yield Found(file.uri, _too_large(len(value), max_bytes), row)
            else:
                yield Found(file.uri, value, row, verbatim.offset_of(value) if verbatim and value else None)


def open_arrow(stream: pa.NativeFile) -> pa.RecordBatchReader:
    """Open an Arrow stream, or an Arrow file, which is a stream behind eight bytes."""
    stream.seek(len(_ARROW_FILE) if stream.read_at(len(_ARROW_FILE), 0) == _ARROW_FILE else 0)
    return pa.ipc.open_stream(stream)


def image_value(value: Any) -> bytes | str | None:
    """Return the bytes or the address of an image as a column holds it: as it is, or in a struct as of `datasets`."""
    if isinstance(value, list):  # `images` of one
        value = value[0] if len(value) == 1 else None
    if isinstance(value, Mapping):
        return value.get("bytes") or value.get("path") or None
    return value


def _unreadable(error: Exception) -> Rejected:
    return Rejected(Reason.UNREADABLE_FILE, " ".join(str(error).split()) or type(error).__name__)


def _too_large(num_bytes: int, max_bytes: int) -> Rejected:
    return Rejected(Reason.TOO_MANY_BYTES, f"{num_bytes} bytes; no image within the limits has over {max_bytes}")


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
