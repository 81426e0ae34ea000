"""Reading every image of a source once: its id, whether it can be used, and where its bytes are found again."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import IO, Any

import pyarrow as pa

from stic_ray.core.config import PoolConfig, RunConfig
from stic_ray.core.errors import Failed, Rejected
from stic_ray.core.rundir import FAILED_FAMILY, REJECTED_FAMILY, RunDir, read_shard, shard_name
from stic_ray.core.schemas import FAILED, REJECTED, Reason, table_of
from stic_ray.core.storage import Location
from stic_ray.method.images import ImageLimits, image_id, inspect
from stic_ray.stages.containers import Reading, images_in
from stic_ray.stages.listing import FAMILY, LISTING, Part
from stic_ray.stages.ordering import SCAN
from stic_ray.stages.reading import Found, Patience
from stic_ray.stages.shards import ShardJob, Shards, ShardTask, run_shards
from stic_ray.stages.source_captions import Captions
from stic_ray.stages.windows import Tables


def scan_parts(
    config: RunConfig, parts: Sequence[Part], num_rows_before: int, listing: RunDir, output: RunDir, scan: RunDir
) -> Shards:
    """Scan the parts that were not scanned yet, each by a task, to `scan`; copies of images go to `output`.

    The `num_rows_before` that the pool has from earlier count when it is judged how many may fail.
    """
    pool, source = config.pool, Location.of(config.pool.source)
    reading = Reading(
        column=pool.image_column,
        max_bytes=ImageLimits.of(pool).max_bytes,
        root=source if source.is_folder() else None,
        allow_outside=pool.allow_outside,
        captions=Captions.of(pool),
        options=source.uri.partition("?")[2],
    )
    job = ShardJob(
        stage="pool",
        output=scan,
        families={"scan": SCAN},
        load=lambda task: pa.Table.from_pylist([dict(task.payload)]),
        make_worker=lambda: partial(_scan_part, pool=pool, reading=reading, listing=listing, output=output),
        max_failed_share=config.cluster.max_failed_share,
        num_rows_before=num_rows_before,
    )
    return run_shards(job, [ShardTask(number, asdict(part)) for number, part in enumerate(parts)], actors=None)


def _scan_part(part: pa.Table, pool: PoolConfig, reading: Reading, listing: RunDir, output: RunDir) -> Tables:
    """Read the images of a part one after the other and say what they are, or why they cannot be used."""
    [given] = [Part(**row) for row in part.to_pylist()]
    shard = read_shard(listing.location / shard_name(FAMILY, given.shard), LISTING)
    files = shard.slice(given.start, given.stop - given.start)
    copies = output.location / f"images-{given.shard:06d}-{given.start:06d}-{given.piece:06d}.bin"
    limits, with_hash = ImageLimits.of(pool), pool.near_duplicate_bits is not None
    accepted, rejected, failed = [], [], []
    with copies.writing() if pool.copy_compressed else nullcontext() as stream:
        for image in images_in(
            files["uri"].to_pylist(), replace(reading, patience=Patience()), given.piece, given.num_pieces
        ):
            encoded = image.encoded
            identity = {"image_id": image_id(encoded if isinstance(encoded, bytes) else b""), "path": image.path}
            try:
                if isinstance(encoded, Rejected | Failed):
                    raise encoded
                facts = inspect(encoded, limits, with_hash=with_hash)
                caption = _caption_of(image, is_optional=pool.captions == "optional")
            except Failed as error:
                failed.append({**identity, "message": error.message})
            except Rejected as error:
                rejected.append({**identity, "reason": error.reason, "message": error.message})
            else:
                place = _place_of(image, encoded, copies, stream)
                accepted.append({**identity, **vars(facts), **place, "num_bytes": len(encoded), "caption": caption})
    return {
        REJECTED_FAMILY: table_of(rejected, REJECTED),
        FAILED_FAMILY: table_of(failed, FAILED),
        "scan": table_of(accepted, SCAN),
    }


def _caption_of(image: Found, *, is_optional: bool) -> str | None:
    """Return an image's caption. Raises Rejected for one that cannot be used, and, if it must be there, without one."""
    if not isinstance(image.caption, Rejected):
        return image.caption
    if is_optional and image.caption.reason == Reason.NO_CAPTION:
        return None
    raise image.caption


def _place_of(
    image: Found, encoded: bytes, copies: Location, stream: pa.NativeFile | IO[bytes] | None
) -> dict[str, Any]:
    """Return where the bytes are found again; with a stream, those that lie compressed in a table are copied to it."""
    if stream is None or image.row is None or image.offset is not None:
        return {"path": image.path, "row": image.row, "offset": image.offset}
    offset = stream.tell()
    stream.write(encoded)
    return {"path": copies.uri, "row": image.row, "offset": offset}
