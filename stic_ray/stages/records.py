"""Rows that the user brings: a JSON list, JSON Lines or Parquet, compressed or not, a few in memory at a time."""

import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from stic_ray.core.errors import Failed, Rejected, SourceError, one_line, type_and_message
from stic_ray.core.json_stream import json_values
from stic_ray.core.storage import Location
from stic_ray.method.images import is_image
from stic_ray.method.media import IMAGE_FIELDS, address_of, is_null, named_image
from stic_ray.stages.columns import holds_bytes, image_value
from stic_ray.stages.fetch import fetch_indexed, with_images
from stic_ray.stages.reading import Patience, Stream

_BATCH_ROWS = 256
_IMAGE_BATCH_ROWS = 16
_COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}
"""First bytes of a compressed file, and what pyarrow calls it."""


class Row(NamedTuple):
    """A row as the file has it, or why it cannot be read."""

    number: int
    """From 0."""
    line: int | None
    """Where it begins, from 1; None in Parquet."""
    value: dict[str, Any] | None
    problem: str | None = None

    @property
    def place(self) -> str:
        """Name the row for an error."""
        return f"row {self.number}" + (f" (line {self.line})" if self.line else "")


@dataclass(frozen=True)
class InTable:
    """Stands for bytes that stay in the Parquet file."""

    column: str
    row: int

    def __repr__(self) -> str:
        return "bytes"


def read_rows(uri: str, setting: str) -> tuple[Location, Iterator[Row]]:
    """Return the rows of a file one by one; `setting` names it in errors.

    The content says what the file is, not its name. JSON is UTF-8, or UTF-16 or UTF-32 as JSON's standard tells them
    apart, with any line ends. A row that cannot be read has its problem; the others are not touched by it. Raises
    SourceError when the file is missing, empty or cannot be opened, and later when the storage fails.
    """
    source = Location.of(uri)
    if not source.exists() or source.is_folder():
        raise SourceError(f"{setting}: '{uri}' is no file; it needs JSON, JSON Lines or Parquet.")
    rows = _rows_in(source, f"{setting}: '{uri}'")
    first = next(rows, None)
    if first is None:
        raise SourceError(f"{setting}: '{uri}' holds no rows.")
    return source, chain([first], rows)


def image_place(row: Mapping[str, Any], texts: tuple[str, ...], source: Location, folder: Location) -> dict[str, Any]:
    """Return where a row's image is: `path` of a file, or `path`, `row` and `column` of the source; all None without.

    `texts` are the fields that name no picture. Raises Rejected as `named_image` and `address_of` do, and for a place
    that is not below `folder`.
    """
    image = named_image(row, texts)
    if image is None:
        return {"path": None, "row": None, "column": None}
    if isinstance(image, InTable):
        return {"path": source.uri, "row": image.row, "column": image.column}
    return {"path": folder.inside(address_of(image)).uri, "row": None, "column": None}


def load_records(
    rows: Sequence[Mapping[str, Any]], schema: pa.Schema, max_bytes: int, root: Location | None = None
) -> pa.Table:
    """Return rows that have `path`, `row` and `column` as a table, with their images of at most `max_bytes`.

    Their paths are below `root`, or without one below the innermost folder that all of them share.
    """
    with_path = [place for place, row in enumerate(rows) if row["path"] is not None]
    patience = Patience(root=root or _shared_folder([rows[place]["path"] for place in with_path]))
    found = fetch_indexed([rows[place] for place in with_path], "", max_bytes, patience)
    images = dict(zip(with_path, found, strict=True))
    return with_images(pa.Table.from_pylist(list(rows), schema=schema), [images.get(i) for i in range(len(rows))])


def _shared_folder(paths: Sequence[str]) -> Location | None:
    folders = [Location.of(path).folder for path in paths]
    if len({str(folder.filesystem.type_name) for folder in folders}) != 1:
        return None
    return folders[0].at(posixpath.commonpath([folder.path for folder in folders]))


def row_id(value: Any) -> str | None:
    """Return an id as text; None where there is none, as null or pandas' NaN say."""
    if is_null(value) or value == "":
        return None
    return plain_text(value) if isinstance(value, str | int | float) else json.dumps(value, default=str)


