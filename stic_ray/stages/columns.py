"""Images in a column of a table: which types hold them, what a value is, and the batches of a file."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from stic_ray.core.errors import Failed, Rejected, SourceError, nearest, one_line
from stic_ray.core.schemas import Reason
from stic_ray.core.storage import Location
from stic_ray.stages.reading import Stream, unreadable
from stic_ray.stages.source_captions import check_caption_column

_ARROW_FILE = b"ARROW1\0\0"
_ARROW_MESSAGE = b"\xff\xff\xff\xff"
_BATCH_ROWS = 64
_BYTES = re.compile(r"(large_|fixed_size_)?binary")
_TEXT = re.compile(r"(large_)?string|null")
"""How types of bytes and of text are called."""
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)


def check_column(file: Location, schema: pa.Schema, column: str, caption_column: str | None = None) -> bool:
    """Return whether the image column holds bytes (else addresses).

    Raises SourceError where it can hold neither, and for a caption column that is not there or holds no text.
    """
    check_caption_column(file, schema, caption_column)
    if column not in schema.names:
        raise SourceError(
            f"'{file.uri}' has no column '{column}'.{nearest(column, schema.names)} Its columns: "
            f"{', '.join(schema.names)}. Name the one with the images with pool.image_column."
        )
    kind = _plain(schema.field(column).type)
    kinds = _fields(kind) or {"bytes": kind, "path": kind}
    if _BYTES.match(str(kinds.get("bytes"))):
        return True
    if _TEXT.match(str(kinds.get("path"))):
        return False
    raise SourceError(
        f"Column '{column}' of '{file.uri}' is {schema.field(column).type}; images are bytes, a path or URI, or a "
        "struct with a field 'bytes' or 'path'; each alone, or in a list of one."
    )


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether values of a type are bytes, or have bytes in them."""
    kind = _plain(kind)
    return any(map(holds_bytes, _fields(kind).values())) if pa.types.is_struct(kind) else "binary" in str(kind)


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return what a column holds below dictionaries, lists and extensions."""
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if pa.types.is_dictionary(kind) or any(test(kind) for test in _LISTS):
        return _plain(kind.value_type)
    return kind


def _fields(kind: pa.DataType) -> dict[str, pa.DataType]:
    """Return the fields of a struct, by name; none of other types."""
    return {field.name: _plain(field.type) for field in kind} if pa.types.is_struct(kind) else {}


def image_value(value: Any) -> bytes | str | None:
    """Return the bytes or the address of an image as a column holds it: as it is, or in a struct as of `datasets`.

    Either may be in a list of one. Raises Rejected for a list of several.
    """
    if isinstance(value, list):
        if len(value) > 1:
            raise Rejected(Reason.SEVERAL_IMAGES, f"{len(value)} images; one image per row")
        value = value[0] if value else None
    if isinstance(value, Mapping):
        return value.get("bytes") or value.get("path") or None
    return None if value == "" else value


class Verbatim:
    """A part of a file that may hold images as they are, one behind the other; it is read when it is first asked."""

    def __init__(self, stream: Stream, start: int, stop: int) -> None:
        self._stream, self._start, self._stop = stream, start, stop
        self._behind = 0

    @cached_property
    def _raw(self) -> bytes:
        return self._stream.read_at(self._stop - self._start, self._start)

    def offset_of(self, encoded: bytes) -> int | None:
        """Return where in the file the bytes are; None when they are compressed there."""
        at = self._raw.find(encoded, self._behind)
        if at < 0:  # of equal images, a dictionary holds one
            at = self._raw.find(encoded, 0, self._behind)
        if at < 0:
            return None
        self._behind = max(self._behind, at + len(encoded))
        return self._start + at


class Batch(NamedTuple):
    """Some values of the image column, or why a part of the file cannot be read."""

    rows: range
    """Their numbers in the file."""
    values: pa.Array | Rejected
    verbatim: Verbatim | None = None
    """Where they may lie as they are."""
    captions: pa.Array | None = None
    """Those of the same rows, where a column of them is read."""


def arrow_batches(stream: Stream, file: Location, column: str, caption_column: str | None = None) -> Iterator[Batch]:
    """Yield the record batches of an Arrow stream, or file; damaged ones have no numbers.

    Raises SourceError without an image column, or without the caption column that is asked for.
    """
    stream.seek(len(_ARROW_FILE) if stream.read_at(len(_ARROW_FILE), 0) == _ARROW_FILE else 0)  # a stream follows
    reader = pa.ipc.open_stream(pa.PythonFile(stream, "r"))
    check_column(file, reader.schema, column, caption_column)
    row = 0
    while True:
        start = stream.tell()
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return
        except (Rejected, Failed):
            raise
        except Exception as error:
            yield Batch(range(0), unreadable(f"bytes {start} to {stream.tell()}: {one_line(error)}"))
            if stream.read_at(len(_ARROW_MESSAGE), stream.tell()) != _ARROW_MESSAGE:
                return
            continue
        rows = range(row, row + batch.num_rows)
        captions = None if caption_column is None else batch[caption_column]
        yield Batch(rows, batch[column], Verbatim(stream, start, stream.tell()), captions)
        row = rows.stop


def parquet_batches(
    stream: Stream,
    parquet: pq.ParquetFile,
    column: str,
    is_wanted: Callable[[range], bool],
    caption_column: str | None = None,
) -> Iterator[Batch]:
    """Yield the row groups of a Parquet file whose rows are wanted, in batches; a damaged one costs its own rows."""
    stop, columns = 0, [column] if caption_column is None else [column, caption_column]
    for group in range(parquet.num_row_groups):
        metadata = parquet.metadata.row_group(group)
        row, stop = stop, stop + metadata.num_rows
        if not is_wanted(range(row, stop)):
            continue
        try:
            chunk = verbatim_chunk(metadata, column)
            verbatim = None if chunk is None else Verbatim(stream, *chunk)
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=columns):
                captions = None if caption_column is None else batch[caption_column]
                yield Batch(range(row, row + batch.num_rows), batch[column], verbatim, captions)
                row += batch.num_rows
        except (Rejected, Failed):
            raise
        except Exception as error:
            yield Batch(range(row, stop), unreadable(f"rows {row} to {stop - 1}: {one_line(error)}"))


def verbatim_chunk(group: pq.RowGroupMetaData, column: str) -> tuple[int, int] | None:
    """Return first and last byte of a row group's images, or None where they are compressed."""
    chunks = [group.column(i) for i in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{column}.")]
    chunk = max(chunks, key=lambda chunk: chunk.total_compressed_size, default=None)
    if chunk is None or chunk.compression != "UNCOMPRESSED":
        return None
    start = min(page for page in (chunk.data_page_offset, chunk.dictionary_page_offset) if page)
    return start, start + chunk.total_compressed_size
