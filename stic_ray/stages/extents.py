"""How a finished index is cut: its shards, from the manifest alone and without Ray."""

from dataclasses import dataclass

from stic_ray.core.rundir import RunDir, shard_name
from stic_ray.core.storage import Location


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
        first, remaining = extent["first_shard"], extent["num_rows"]
        num_bytes = extent.get("max_shard_bytes", 0)
        while remaining and left:
            num_rows = min(shard_size, remaining, left)
            shards.append(IndexShard(first, pool.location / shard_name("index", first), num_rows, num_bytes))
            first, remaining, left = first + 1, remaining - min(shard_size, remaining), left - num_rows
    return shards
