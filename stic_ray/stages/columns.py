"""Images in a column of a table: which types hold them, what a value is, and the batches and pieces of a file."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stic_ray.core.errors import Failed, Rejected, SourceError, nearest
from stic_ray.core.schemas import Reason
from stic_ray.core.storage import Location
from stic_ray.stages.reading import Stream

_ARROW_FILE = b"ARROW1\0\0"
_ARROW_MESSAGE = b"\xff\xff\xff\xff"
_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)


def check_column(file: Location, schema: pa.Schema, column: str) -> bool:
    """Return whether the image column holds bytes (else addresses). Raises SourceError where it can hold neither."""
    if column not in schema.names:
        raise SourceError(
            f"'{file.uri}' has no column '{column}'.{nearest(column, schema.names)} Its columns: "
            f"{', '.join(schema.names)}. Name the one with the images with pool.image_column."
        )
    kind = _plain(schema.field(column).type)
    fields = {kind.field(i).name: _plain(kind.field(i).type) for i in range(kind.num_fields)}
    kinds = fields if pa.types.is_struct(kind) else {"bytes": kind, "path": kind}
    if "bytes" in kinds and any(test(kinds["bytes"]) for test in _BYTES):
        return True
    if "path" in kinds and any(test(kinds["path"]) for test in _TEXT):
        return False
    raise SourceError(
        f"Column '{column}' of '{file.uri}' is {schema.field(column).type}; images are bytes, a path or URI, or a "
        "struct with a field 'bytes' or 'path'; each alone, or in a list of one."
    )


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return what a column holds below dictionaries, lists and extensions."""
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(kind.storage_type)
    if pa.types.is_dictionary(kind) or any(test(kind) for test in _LISTS):
        return _plain(kind.value_type)
    return kind


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


def arrow_batches(stream: Stream) -> Iterator[tuple[int, int, pa.RecordBatch | Exception]]:
    """Yield the record batches of an Arrow stream, or file, with their first and last byte; errors for damaged ones."""
    stream.seek(len(_ARROW_FILE) if stream.read_at(len(_ARROW_FILE), 0) == _ARROW_FILE else 0)  # a stream follows
    reader = pa.ipc.open_stream(pa.PythonFile(stream, "r"))
    while True:
        start = stream.tell()
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return
        except (Rejected, Failed):
            raise
        except Exception as error:
            yield start, stream.tell(), error
            if stream.read_at(len(_ARROW_MESSAGE), stream.tell()) != _ARROW_MESSAGE:
                return
            continue
        yield start, stream.tell(), batch


class Verbatim:
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


def uncompressed_chunk(stream: Stream, parquet: pq.ParquetFile, group: int, column: str) -> Verbatim | None:
    """Return the image bytes of a row group as they are in the file, or None where they are compressed."""
    metadata = parquet.metadata.row_group(group)
    chunks = [metadata.column(i) for i in range(metadata.num_columns)]
    chunks = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(f"{column}.")]
    chunk = max(chunks, key=lambda chunk: chunk.total_compressed_size, default=None)
    if chunk is None or chunk.compression != "UNCOMPRESSED":
        return None
    start = min(page for page in (chunk.data_page_offset, chunk.dictionary_page_offset) if page)
    return Verbatim(stream.read_at(chunk.total_compressed_size, start), start)