def plain_text(value: str | float) -> str:
    """Return a value as text; whole floats, which pandas makes of integers beside a null, as integers."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _rows_in(source: Location, name: str) -> Iterator[Row]:
    try:
        stream = Stream(source, Patience())
        file, head = pa.PythonFile(stream, "r"), stream.read_at(4, 0)
        if head == b"PAR1":
            yield from _parquet_rows(pq.ParquetFile(file))
            return
        compression = next((kind for magic, kind in _COMPRESSIONS.items() if head.startswith(magic)), None)
        values = json_values(pa.CompressedInputStream(file, compression) if compression else file)
        for number, (line, value, problem) in enumerate(values):
            if problem is None and not (isinstance(value, dict) and value):
                problem = "an object without fields" if value == {} else f"no object, but {json.dumps(value)[:80]}"
            yield Row(number, line, None if problem else value, problem)
    except Exception as error:  # the storage, or what a damaged file makes its reader raise
        raise SourceError(f"{name} cannot be read: {type_and_message(error)}") from error


def _parquet_rows(parquet: pq.ParquetFile) -> Iterator[Row]:
    heavy = [field.name for field in parquet.schema_arrow if holds_bytes(field.type)]
    light = [name for name in parquet.schema_arrow.names if name not in heavy]
    # A picture under another name is one that a row names, as a path with such an ending is.
    pictures = [name for name in heavy if name not in IMAGE_FIELDS and _holds_pictures(parquet, name)]
    number = 0
    for group in range(parquet.num_row_groups):
        end = number + parquet.metadata.row_group(group).num_rows
        images = {
            f"{name} (a picture)" if name in pictures else name: _images(parquet, group, name, number) for name in heavy
        }
        try:
            for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=light):
                for place in range(batch.num_rows):
                    value, problem = _light_values(batch, place)
                    value |= {name: next(column) for name, column in images.items()}
                    yield Row(number, None, None if problem else value, problem)
                    number += 1
        except (Rejected, Failed):
            raise
        except Exception as error:  # a damaged part of the file: other row groups are good
            yield from (Row(damaged, None, None, one_line(error)) for damaged in range(number, end))
        number = end


def _light_values(batch: pa.RecordBatch, place: int) -> tuple[dict[str, Any], str | None]:
    """Return a row, and the problem with its text, if it has one; decimals are floats."""
    row, problem = {}, None
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value = column[place].as_py()
            row[name] = float(value) if isinstance(value, Decimal) else value
        except UnicodeError as error:
            problem = f"text that is no UTF-8: {one_line(error)}"
        except (ArithmeticError, ValueError):  # a date that Python cannot hold
            row[name] = None
    return row, problem


def _holds_pictures(parquet: pq.ParquetFile, column: str) -> bool:
    """Say by the first rows whether the bytes of a column are encoded pictures."""
    try:
        batch = next(parquet.iter_batches(batch_size=_IMAGE_BATCH_ROWS, columns=[column]))
        found = [each for value in batch[column].to_pylist() for each in _image_values(value)]
    except Exception:  # a damaged row group is named where its rows are read
        return False
    return any(isinstance(each, bytes) and is_image(each[:16]) for each in found)


def _images(parquet: pq.ParquetFile, group: int, column: str, first: int) -> Iterator[Any]:
    """Yield for each row of a group where its bytes stay, its address, or None.

    The statistics say where every row has bytes; only elsewhere are they read.
    """
    metadata = parquet.metadata.row_group(group)
    leaves = {metadata.column(i).path_in_schema: metadata.column(i) for i in range(metadata.num_columns)}
    statistics = next((leaves[name].statistics for name in (column, f"{column}.bytes") if name in leaves), None)
    if statistics is not None and statistics.has_null_count and statistics.null_count == 0:
        yield from (InTable(column, first + place) for place in range(metadata.num_rows))
        return
    row = first
    for batch in parquet.iter_batches(batch_size=_IMAGE_BATCH_ROWS, row_groups=[group], columns=[column]):
        for scalar in batch[column]:
            found = [
                InTable(column, row) if isinstance(each, bytes) else each for each in _image_values(scalar.as_py())
            ]
            yield found if len(found) > 1 else found[0] if found else None
            row += 1


def _image_values(value: Any) -> list[bytes | str]:
    """Return the bytes and addresses of a value, which may be a list of several."""
    found = [image_value(each) for each in (value if isinstance(value, list) else [value])]
    return [each for each in found if each is not None]
