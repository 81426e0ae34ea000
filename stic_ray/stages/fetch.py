"""Fetching encoded images late: files, ranges of bytes, or rows of a Parquet or Arrow file."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stic_ray.core.errors import Failed, Rejected, SourceError
from stic_ray.core.schemas import Reason
from stic_ray.core.storage import Location
from stic_ray.method.images import image_id
from stic_ray.stages.columns import arrow_batches, image_value
from stic_ray.stages.containers import NUM_THREADS, kind_of
from stic_ray.stages.reading import Patience, Stream, read_file, too_large, unreadable

FETCHED = [
    pa.field("encoded", pa.large_binary()),
    *(pa.field(f"fetch_{name}", pa.string()) for name in ("reason", "error")),
]
"""Columns that `with_images` adds: the bytes, or why there are none; an error without a reason is to be tried again."""

Image = bytes | Rejected | Failed

_MAX_BYTES = 2**30
_TABLES_AT_A_TIME = 4
"""Tables of which a row group each is decompressed in memory."""


def with_images(table: pa.Table, images: Sequence[Image | None]) -> pa.Table:
    """Return `table` with the fetched bytes, or the outcome, of each row; rows without an image have neither."""
    columns = (
        [image if isinstance(image, bytes) else None for image in images],
        [image.reason if isinstance(image, Rejected) else None for image in images],
        [image.message if isinstance(image, Rejected | Failed) else None for image in images],
    )
    for field, values in zip(FETCHED, columns, strict=True):
        table = table.append_column(field, pa.array(values, field.type))
    return table


def fetched(row: Mapping[str, Any]) -> bytes:
    """Return the bytes of a row that `with_images` gave. Raises the outcome, Rejected or Failed, of one without."""
    if row.get("fetch_error") is None:
        return row["encoded"] or b""
    raise (
        Rejected(Reason(row["fetch_reason"]), row["fetch_error"]) if row["fetch_reason"] else Failed(row["fetch_error"])
    )


def fetch_indexed(
    rows: Sequence[Mapping[str, Any]], image_column: str, max_bytes: int = _MAX_BYTES, patience: Patience | None = None
) -> list[Image]:
    """Return the bytes of rows with a `path` (and `row`, or `offset` and `num_bytes`), in order.

    The outcome stands where an image could not be read, has over `max_bytes` or, for rows with an `image_id`, is not
    the same any more. Files are read several at a time; rows of compressed tables by row group, each of them once.
    """
    patience = patience or Patience()
    by_table: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        if row.get("offset") is None and row["row"] is not None:
            by_table[row["path"]].append(place)
    in_tables = {place for places in by_table.values() for place in places}
    alone = [place for place in range(len(rows)) if place not in in_tables]
    images: dict[int, Image] = {}
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        one = partial(_fetch, max_bytes=max_bytes, patience=patience)
        images.update(zip(alone, threads.map(one, [rows[place] for place in alone]), strict=True))
    with ThreadPoolExecutor(_TABLES_AT_A_TIME) as threads:
        wanted = ({rows[place]["row"] for place in places} for places in by_table.values())
        tables = threads.map(partial(_fetch_rows, column=image_column, patience=patience), by_table, wanted)
        for places, table in zip(by_table.values(), tables, strict=True):
            images.update({place: table[rows[place]["row"]] for place in places})
    return [_checked(row, images[place], max_bytes) for place, row in enumerate(rows)]


def _fetch(row: Mapping[str, Any], max_bytes: int, patience: Patience) -> Image:
    try:
        file = Location.of(row["path"])
        if row.get("num_bytes") is None:
            return read_file(file, max_bytes, patience)
        is_file = row["offset"] is None  # a byte more shows that another is in its place
        return patience.read(file, lambda: _read_range(file, row["offset"] or 0, row["num_bytes"] + is_file))
    except (Rejected, Failed) as outcome:
        return outcome
    except SourceError as error:  # an address that cannot be one
        return unreadable(error)


def _read_range(file: Location, offset: int, num_bytes: int) -> bytes:
    with file.open() as stream:
        return stream.read_at(num_bytes, offset)


def _checked(row: Mapping[str, Any], image: Image, max_bytes: int) -> Image:
    if not isinstance(image, bytes):
        return image
    if "image_id" in row and image_id(image) != row["image_id"]:
        message = f"'{row['path']}' does not hold the image that was indexed any more"
        return Rejected(Reason.UNREADABLE_FILE, message)
    return too_large(len(image), max_bytes) if len(image) > max_bytes else image


def _fetch_rows(path: str, wanted: set[int], column: str, patience: Patience) -> dict[int, Image]:
    """Return the images of some rows of a table."""
    found: dict[int, Image] = {}
    try:
        stream = Stream(Location.of(path), patience)
        batches = _record_batches(stream) if kind_of(path) == "arrow" else _row_groups(stream, wanted, column)
        for rows, batch in batches:
            for row in wanted.intersection(rows):
                found[row] = (
                    _image(batch[column][row - rows.start].as_py()) if not isinstance(batch, Rejected) else batch
                )
        missing: Image = Rejected(Reason.UNREADABLE_FILE, f"'{path}' has fewer rows than when the pool was indexed")
    except (Rejected, Failed) as outcome:
        missing = outcome
    except Exception as error:  # whatever a damaged file makes its reader raise
        missing = unreadable(error)
    return {row: found.get(row, missing) for row in wanted}


def _image(value: Any) -> Image:
    try:
        image = image_value(value)
    except Rejected as rejected:
        return rejected
    return image if isinstance(image, bytes) else Rejected(Reason.UNREADABLE_FILE, "the row holds no bytes any more")


def _record_batches(stream: Stream) -> Iterator[tuple[range, pa.Table]]:
    """Yield the record batches of a compressed Arrow stream that can be read, each with the numbers of its rows."""
    first = 0
    for _, _, batch in arrow_batches(stream):
        if not isinstance(batch, Exception):
            yield range(first, first + batch.num_rows), pa.Table.from_batches([batch])
            first += batch.num_rows


def _row_groups(stream: Stream, wanted: set[int], column: str) -> Iterator[tuple[range, pa.Table | Rejected]]:
    """Yield the row groups of a Parquet file that hold wanted rows, each with the numbers of its rows."""
    parquet = pq.ParquetFile(pa.PythonFile(stream, "r"))
    first = 0
    for group in range(parquet.num_row_groups):
        rows = range(first, first + parquet.metadata.row_group(group).num_rows)
        first = rows.stop
        if wanted.intersection(rows):
            try:
                yield rows, parquet.read_row_group(group, columns=[column])
            except (Rejected, Failed):
                raise
            except Exception as error:
                yield rows, unreadable(error)
