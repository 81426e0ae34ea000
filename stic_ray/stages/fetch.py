"""Fetching encoded images late: files, ranges of bytes, or rows of a Parquet or Arrow file."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import Failed, Rejected, SourceError
from stic_ray.core.randomness import is_drawn
from stic_ray.core.rundir import RunDir, read_shard
from stic_ray.core.schemas import INDEX, Reason
from stic_ray.core.storage import Location
from stic_ray.method.images import image_id
from stic_ray.stages.columns import arrow_batches, image_value, parquet_batches
from stic_ray.stages.containers import NUM_THREADS, kind_of
from stic_ray.stages.ordering import index_shards
from stic_ray.stages.reading import Patience, Stream, check_size, read_file, unreadable
from stic_ray.stages.shards import ShardTask
from stic_ray.stages.tasks import map_tasks

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


def indexed_tasks(index: RunDir, shard_size: int, num_images: int | None) -> list[ShardTask]:
    """Return a task for each shard of a finished index that holds the first `num_images` images (all when None)."""
    shards = index_shards(index, shard_size, num_images)
    return [ShardTask(s.number, {"index": s.location.uri, "num_rows": s.num_rows}, s.num_bytes) for s in shards]


def num_images_of(tasks: Iterable[ShardTask]) -> int:
    """Return how many images tasks of `indexed_tasks` have together."""
    return sum(task.payload["num_rows"] for task in tasks)


def read_indexed(task: ShardTask) -> pa.Table:
    """Return the index rows of a task of `indexed_tasks`."""
    return read_shard(Location.of(task.payload["index"]), INDEX).slice(0, task.payload["num_rows"])


def load_drawn(task: ShardTask, config: RunConfig) -> pa.Table:
    """Return the images of a task of `indexed_tasks` that a round asks about, with their bytes."""
    index = drawn(read_indexed(task), config)
    return with_images(index, fetch_indexed(index.to_pylist(), config.pool.image_column))


def num_drawn(stage: str, tasks: Sequence[ShardTask], config: RunConfig) -> int:
    """Return how many images of tasks of `indexed_tasks` a round asks about."""
    if config.rounds.image_share >= 1.0:
        return num_images_of(tasks)
    return sum(map_tasks(stage, _num_drawn, [(task, config) for task in tasks]))


def _num_drawn(task: ShardTask, config: RunConfig) -> int:
    return drawn(read_indexed(task), config).num_rows


def drawn(index: pa.Table, config: RunConfig) -> pa.Table:
    """Return the rows of an index that a round asks about: a share that its seed draws (VILA² section 3.1)."""
    share = config.rounds.image_share
    ids = index["image_id"].to_pylist()
    return index.filter(
        pa.array([is_drawn(config.seed, image, "image of the round", share) for image in ids], pa.bool_())
    )


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
    the same any more. Files are read several at a time; rows of compressed tables by row group, each of them once. The
    column of a table is the row's `column`, or else `image_column`.
    """
    patience = patience or Patience()
    wanted: dict[tuple[str, str], set[int]] = defaultdict(set)
    for row in rows:
        if (table := _table_of(row, image_column)) is not None:
            wanted[table].add(row["row"])

    def fetch(row: Mapping[str, Any]) -> Image:
        table = _table_of(row, image_column)
        try:
            image = _read(row, max_bytes, patience) if table is None else _bytes_of(in_tables[table][row["row"]])
            check_size(len(image), max_bytes)
        except (Rejected, Failed) as outcome:
            return outcome
        except SourceError as error:  # an address that cannot be one
            return unreadable(error)
        if "image_id" in row and image_id(image) != row["image_id"]:
            return unreadable(f"'{row['path']}' does not hold the image that was indexed any more")
        return image

    with ThreadPoolExecutor(_TABLES_AT_A_TIME) as threads:
        found = threads.map(lambda table: _read_rows(table, wanted[table], patience), wanted)
        in_tables = dict(zip(wanted, found, strict=True))
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return list(threads.map(fetch, rows))


def _table_of(row: Mapping[str, Any], image_column: str) -> tuple[str, str] | None:
    """Return the table and column that an image is read from; None where it is a file, or a range of one."""
    is_in_table = row["row"] is not None and row.get("offset") is None
    return (row["path"], row.get("column") or image_column) if is_in_table else None


def _read(row: Mapping[str, Any], max_bytes: int, patience: Patience) -> bytes:
    """Return the content of a file, or of a range of one. Raises Rejected, Failed and SourceError."""

    def read_range() -> bytes:
        with file.open() as stream:  # a byte more than a file had shows that another is in its place
            return stream.read_at(row["num_bytes"] + (row["offset"] is None), row["offset"] or 0)

    file = Location.of(row["path"])
    return read_file(file, max_bytes, patience) if row.get("num_bytes") is None else patience.read(file, read_range)


def _read_rows(table: tuple[str, str], wanted: set[int], patience: Patience) -> dict[int, Any]:
    """Return the values of some rows of a table, given with its column, or their outcomes."""
    path, column = table
    found: dict[int, Any] = {}
    try:
        file = Location.of(path)
        stream = Stream(file, patience)
        if kind_of(path) == "arrow":
            batches = arrow_batches(stream, file, column)
        else:
            parquet = pq.ParquetFile(pa.PythonFile(stream, "r"))
            batches = parquet_batches(stream, parquet, column, lambda rows: not wanted.isdisjoint(rows))
        for rows, values, *_ in batches:
            for row in wanted.intersection(rows):
                found[row] = values if isinstance(values, Rejected) else values[row - rows.start].as_py()
        missing = unreadable(f"'{path}' has fewer rows than when the pool was indexed")
    except (Rejected, Failed) as outcome:
        missing = outcome
    except Exception as error:  # whatever a damaged file makes its reader raise
        missing = unreadable(error)
    return {row: found.get(row, missing) for row in wanted}


def _bytes_of(value: Any) -> bytes:
    """Return the bytes that a value of a table is. Raises the outcome, Rejected or Failed, of one without."""
    if isinstance(value, Rejected | Failed):
        raise value
    image = image_value(value)
    if not isinstance(image, bytes):
        raise unreadable("the row holds no bytes any more")
    return image
