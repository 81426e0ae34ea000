"""Rejecting near-duplicates: images whose perceptual hash is close to that of an image earlier in the order.

The rule looks at two images only, so it depends on no worker and no layout, and a pool that grows behind its end
keeps all that it had. Each mask of `method.near_duplicates` is a task that holds the hashes of the whole pool, about
60 bytes per image; the buckets then take out what was found.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from stic_ray.core.rundir import REJECTED_FAMILY, RunDir, read_shard, shard_name
from stic_ray.core.schemas import REJECTED, Reason, table_of
from stic_ray.core.storage import Location
from stic_ray.method.near_duplicates import NUM_BITS, Array, block_masks, earlier_neighbours
from stic_ray.stages.ordering import ORDERED, SCAN, Bucket, count_rows
from stic_ray.stages.tasks import map_tasks

pc: Any = pyarrow.compute
"""Its functions are made when it is imported, which type checkers cannot see."""

_HASHED = pa.schema([("image_id", pa.string()), ("perceptual_hash", pa.int64())])
_CLOSE = pa.schema([("rank", pa.int64()), ("close_to", pa.string()), ("distance", pa.int64())])
_NUM_TASKS = 64


def reject_near_duplicates(
    max_bits: int, buckets: list[Bucket], ordered: RunDir, indexed: list[Location], output: RunDir
) -> list[Bucket]:
    """Write the ordered images without near-duplicates, and these as rejected rows, to `output`.

    The images of the shards `indexed` come before all others in the order.
    """
    files = [*indexed, *(ordered.location / shard_name(ORDERED, bucket.number) for bucket in buckets)]
    num_indexed = sum(map_tasks("pool", count_rows, [(indexed[i : i + 64],) for i in range(0, len(indexed), 64)]))
    masks = block_masks(max_bits, num_indexed + sum(bucket.num_rows for bucket in buckets))
    shares = [masks[first::_NUM_TASKS] for first in range(min(_NUM_TASKS, len(masks)))]
    map_tasks("pool", _find, [(files, share, max_bits, number, output) for number, share in enumerate(shares)])
    tasks, begin = [], num_indexed
    for bucket in buckets:
        tasks.append((bucket, begin, len(shares), ordered, output))
        begin += bucket.num_rows
    counts = map_tasks("pool", _take_out, tasks)
    return [Bucket(bucket.number, count) for bucket, count in zip(buckets, counts, strict=True)]


def _find(files: list[Location], masks: list[int], max_bits: int, number: int, output: RunDir) -> None:
    """Write which images have an earlier neighbour under these masks, by their rank in the order."""
    if (output.location / shard_name("close", number)).exists():
        return
    hashed = pa.concat_tables([read_shard(file, _HASHED) for file in files])
    identities = hashed["image_id"]
    hashes = hashed["perceptual_hash"].to_numpy().view(np.uint64)
    # Equal hashes are merged first: thousands of blank pages would otherwise be compared with one another.
    distinct, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(hashes)))
    found = [(again, first[inverse][again])]
    ranks = np.sort(first)
    for mask in masks:
        places, neighbours = earlier_neighbours(hashes[ranks], mask, max_bits)
        found.append((ranks[places], ranks[neighbours]))
    close, to = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(close, kind="stable")
    close, to = close[order], to[order]
    distances = np.bitwise_count(hashes[close] ^ hashes[to]).astype(np.int64)
    table = pa.table([close, identities.take(pa.array(to)), distances], schema=_CLOSE)
    output.write_shard("close", number, table, _CLOSE)


def _take_out(bucket: Bucket, begin: int, num_finds: int, ordered: RunDir, output: RunDir) -> int:
    """Take the near-duplicates out of a bucket whose first row has the rank `begin`; return how many rows remain."""
    rows = read_shard(ordered.location / shard_name(ORDERED, bucket.number), SCAN)
    within = (pc.field("rank") >= begin) & (pc.field("rank") < begin + bucket.num_rows)
    tables = []
    for number in range(num_finds):
        with (output.location / shard_name("close", number)).open() as stream:
            tables.append(pq.read_table(stream, filters=within, schema=_CLOSE))
    # Of several neighbours the nearest is named.
    close = pa.concat_tables(tables).sort_by([(name, "ascending") for name in ("rank", "distance", "close_to")])
    ranks, first = np.unique(close["rank"].to_numpy(), return_index=True)
    rejected = [
        {**row, "reason": Reason.NEAR_DUPLICATE, "message": _describe(**near)}
        for row, near in zip(
            rows.select(["image_id", "path"]).take(pa.array(ranks - begin)).to_pylist(),
            close.select(["close_to", "distance"]).take(pa.array(first)).to_pylist(),
            strict=True,
        )
    ]
    keep: Array = np.ones(rows.num_rows, bool)
    keep[ranks - begin] = False
    output.write_shard(REJECTED_FAMILY, bucket.number, table_of(rejected, REJECTED), REJECTED)
    output.write_shard(ORDERED, bucket.number, rows.filter(pa.array(keep)), SCAN)
    return int(keep.sum())


def _describe(close_to: str, distance: int) -> str:
    return f"{distance} of {NUM_BITS} bits from image {close_to}, which comes earlier"
