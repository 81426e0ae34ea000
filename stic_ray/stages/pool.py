"""Stage `pool`: from a source of images to an index in the pool's order.

The source is listed once by a task and cut into parts; each part is scanned by a task (content hash, header, full
decode); what was scanned is ordered by a seeded hash of the image id, without duplicates, and cut into shards. The
pool of size N is the first N images of that order. Every step leaves files below `pool/building`, so a rerun goes on
where it stopped; the driver holds counts and never the pool. Over a finished index the same steps take what is new
in the source and append it.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stic_ray.core.config import PoolConfig, RunConfig
from stic_ray.core.errors import SourceError
from stic_ray.core.placement import tasks_need
from stic_ray.core.rundir import REJECTED_FAMILY, RunDir, read_shard, row_counts, shard_name
from stic_ray.core.schemas import REJECTED
from stic_ray.core.steps import Stage, StepRun
from stic_ray.core.storage import Location
from stic_ray.core.workload import Sizes, Work
from stic_ray.stages import listing
from stic_ray.stages.listing import BUILDING
from stic_ray.stages.near_duplicates import reject_near_duplicates
from stic_ray.stages.ordering import ORDERED, order_images, write_index
from stic_ray.stages.scanning import scan_parts
from stic_ray.stages.tasks import map_tasks

logger = logging.getLogger(__name__)

_FILES_PER_TASK = 64
_INDEX_BYTES = 120
"""Of a row of the index."""


def build_pool(step: StepRun) -> dict[str, Any]:
    """Write index and rejected shards into the step's folder and return the manifest's row accounts.

    What a finished manifest accounts for stays as it is; images that are new in the source go behind it. Raises
    SourceError when the source is missing, empty, or holds no image that can be used.
    """
    config, output = step.config, step.output
    building, before = output / BUILDING, output.manifest or {"extents": [], "rejected_by_reason": {}}
    first_shard = sum(-(-extent["num_rows"] // config.pool.shard_size) for extent in before["extents"])
    parts = listing.read_parts(building)
    if parts is None:
        building.location.delete_folder()
        _delete_behind(output, first_shard, before)
        [parts] = map_tasks(
            "pool", listing.write_listing, [(config.pool.source, config.pool.image_column, building, output)]
        )
    _warn_of_compressed(config.pool, building)
    scan = building / "scan"
    scanned = scan_parts(config.pool, parts, building, output, scan, config.cluster.max_failed_share)
    indexed = [output.location / shard_name("index", number) for number in range(first_shard)]
    ordered = building / ORDERED
    buckets = order_images(config.seed, scan, indexed, ordered)
    sources_of_rejected = [scan, ordered]
    if config.pool.near_duplicate_bits is not None:
        distinct = building / "distinct"
        buckets = reject_near_duplicates(config.pool.near_duplicate_bits, buckets, ordered, indexed, distinct)
        ordered, sources_of_rejected = distinct, [*sources_of_rejected, distinct]
    num_new = sum(bucket.num_rows for bucket in buckets)
    num_images = sum(extent["num_rows"] for extent in before["extents"])
    rejected = _reject(sources_of_rejected, output, before.get("num_rejected_shards", 0))
    reasons = Counter(before["rejected_by_reason"]) + rejected.by_reason
    if not num_images + num_new:
        _finish(building)
        _delete_behind(output, 0, {})
        raise _nothing_to_use(config.pool.source, reasons, rejected.example)
    max_shard_bytes = write_index(buckets, ordered, output, config.pool.shard_size, first_shard, num_images)
    map_tasks("pool", _copy, [(shard, output.location / shard.name) for shard in building.shards(listing.FAMILY)])
    _finish(building)
    extent = {"first_shard": first_shard, "first_position": num_images, "num_rows": num_new}
    extent["max_shard_bytes"] = max_shard_bytes
    num_failed = before.get("num_rows_failed", 0) + scanned.num_failed
    num_rows_in = before.get("num_rows_in", 0) + sum(scanned.num_rows.values()) + scanned.num_failed
    accounts = row_counts(num_rows_in, num_images + num_new, dict(sorted(reasons.items())), num_failed)
    extents = [*before["extents"], *([extent] if num_new else [])]
    num_shards = {"num_rejected_shards": rejected.num_shards, "num_listing_shards": len(output.shards(listing.FAMILY))}
    return {**accounts, "extents": extents, **num_shards}


def _warn_of_compressed(pool: PoolConfig, building: RunDir) -> None:
    [number] = map_tasks("pool", listing.images_read_for_one, [(building, pool.image_column)])
    if number and number > 1 and not pool.copy_compressed:
        logger.warning(
            "pool: images lie in compressed row groups of %d; for each image that is used, later stages read and "
            "decompress up to %d. pool.copy_compressed=true copies them once, so that each is read by itself.",
            number,
            number,
        )


@dataclass(frozen=True)
class _Rejected:
    by_reason: Counter[str]
    num_shards: int
    example: str


def _reject(folders: list[RunDir], output: RunDir, first: int) -> _Rejected:
    """Gather the rejected rows of all steps in shards of `output`, from number `first` on."""
    files = [file for folder in folders for file in folder.shards(REJECTED_FAMILY)]
    groups = [files[start : start + _FILES_PER_TASK] for start in range(0, len(files), _FILES_PER_TASK)]
    gathered = map_tasks("pool", _gather, [(group, output, first + i) for i, group in enumerate(groups)])
    counts = sum((Counter(count) for count, _ in gathered), Counter[str]())
    return _Rejected(counts, first + len(groups), next((example for _, example in gathered if example), ""))


def _gather(files: list[Location], output: RunDir, number: int) -> tuple[Counter[str], str]:
    table = pa.concat_tables([read_shard(file, REJECTED) for file in files])
    if table.num_rows:
        output.write_shard(REJECTED_FAMILY, number, table, REJECTED)
    examples = table.slice(0, 1).to_pylist()
    example = f" For one, '{examples[0]['path']}': {examples[0]['message']}" if examples else ""
    return Counter(table["reason"].to_pylist()), example


def _copy(source: Location, target: Location) -> None:
    target.write(source.read())


def _finish(building: RunDir) -> None:
    """Delete the folder of a build, first the file that would have the build continued."""
    (building.location / listing.PARTS).delete()
    building.location.delete_folder()


def _delete_behind(output: RunDir, num_index_shards: int, before: Mapping[str, Any]) -> None:
    """Delete what an unfinished attempt left behind the shards of `before`: the source may be another by now."""
    accounted = {
        "index": num_index_shards,
        REJECTED_FAMILY: before.get("num_rejected_shards", 0),
        listing.FAMILY: before.get("num_listing_shards", 0),
    }
    for family, number in accounted.items():
        for shard in output.shards(family):
            if shard.name >= shard_name(family, number):
                shard.delete()


def _nothing_to_use(source: str, reasons: Counter[str], example: str) -> SourceError:
    if not reasons:
        return SourceError(f"pool.source='{source}' is empty: its tables and tar files hold no images.")
    counts = ", ".join(f"{number} {reason}" for reason, number in sorted(reasons.items()))
    return SourceError(f"pool.source='{source}' holds no image that can be used: {counts}.{example}")


def _check_source(step: StepRun) -> None:
    source = step.config.pool.source
    if not Location.of(source).exists():
        raise SourceError(f"pool.source='{source}' does not exist.")


def _work(config: RunConfig, sizes: Sizes) -> Work | None:
    if not sizes.num_images:
        return None
    copied = sizes.image_bytes if config.pool.copy_compressed else 0
    return Work(sizes.num_images, storage_bytes=sizes.num_images * (_INDEX_BYTES + copied))


POOL = Stage(
    name="pool",
    run=build_pool,
    settings=("seed", "pool"),
    need=tasks_need,
    writes="index-*.parquet",
    section="pool",
    sources=("pool.source",),
    check=_check_source,
    loads_model=lambda config: False,
    work=_work,
    amount="num_images",
    amount_in_manifest="num_rows_written",
    grows=True,
)
