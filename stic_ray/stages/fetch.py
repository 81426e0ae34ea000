"""Fetching encoded images late: by path, or by row of a Parquet file."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stic_ray.core.storage import Location

FETCHED = [pa.field("encoded", pa.large_binary()), pa.field("fetch_error", pa.string())]
"""Columns that `with_images` adds: the bytes, or why there are none."""


def with_images(table: pa.Table, images: Sequence[bytes | OSError | None]) -> pa.Table:
    """Return `table` with the fetched bytes, or the error, of each row."""
    encoded = pa.array([image if isinstance(image, bytes) else None for image in images], FETCHED[0].type)
    errors = [" ".join(str(image).split()) if isinstance(image, OSError) else None for image in images]
    return table.append_column(FETCHED[0], encoded).append_column(FETCHED[1], pa.array(errors, pa.string()))


def fetch_indexed(rows: Sequence[Mapping[str, Any]], image_column: str) -> list[bytes | OSError | None]:
    """Return the bytes of index rows (`path`, `row`), in order; an OSError where one could not be read.

    Rows of a Parquet file are read by row group, each of them once.
    """
    images: list[bytes | OSError | None] = [None] * len(rows)
    by_file: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        if row["row"] is None:
            images[place] = fetch(row["path"])
        else:
            by_file[row["path"]].append(place)
    for path, places in by_file.items():
        try:
            found = _read_rows(Location.of(path), [rows[place]["row"] for place in places], image_column)
        except OSError as error:
            found = [error] * len(places)
        for place, image in zip(places, found, strict=True):
            images[place] = image
    return images


def fetch(path: str) -> bytes | OSError:
    """Return the content of a file, or the error that reading it gave."""
    try:
        return Location.of(path).read()
    except OSError as error:
        return error


def read_row_group(file: Location, group: int, column: str) -> list[bytes | None]:
    """Return the image bytes of one row group of a Parquet file."""
    with file.filesystem.open_input_file(file.path) as stream:
        return _image_values(pq.ParquetFile(stream), group, column)


def _read_rows(file: Location, wanted: Sequence[int], column: str) -> list[bytes | OSError | None]:
    found: dict[int, bytes | None] = {}
    with file.filesystem.open_input_file(file.path) as stream:
        parquet = pq.ParquetFile(stream)
        first = 0
        for group in range(parquet.num_row_groups):
            length = parquet.metadata.row_group(group).num_rows
            here = [row for row in wanted if first <= row < first + length]
            if here:
                values = _image_values(parquet, group, column)
                found.update({row: values[row - first] for row in here})
            first += length
    gone = FileNotFoundError(f"'{file.uri}' has fewer rows than when the pool was indexed")
    return [found.get(row) or gone for row in wanted]


def _image_values(parquet: pq.ParquetFile, group: int, column: str) -> list[bytes | None]:
    values = parquet.read_row_group(group, columns=[column])[column].to_pylist()
    return [value["bytes"] if isinstance(value, dict) else value for value in values]
