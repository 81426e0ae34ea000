"""Fetching encoded images late: files, ranges of bytes, or rows of a Parquet or Arrow file."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stic_ray.core.errors import SourceError
from stic_ray.core.storage import Location
from stic_ray.method.images import image_id
from stic_ray.stages.containers import NUM_THREADS, image_value, kind_of, open_arrow

FETCHED = [pa.field("encoded", pa.large_binary()), pa.field("fetch_error", pa.string())]
"""Columns that `with_images` adds: the bytes, or why there are none."""

Image = bytes | OSError | None


def with_images(table: pa.Table, images: Sequence[Image]) -> pa.Table:
    """Return `table` with the fetched bytes, or the error, of each row."""
    encoded = pa.array([image if isinstance(image, bytes) else None for image in images], FETCHED[0].type)
    errors = [" ".join(str(image).split()) if isinstance(image, OSError) else None for image in images]
    return table.append_column(FETCHED[0], encoded).append_column(FETCHED[1], pa.array(errors, pa.string()))


def fetch_indexed(rows: Sequence[Mapping[str, Any]], image_column: str) -> list[Image]:
    """Return the bytes of rows with a `path` (and `row`, or `offset` and `num_bytes`), in order.

    An OSError stands where an image could not be read or, for rows with an `image_id`, is not the same any more.
    Files and ranges are read several at a time; rows of compressed tables by row group, each of them once.
    """
    by_row: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        if row.get("offset") is None and row["row"] is not None:
            by_row[row["path"]].append(place)
    in_tables = {place for places in by_row.values() for place in places}
    alone = [place for place in range(len(rows)) if place not in in_tables]
    images: list[Image] = [None] * len(rows)
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        for place, image in zip(alone, threads.map(_fetch, [rows[place] for place in alone]), strict=True):
            images[place] = image
    for path, places in by_row.items():
        found = _fetch_rows(Location.of(path), [rows[place]["row"] for place in places], image_column)
        for place, image in zip(places, found, strict=True):
            images[place] = image
    return [_unchanged(row, image) for row, image in zip(rows, images, strict=True)]


def _fetch(row: Mapping[str, Any]) -> Image:
    try:
        file = Location.of(row["path"])
        return file.read() if row.get("offset") is None else file.read_range(row["offset"], row["num_bytes"])
    except OSError as error:
        return error
    except SourceError as error:  # an address that cannot be one
        return OSError(str(error))


def _unchanged(row: Mapping[str, Any], image: Image) -> Image:
    if isinstance(image, bytes) and "image_id" in row and image_id(image) != row["image_id"]:
        return OSError(f"'{row['path']}' does not hold the image that was indexed any more")
    return image


def _fetch_rows(file: Location, wanted: Sequence[int], column: str) -> list[Image]:
    try:
        with file.open() as stream:
            batches = _arrow_batches(stream) if kind_of(file.path) == "arrow" else _row_groups(stream, wanted, column)
            found = dict(_pick(batches, set(wanted), column))
    except (OSError, pa.ArrowInvalid) as error:
        return [error if isinstance(error, OSError) else OSError(str(error))] * len(wanted)
    gone = FileNotFoundError(f"'{file.uri}' has fewer rows than when the pool was indexed")
    return [found.get(row) or gone for row in wanted]


def _arrow_batches(stream: pa.NativeFile) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the record batches of a compressed Arrow stream, each with the number of its first row."""
    first = 0
    for batch in open_arrow(stream):
        yield first, batch
        first += batch.num_rows


def _row_groups(stream: pa.NativeFile, wanted: Sequence[int], column: str) -> Iterator[tuple[int, pa.Table]]:
    """Yield the row groups of a Parquet file that hold wanted rows, each with the number of its first row."""
    parquet = pq.ParquetFile(stream)
    first = 0
    for group in range(parquet.num_row_groups):
        behind = first + parquet.metadata.row_group(group).num_rows
        if any(first <= row < behind for row in wanted):
            yield first, parquet.read_row_group(group, columns=[column])
        first = behind


def _pick(
    batches: Iterable[tuple[int, pa.Table | pa.RecordBatch]], wanted: set[int], column: str
) -> Iterator[tuple[int, bytes | None]]:
    for first, batch in batches:
        for row in sorted(wanted & set(range(first, first + batch.num_rows))):
            value = image_value(batch[column][row - first].as_py())
            yield row, value if isinstance(value, bytes) else None
