"""From scanned images to the index: the pool's order, without duplicates, cut into shards.

A shuffle through files. A task gathers the rows of some scanned parts and splits them into buckets by the leading
bits of their place in the order, a seeded hash of the image id; a second task per bucket sorts it and rejects
duplicates, which share an id and so a bucket; when all buckets are counted, a third writes the shards that begin in
the bucket. No process holds more than a bucket or a group of parts, and the driver holds counts.

Near-duplicates are images whose perceptual hash is close to that of an image earlier in the order. The rule looks at
two images only, so it depends on no worker and no layout, and a pool that grows behind its end keeps all that it had.
Each mask of `method.near_duplicates` is a task that holds the hashes of the whole pool, about 60 bytes per image; the
buckets then take out what was found.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stic_ray.core.randomness import seed_for
from stic_ray.core.rundir import REJECTED_FAMILY, RunDir, read_shard, shard_name
from stic_ray.core.schemas import INDEX, REJECTED, Reason, table_of
from stic_ray.core.storage import Location
from stic_ray.method.near_duplicates import NUM_BITS, block_masks, earlier_neighbours
from stic_ray.stages.tasks import map_tasks

SCAN = pa.schema([field for field in INDEX if field.name != "position"], metadata=INDEX.metadata)
"""An image of the source that can be used."""
ORDERED = "ordered"

_KEYED = pa.schema([*INDEX, pa.field("key", pa.int64())])
"""A row on its way: images that are in the index already have a position, new ones have none."""
_KEY_BITS = 63
_HASHED = pa.schema([("image_id", pa.string()), ("perceptual_hash", pa.int64())])
_CLOSE = pa.schema([("rank", pa.int64()), ("close_to", pa.string()), ("distance", pa.int64())])
_ROWS_PER_BUCKET = 50_000
_FILES_PER_GROUP = 64
_NUM_SEARCHES = 64
"""Tasks that look for near-duplicates."""


@dataclass(frozen=True)
class IndexShard:
    """A shard of the index, and how many of its images are used."""

    number: int
    location: Location
    num_rows: int
    num_bytes: int
    """At most so many bytes of images; 0 where the manifest does not say it."""


def index_shards(pool: RunDir, shard_size: int, num_images: int | None = None) -> list[IndexShard]:
    """Return the shards of a finished index that hold the first `num_images` images (all when None).

    The last shard of each time that the pool was built or grown may be short. No file is read but the manifest.
    """
    manifest = pool.manifest
    assert manifest is not None, "the pool is finished before its index is read"
    shards, left = [], manifest["num_rows_written"] if num_images is None else num_images
    for extent in manifest["extents"]:
        for number, begin in enumerate(range(0, extent["num_rows"], shard_size), start=extent["first_shard"]):
            num_rows = min(shard_size, extent["num_rows"] - begin, left)
            if num_rows:
                file = pool.location / shard_name("index", number)
                shards.append(IndexShard(number, file, num_rows, extent.get("max_shard_bytes", 0)))
                left -= num_rows
    return shards


def order_images(seed: int, scan: RunDir, indexed: list[Location], num_rows: int, output: RunDir) -> list[int]:
    """Order the rows of `scan` that are not in the shards `indexed`; return how many each bucket in `output` has.

    Both have `num_rows` together. Leaves `ordered-*.parquet` and `rejected-*.parquet` (duplicates) per bucket. What is
    there is not made again.
    """
    files = [*indexed, *scan.shards("scan")]
    num_buckets = max(1, math.ceil(num_rows / _ROWS_PER_BUCKET))
    starts = range(0, len(files), _FILES_PER_GROUP)
    groups = [output.location / f"group-{start:06d}.arrow" for start in starts]
    splits = zip(starts, groups, strict=True)
    map_tasks("pool", _split, [(seed, files[at : at + _FILES_PER_GROUP], num_buckets, group) for at, group in splits])
    return map_tasks("pool", _sort_bucket, [(groups, number, output) for number in range(num_buckets)])


def _split(seed: int, files: list[Location], num_buckets: int, target: Location) -> None:
    """Write the rows of some files as an Arrow file with one record batch per bucket: a range of keys."""
    if target.exists():
        return
    rows = pa.concat_tables([_keyed(seed, file) for file in files]).sort_by("key")
    buckets = [key * num_buckets >> _KEY_BITS for key in rows["key"].to_pylist()]
    edges = np.searchsorted(buckets, np.arange(num_buckets + 1))
    batch = pa.RecordBatch.from_arrays([column.combine_chunks() for column in rows.columns], schema=_KEYED)
    with target.writing() as sink, pa.ipc.new_file(sink, _KEYED) as writer:
        for begin, end in pairwise(edges):
            writer.write_batch(batch.slice(begin, end - begin))


def _keyed(seed: int, file: Location) -> pa.Table:
    is_indexed = file.name.startswith("index-")
    rows = read_shard(file, INDEX if is_indexed else SCAN)
    if not is_indexed:
        rows = rows.append_column(INDEX.field("position"), pa.nulls(rows.num_rows, pa.int64()))
    keys = [seed_for(seed, identity, "order") for identity in rows["image_id"].to_pylist()]
    return rows.append_column("key", pa.array(keys, pa.int64())).select(_KEYED.names).cast(_KEYED)


def _sort_bucket(groups: list[Location], number: int, output: RunDir) -> int:
    """Sort a bucket, reject what is in it twice, and return how many new images remain."""
    target = output.location / shard_name(ORDERED, number)
    if target.exists():
        with target.open() as stream:
            return pq.read_metadata(stream).num_rows
    batches = []
    for group in groups:
        with group.open() as stream:
            batches.append(pa.ipc.open_file(stream).get_batch(number))
    # Of equal images one that is in the index stays (nulls sort last), else the first in the source.
    order = [(name, "ascending") for name in ("image_id", "position", "path", "row", "offset")]
    rows = pa.Table.from_batches(batches, schema=_KEYED).sort_by(order)
    is_kept, rejected, first = [], [], {}
    for row in rows.select(["image_id", "path", "position"]).to_pylist():
        is_new, is_again = row.pop("position") is None, row["image_id"] == first.get("image_id")
        first = first if is_again else row
        is_kept.append(is_new and not is_again)
        if is_new and is_again:
            rejected.append({**row, "reason": Reason.DUPLICATE, "message": f"same bytes as '{first['path']}'"})
    output.write_shard(REJECTED_FAMILY, number, table_of(rejected, REJECTED), REJECTED)
    rows = rows.filter(pa.array(is_kept, pa.bool_())).sort_by([("key", "ascending"), ("image_id", "ascending")])
    output.write_shard(ORDERED, number, rows.select(SCAN.names), SCAN)
    return rows.num_rows


def reject_near_duplicates(
    max_bits: int, counts: list[int], ordered: RunDir, indexed: list[Location], num_indexed: int, output: RunDir
) -> list[int]:
    """Write the ordered images without near-duplicates, and these as rejected rows, to `output`; return new counts.

    The `num_indexed` images of the shards `indexed` come before all others in the order.
    """
    files = [*indexed, *(ordered.location / shard_name(ORDERED, number) for number in range(len(counts)))]
    *begins, num_rows = accumulate(counts, initial=num_indexed)
    masks = block_masks(max_bits, num_rows)
    shares = [masks[first::_NUM_SEARCHES] for first in range(min(_NUM_SEARCHES, len(masks)))]
    map_tasks("pool", _find_close, [(files, share, max_bits, number, output) for number, share in enumerate(shares)])
    buckets = [(number, begin, len(shares), ordered, output) for number, begin in enumerate(begins)]
    return map_tasks("pool", _take_out_close, buckets)


def _find_close(files: list[Location], masks: list[int], max_bits: int, number: int, output: RunDir) -> None:
    """Write which images have an earlier neighbour under these masks, by their rank in the order."""
    if (output.location / shard_name("close", number)).exists():
        return
    hashed = pa.concat_tables([read_shard(file, _HASHED) for file in files])
    hashes = hashed["perceptual_hash"].to_numpy().view(np.uint64)
    # Equal hashes are merged first: thousands of blank pages would otherwise be compared with one another.
    _, first, inverse = np.unique(hashes, return_index=True, return_inverse=True)
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
    table = pa.table([close, hashed["image_id"].take(pa.array(to)), distances], schema=_CLOSE)
    output.write_shard("close", number, table, _CLOSE)


def _take_out_close(bucket: int, begin: int, num_searches: int, ordered: RunDir, output: RunDir) -> int:
    """Take the near-duplicates out of a bucket whose first row has the rank `begin`; return how many rows remain."""
    rows = read_shard(ordered.location / shard_name(ORDERED, bucket), SCAN)
    within = (pc.field("rank") >= begin) & (pc.field("rank") < begin + rows.num_rows)
    tables = []
    for number in range(num_searches):
        with (output.location / shard_name("close", number)).open() as stream:
            tables.append(pq.read_table(stream, filters=within, schema=_CLOSE))
    # Of several neighbours the nearest is named.
    close = pa.concat_tables(tables).sort_by([(name, "descending") for name in ("rank", "distance", "close_to")])
    nearest = {each["rank"] - begin: each for each in close.to_pylist()}
    images = rows.select(["image_id", "path"]).to_pylist()
    rejected = [
        {
            **images[place],
            "reason": Reason.NEAR_DUPLICATE,
            "message": f"{near['distance']} of {NUM_BITS} bits from image {near['close_to']}, which comes earlier",
        }
        for place, near in sorted(nearest.items())
    ]
    rows = rows.filter(pa.array([place not in nearest for place in range(rows.num_rows)], pa.bool_()))
    output.write_shard(REJECTED_FAMILY, bucket, table_of(rejected, REJECTED), REJECTED)
    output.write_shard(ORDERED, bucket, rows, SCAN)
    return rows.num_rows


def write_index(
    counts: list[int], ordered: RunDir, output: RunDir, shard_size: int, first_shard: int, first_position: int
) -> tuple[int, int]:
    """Write the ordered images as index shards behind those that are there.

    Returns the bytes of the largest one, and how many of the images have a caption.
    """
    begins = list(accumulate(counts, initial=0))
    tasks: list[tuple[Any, ...]] = []
    for number, (begin, end) in enumerate(pairwise(begins)):
        shards = range(math.ceil(begin / shard_size), math.ceil(end / shard_size))
        if shards:  # the last of them may go on in the buckets behind
            needed = range(number, bisect_left(begins, min(shards.stop * shard_size, begins[-1])))
            tasks.append((needed, begin, shards, ordered, output, shard_size, first_shard, first_position))
    written = map_tasks("pool", _write_shards, tasks)
    return max((size for size, _ in written), default=0), sum(num_captions for _, num_captions in written)


def _write_shards(
    needed: range,
    begin: int,
    shards: range,
    ordered: RunDir,
    output: RunDir,
    shard_size: int,
    first_shard: int,
    first_position: int,
) -> tuple[int, int]:
    """Write the shards that begin in the first of the needed buckets, whose first row is `begin` of the new rows.

    Returns how many bytes the images of the largest of them have, and how many images have a caption.
    """
    sizes, num_captions = [], 0
    rows = pa.concat_tables([read_shard(ordered.location / shard_name(ORDERED, number), SCAN) for number in needed])
    for shard in shards:
        table = rows.slice(shard * shard_size - begin, shard_size)
        positions = first_position + shard * shard_size + np.arange(table.num_rows)
        table = table.append_column(INDEX.field("position"), pa.array(positions, pa.int64()))
        output.write_shard("index", first_shard + shard, table, INDEX)
        sizes.append(sum(table["num_bytes"].to_pylist()))
        num_captions += table.num_rows - table["caption"].null_count
    return max(sizes), num_captions
