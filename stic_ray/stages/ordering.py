"""From scanned images to the index: the pool's order, without duplicates, cut into shards.

A shuffle through files. A task gathers the rows of some scanned parts and splits them into buckets by the leading
bits of their place in the order, a seeded hash of the image id; a second task per bucket sorts it and rejects
duplicates, which share an id and so a bucket; when all buckets are counted, a third writes the shards that begin in
the bucket. No process holds more than a bucket or a group of parts, and the driver holds counts.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from stic_ray.core.randomness import seed_for
from stic_ray.core.rundir import REJECTED_FAMILY, RunDir, read_shard, shard_name
from stic_ray.core.schemas import INDEX, REJECTED, Reason, table_of
from stic_ray.core.storage import Location
from stic_ray.stages.tasks import map_tasks

pc: Any = pyarrow.compute
"""Its functions are made when it is imported, which type checkers cannot see."""

SCAN = pa.schema([field for field in INDEX if field.name != "position"], metadata=INDEX.metadata)
"""An image of the source that can be used."""

_KEYED = pa.schema([*INDEX, pa.field("key", pa.int64())])
"""A row on its way: images that are in the index already have a position, new ones have none."""

ORDERED = "ordered"
_ROWS_PER_BUCKET = 50_000
_FILES_PER_GROUP = 64
_KEY_BITS = 63


@dataclass(frozen=True)
class Bucket:
    """A part of the order: its number and how many new images it has, without duplicates."""

    number: int
    num_rows: int


def order_images(seed: int, scan: RunDir, indexed: list[Location], output: RunDir) -> list[Bucket]:
    """Order the rows of `scan` that are not in the shards `indexed`; return the buckets written to `output`.

    Leaves `ordered-*.parquet` and `rejected-*.parquet` (duplicates) per bucket. What is there is not made again.
    """
    files = [*indexed, *scan.shards("scan")]
    groups = [files[start : start + _FILES_PER_GROUP] for start in range(0, len(files), _FILES_PER_GROUP)]
    num_rows = sum(map_tasks("pool", count_rows, [(group,) for group in groups]))
    num_buckets = max(1, math.ceil(num_rows / _ROWS_PER_BUCKET))
    split = [(seed, group, num_buckets, output.location / f"group-{i:06d}.arrow") for i, group in enumerate(groups)]
    map_tasks("pool", _split, split)
    parts = [place for *_, place in split]
    counts = map_tasks("pool", _sort_bucket, [(parts, number, output) for number in range(num_buckets)])
    return [Bucket(number, count) for number, count in enumerate(counts)]


def write_index(
    buckets: list[Bucket], ordered: RunDir, output: RunDir, shard_size: int, first_shard: int, first_position: int
) -> int:
    """Write the ordered images as index shards behind those that are there; return the bytes of the largest one."""
    begins = [0]
    for bucket in buckets:
        begins.append(begins[-1] + bucket.num_rows)
    tasks = []
    for bucket, begin in zip(buckets, begins, strict=False):
        shards = range(math.ceil(begin / shard_size), math.ceil((begin + bucket.num_rows) / shard_size))
        if bucket.num_rows and shards:
            reach = shards.stop * shard_size  # the last shard may go on in the buckets behind
            needed = [
                b.number for b, at in zip(buckets, begins, strict=False) if at < reach and b.number >= bucket.number
            ]
            tasks.append((needed, begin, shards, ordered, output, shard_size, first_shard, first_position))
    return max(map_tasks("pool", _write_shards, tasks), default=0)


def count_rows(files: list[Location]) -> int:
    """Count the rows of Parquet files from their footers."""
    total = 0
    for file in files:
        with file.open() as stream:
            total += pq.read_metadata(stream).num_rows
    return total


def _split(seed: int, files: list[Location], num_buckets: int, target: Location) -> None:
    """Write the rows of some files as an Arrow file with one record batch per bucket."""
    if target.exists():
        return
    rows = pa.concat_tables([_keyed(seed, file) for file in files])
    numbers = np.array([bucket_of(key, num_buckets) for key in rows["key"].to_pylist()], np.int64)
    order = np.argsort(numbers, kind="stable")
    rows = rows.take(pa.array(order)).combine_chunks()
    edges = np.searchsorted(numbers[order], np.arange(num_buckets + 1))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, _KEYED) as writer:
        for begin, end in zip(edges[:-1], edges[1:], strict=True):
            batches = rows.slice(begin, end - begin).to_batches()
            writer.write_batch(batches[0] if batches else _no_rows())
    target.write(sink.getvalue())


def bucket_of(key: int, num_buckets: int) -> int:
    """Return the bucket of a key: buckets are ranges of keys, in their order."""
    return key * num_buckets >> _KEY_BITS


def _no_rows() -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([], schema=_KEYED)


def _keyed(seed: int, file: Location) -> pa.Table:
    is_indexed = file.name.startswith("index-")
    rows = read_shard(file, INDEX if is_indexed else SCAN)
    if not is_indexed:
        rows = rows.append_column(INDEX.field("position"), pa.nulls(rows.num_rows, pa.int64()))
    keys = [seed_for(seed, identity, "order") for identity in rows["image_id"].to_pylist()]
    return rows.append_column("key", pa.array(keys, pa.int64())).select(_KEYED.names).cast(_KEYED)


def _sort_bucket(parts: list[Location], number: int, output: RunDir) -> int:
    """Sort a bucket, reject what is in it twice, and return how many new images remain."""
    target = output.location / shard_name(ORDERED, number)
    if target.exists():
        return count_rows([target])
    batches = []
    for part in parts:
        with part.open() as stream:
            batches.append(pa.ipc.open_file(stream).get_batch(number))
    rows = pa.Table.from_batches(batches, schema=_KEYED)
    # Of equal images one that is in the index stays (nulls sort last), else the first in the source.
    rows = rows.sort_by([(name, "ascending") for name in ("image_id", "position", "path", "row", "offset")])
    identities = rows["image_id"].combine_chunks()
    if rows.num_rows:
        is_first = pa.concat_arrays([pa.array([True]), pc.not_equal(identities[1:], identities[:-1])])
        output.write_shard(REJECTED_FAMILY, number, _duplicates(rows, np.asarray(is_first)), REJECTED)
        rows = rows.filter(pc.and_(is_first, pc.is_null(rows["position"])))
    rows = rows.sort_by([("key", "ascending"), ("image_id", "ascending")])
    output.write_shard(ORDERED, number, rows.select(SCAN.names), SCAN)
    return rows.num_rows


def _duplicates(rows: pa.Table, is_first: np.ndarray) -> pa.Table:
    """Return the new rows behind the first of each id as rejected rows that name it."""
    originals = np.maximum.accumulate(np.where(is_first, np.arange(len(is_first)), 0))
    again = np.flatnonzero(~is_first & np.asarray(pc.is_null(rows["position"])))
    paths = rows["path"].take(originals[again]).to_pylist()
    twice = rows.select(["image_id", "path"]).take(again).to_pylist()
    return table_of(
        [
            {**row, "reason": Reason.DUPLICATE, "message": f"same bytes as '{path}'"}
            for row, path in zip(twice, paths, strict=True)
        ],
        REJECTED,
    )


def _write_shards(
    needed: list[int],
    begin: int,
    shards: range,
    ordered: RunDir,
    output: RunDir,
    shard_size: int,
    first_shard: int,
    first_position: int,
) -> int:
    """Write the shards that begin in the first of the needed buckets, whose first row is `begin` of the new rows.

    Returns how many bytes the images of the largest of them have.
    """
    max_shard_bytes = 0
    rows = pa.concat_tables([read_shard(ordered.location / shard_name(ORDERED, n), SCAN) for n in needed])
    for shard in shards:
        table = rows.slice(shard * shard_size - begin, shard_size)
        positions = first_position + shard * shard_size + np.arange(table.num_rows)
        table = table.append_column(INDEX.field("position"), pa.array(positions, pa.int64()))
        output.write_shard("index", first_shard + shard, table, INDEX)
        max_shard_bytes = max(max_shard_bytes, pc.sum(table["num_bytes"]).as_py())
    return max_shard_bytes
