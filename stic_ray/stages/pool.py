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
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from stic_ray.core.config import PoolConfig, RunConfig, is_toy
from stic_ray.core.errors import SourceError
from stic_ray.core.placement import tasks_need
from stic_ray.core.rundir import FAILED_FAMILY, REJECTED_FAMILY, ROWS_NOW, RunDir, read_shard, row_counts, shard_name
from stic_ray.core.schemas import FAILED, REJECTED
from stic_ray.core.steps import Stage, StepRun
from stic_ray.core.storage import Location
from stic_ray.core.workload import Sizes, Work
from stic_ray.stages import listing
from stic_ray.stages.listing import BUILDING, FAMILY, LISTING
from stic_ray.stages.ordering import ORDERED, order_images, reject_near_duplicates, write_index
from stic_ray.stages.scanning import scan_parts
from stic_ray.stages.tasks import map_tasks

logger = logging.getLogger(__name__)

_BUILT = "built.json"
"""What the last build returned for the manifest, with its settings."""
_FILES_PER_TASK = 64
_INDEX_BYTES = 120
"""Of a row of the index."""


def build_pool(step: StepRun) -> dict[str, Any]:
    """Write index and rejected shards into the step's folder and return the manifest's row accounts.

    What a finished manifest accounts for stays as it is; images that are new in the source go behind it. Raises
    SourceError when the source is missing, empty, or holds no image that can be used.
    """
    config, output, building = step.config, step.output, step.output / BUILDING
    if (built := finished_build(config, output)) is not None:
        building.location.delete_folder()
        return {**built, ROWS_NOW: 0}
    before = {**row_counts(0, 0, {}), "extents": [], **(output.manifest or {})}
    num_rows_before = before["num_rows_in"] - before["num_rows_failed"]  # those that failed are tried again
    num_images = sum(extent["num_rows"] for extent in before["extents"])
    first_shard = sum(-(-extent["num_rows"] // config.pool.shard_size) for extent in before["extents"])
    parts = listing.read_parts(building)
    if parts is None:
        building.location.delete_folder()
        _delete_behind(output, first_shard, before)
        [parts] = map_tasks("pool", listing.write_listing, [(config.pool, building, output)])
    scan, ordered, distinct = (building / name for name in ("scan", ORDERED, "distinct"))
    scanned = scan_parts(config, parts, num_rows_before, building, output, scan)
    if scanned.throughput is not None:  # what was ordered before may lack rows that had failed
        _delete_behind(output, first_shard, before)
        ordered.location.delete_folder()
        distinct.location.delete_folder()
    indexed = [output.location / shard_name("index", number) for number in range(first_shard)]
    num_scanned = scanned.num_rows.get("scan", 0)
    counts, last = order_images(config.seed, scan, indexed, num_images + num_scanned, ordered), ordered
    if (max_bits := config.pool.near_duplicate_bits) is not None:
        counts, last = reject_near_duplicates(max_bits, counts, ordered, indexed, num_images, distinct), distinct
    num_new = sum(counts)
    rejected, example = _gather_rejected([scan, ordered, distinct], output, before.get("num_rejected_shards", 0))
    reasons = dict(sorted((Counter(before["rejected_by_reason"]) + rejected).items()))
    if not num_images + num_new:
        _finish(building)
        _delete_behind(output, 0, {})
        raise _nothing_to_use(config.pool.source, reasons, example)
    extent = {"first_shard": first_shard, "first_position": num_images, "num_rows": num_new}
    ordering = (counts, last, output, config.pool.shard_size, first_shard, num_images)
    extent["max_shard_bytes"], num_captions = write_index(*ordering)
    num_captions += before.get("num_captions", 0)
    if config.pool.has_captions and not num_captions:
        _finish(building)
        _delete_behind(output, 0, {})
        raise _no_captions(config.pool)
    failed = scan.shards(FAILED_FAMILY)
    map_tasks("pool", _copy_listing, [(building, number, failed, output) for number in building.shard_numbers(FAMILY)])
    num_rows_in = num_rows_before + sum(scanned.num_rows.values()) + scanned.num_failed
    extents = [*before["extents"], *([extent] if num_new else [])]
    accounts = row_counts(num_rows_in, num_images + num_new, reasons, scanned.num_failed)
    accounts |= _beside(output, extents) | ({"num_captions": num_captions} if config.pool.has_captions else {})
    output.write_json(_BUILT, {"settings": _settings(config), "accounts": accounts})
    _finish(building)
    return {**accounts, ROWS_NOW: scanned.num_rows_now}


def _beside(output: RunDir, extents: list[dict[str, int]]) -> dict[str, Any]:
    """Return what a manifest has beside the row accounts."""
    return {
        "extents": extents,
        "num_rejected_shards": 1 + max(output.shard_numbers(REJECTED_FAMILY), default=-1),
        "num_listing_shards": len(output.shards(FAMILY)),
    }


def finished_build(config: RunConfig, output: RunDir) -> dict[str, Any] | None:
    """Return the accounts of a build that is whole and waits for its manifest, as a kill between the two leaves it."""
    built = output.read_json(_BUILT) or {}
    num_known = (output.manifest or {}).get("num_listing_shards", 0)
    is_newer = built.get("settings") == _settings(config) and built["accounts"]["num_listing_shards"] > num_known
    return built["accounts"] if is_newer else None


def takes_in_more(config: RunConfig, pool: RunDir, *, has_trained: bool) -> bool:
    """Whether the source has new images that this run can still use; logs how the source differs from the index."""
    asked = config.preferences.num_images
    manifest = pool.manifest
    if manifest is None or is_toy(config.pool.source):
        return False
    if (pool / BUILDING).location.is_folder() or finished_build(config, pool) is not None:
        return True  # begun, and stopped before its manifest
    change = _change_of(config.pool.source, pool, manifest["num_listing_shards"])
    if change.num_changed or change.num_gone:
        logger.warning(
            "pool: of the source's files %d have changed and %d are gone; the index stays as it is, and images that "
            "cannot be read any more become rejected rows",
            change.num_changed,
            change.num_gone,
        )
    if not change.num_new:
        return False
    if has_trained:
        stays = "this run has begun to train and stays with the images it has; another --run takes all"
    elif asked is not None and asked <= manifest["num_rows_written"]:
        stays = f"this run has the {asked} images that preferences.num_images asks for and stays with them"
    else:
        logger.info("pool: %d files are new in the source; their images go behind those that are there", change.num_new)
        return True
    logger.warning("pool: %d files are new in the source; %s", change.num_new, stays)
    return False


def _change_of(source: str, pool: RunDir, num_shards: int) -> listing.Change:
    """Compare a source with the pool's listing; one that cannot be listed any more leaves the pool as it is.

    The names are listed in a process of their own, so that the driver never holds those of a whole pool.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        try:
            return process.submit(listing.compare, source, pool, num_shards).result()
        except (SourceError, OSError) as error:
            logger.warning("pool: the source cannot be compared with the index, which stays as it is: %s", error)
            return listing.Change()


def _settings(config: RunConfig) -> dict[str, Any]:
    return {"seed": config.seed, "pool": config.pool.model_dump(mode="json")}


def _gather_rejected(folders: list[RunDir], output: RunDir, first: int) -> tuple[Counter[str], str]:
    """Gather the rejected rows of all steps in shards of `output`, from number `first` on.

    Returns their number by reason, and a sentence about one of them.
    """
    files = [file for folder in folders for file in folder.shards(REJECTED_FAMILY)]
    groups = [files[start : start + _FILES_PER_TASK] for start in range(0, len(files), _FILES_PER_TASK)]
    gathered = map_tasks("pool", _gather, [(group, output, first + i) for i, group in enumerate(groups)])
    reasons = sum((reasons for reasons, _ in gathered), Counter[str]())
    return reasons, next((example for _, example in gathered if example), "")


def _gather(files: list[Location], output: RunDir, number: int) -> tuple[Counter[str], str]:
    table = pa.concat_tables([read_shard(file, REJECTED) for file in files])
    if table.num_rows:
        output.write_shard(REJECTED_FAMILY, number, table, REJECTED)
    examples = table.slice(0, 1).to_pylist()
    example = f" For one, '{examples[0]['path']}': {examples[0]['message']}" if examples else ""
    return Counter(table["reason"].to_pylist()), example


def _copy_listing(building: RunDir, number: int, failed: list[Location], output: RunDir) -> None:
    """Copy a shard of the listing without the files that failed, so that the next command finds them new."""
    table = read_shard(building.location / shard_name(FAMILY, number), LISTING)
    paths = pa.schema([FAILED.field("path")])
    again = pa.concat_tables([paths.empty_table(), *(read_shard(file, paths) for file in failed)])
    output.write_shard(FAMILY, number, table.filter(~pc.field("uri").isin(again["path"].combine_chunks())), LISTING)


def _finish(building: RunDir) -> None:
    """Delete the folder of a build, first the file that would have the build continued."""
    (building.location / listing.PARTS).delete()
    building.location.delete_folder()


def _delete_behind(output: RunDir, num_index_shards: int, before: Mapping[str, Any]) -> None:
    """Delete what an unfinished attempt left behind the shards of `before`: the source may be another by now."""
    accounted = {
        "index": num_index_shards,
        REJECTED_FAMILY: before.get("num_rejected_shards", 0),
        FAMILY: before.get("num_listing_shards", 0),
    }
    for family, number in accounted.items():
        for shard in output.shards(family):
            if shard.name >= shard_name(family, number):
                shard.delete()


def _nothing_to_use(source: str, reasons: Mapping[str, int], example: str) -> SourceError:
    if not reasons:
        return SourceError(f"pool.source='{source}' is empty: its tables and tar files hold no images.")
    counts = ", ".join(f"{number} {reason}" for reason, number in reasons.items())
    return SourceError(f"pool.source='{source}' holds no image that can be used: {counts}.{example}")


def _no_captions(pool: PoolConfig) -> SourceError:
    given = [f"pool.{name}={value}" for name in ("caption_column", "caption_member") if (value := getattr(pool, name))]
    return SourceError(
        f"No image of pool.source='{pool.source}' has a caption by {' and '.join(given)}. Name where captions are, or "
        "leave out these settings."
    )


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
