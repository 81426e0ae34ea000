"""Stage `pool`: from a source of images to an index in the pool's order.

Each part of the source is read once by a task (content hash, header, full decode); the parts are then merged:
duplicates are rejected, the rest is ordered by a seeded hash of the image id and cut into shards. The pool of
size N is the first N images of that order.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from stic_ray.core.config import PoolConfig, RunConfig
from stic_ray.core.errors import SourceError, nearest
from stic_ray.core.randomness import seed_for
from stic_ray.core.rundir import REJECTED_FAMILY, RunDir, digest, row_counts
from stic_ray.core.schemas import INDEX, REJECTED, Reason, table_of
from stic_ray.core.storage import Location
from stic_ray.method.images import ImageLimits, ImageRejected, image_id, inspect
from stic_ray.stages.fetch import read_row_group
from stic_ray.stages.shards import ShardJob, ShardTask, Tables, run_shards

_FILES_PER_SCAN = 256
_BYTES_PER_SCAN = 256 * 2**20

_SCAN = pa.schema([field for field in INDEX if field.name != "position"], metadata=INDEX.metadata)
_IMAGES = pa.schema(
    [
        ("path", pa.string()),
        ("row", pa.int64()),
        ("bytes", pa.large_binary()),
        ("error", pa.string()),
    ]
)


def build_pool(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Write index and rejected shards below `run`/pool and return the manifest's row accounts.

    Raises SourceError when the source is missing, empty, or holds no image that can be used.
    """
    output = run / "pool"
    source = Location.of(config.pool.source)
    tasks = _scan_tasks(source, config.pool)
    state = [(file.path, file.size, file.mtime_ns) for file in _files(source)]
    scan = output / f"scan-{digest([state, config.pool.model_dump()])}"
    limits = ImageLimits.of(config.pool)
    job = ShardJob(
        stage="pool",
        output=scan,
        families={REJECTED_FAMILY: REJECTED, "scan": _SCAN},
        load=lambda task: _load_images(source, task.payload),
        make_worker=lambda: partial(_inspect_all, limits=limits),
    )
    run_shards(job, tasks, actors=None)
    accounts = _merge(config, scan, output)
    scan.location.delete_folder()
    return accounts


def _scan_tasks(source: Location, config: PoolConfig) -> list[ShardTask]:
    """Cut the source into parts: files of a folder, or row groups of Parquet files."""
    if not source.exists():
        raise SourceError(f"pool.source='{source.uri}' does not exist.")
    files = _files(source)
    if not files:
        raise SourceError(f"pool.source='{source.uri}' is an empty folder; it needs at least one image.")
    tables = [file.path for file in files if file.path.endswith(".parquet")]
    payloads: list[dict[str, Any]] = [p for path in tables for p in _parquet_parts(source, path, config.image_column)]
    payloads += [{"paths": paths} for paths in _file_parts([file for file in files if file.path not in set(tables)])]
    return [ShardTask(number, payload) for number, payload in enumerate(payloads)]


def _files(source: Location) -> list[fs.FileInfo]:
    return source.files(recursive=True) if source.is_folder() else [source.info()]


def _file_parts(files: list[fs.FileInfo]) -> Iterator[list[str]]:
    paths: list[str] = []
    num_bytes = 0
    for file in files:
        if paths and (len(paths) == _FILES_PER_SCAN or num_bytes + (file.size or 0) > _BYTES_PER_SCAN):
            yield paths
            paths, num_bytes = [], 0
        paths.append(file.path)
        num_bytes += file.size or 0
    if paths:
        yield paths


def _parquet_parts(source: Location, path: str, column: str) -> Iterator[dict[str, Any]]:
    try:
        with source.filesystem.open_input_file(path) as stream:
            file = pq.ParquetFile(stream)
            schema, num_groups = file.schema_arrow, file.num_row_groups
            lengths = [file.metadata.row_group(group).num_rows for group in range(num_groups)]
    except pa.ArrowInvalid as error:
        raise SourceError(f"'{path}' is no Parquet file: {str(error).splitlines()[0]}") from error
    if column not in schema.names:
        names = ", ".join(schema.names)
        raise SourceError(
            f"'{path}' has no column '{column}'.{nearest(column, schema.names)} Its columns: {names}. "
            "Name the one with the image bytes with pool.image_column."
        )
    if not _holds_bytes(schema.field(column).type):
        raise SourceError(
            f"Column '{column}' of '{path}' is {schema.field(column).type}; "
            "image bytes are binary, or a struct with a field 'bytes'."
        )
    first_row = 0
    for group, length in enumerate(lengths):
        yield {"parquet": path, "group": group, "first_row": first_row, "column": column}
        first_row += length


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _load_images(source: Location, part: Mapping[str, Any]) -> pa.Table:
    """Read the encoded images of one part; a file that cannot be read is a row with its error."""
    if "parquet" in part:
        encoded = read_row_group(source.at(part["parquet"]), part["group"], part["column"])
        numbers = range(part["first_row"], part["first_row"] + len(encoded))
        rows = [
            {"path": source.at(part["parquet"]).uri, "row": number, "bytes": content or b"", "error": None}
            for number, content in zip(numbers, encoded, strict=True)
        ]
    else:
        rows = [{"path": source.at(path).uri, "row": None, **_read(source.at(path))} for path in part["paths"]]
    return pa.Table.from_pylist(rows, schema=_IMAGES)


def _read(file: Location) -> dict[str, Any]:
    try:
        return {"bytes": file.read(), "error": None}
    except OSError as error:
        return {"bytes": b"", "error": " ".join(str(error).split())}


def _inspect_all(shard: pa.Table, limits: ImageLimits) -> Tables:
    accepted, rejected = [], []
    for image in shard.to_pylist():
        encoded = image["bytes"]
        identity = {"image_id": image_id(encoded), "path": image["path"]}
        try:
            if image["error"] is not None:
                raise ImageRejected(Reason.UNREADABLE_FILE, image["error"])
            facts = inspect(encoded, limits)
        except ImageRejected as error:
            rejected.append({**identity, "reason": error.reason, "message": error.message})
            continue
        accepted.append({**identity, **vars(facts), "row": image["row"], "num_bytes": len(encoded)})
    return {REJECTED_FAMILY: table_of(rejected, REJECTED), "scan": table_of(accepted, _SCAN)}


def _merge(config: RunConfig, scan: RunDir, output: RunDir) -> dict[str, Any]:
    """Reject duplicates, order the rest, write the shards."""
    found = scan.read_table("scan", _SCAN).sort_by([("path", "ascending"), ("row", "ascending")])
    rejected = scan.read_table(REJECTED_FAMILY, REJECTED)
    first = _first_of_each(found["image_id"])
    duplicates = _duplicate_rows(found, first)
    rejected = pa.concat_tables([rejected, duplicates])
    kept = found.filter(first)
    if not kept.num_rows and not rejected.num_rows:
        raise SourceError(f"pool.source='{config.pool.source}' is empty: its Parquet files hold no rows.")
    if not kept.num_rows:
        counts = Counter(rejected["reason"].to_pylist())
        reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()))
        raise SourceError(f"pool.source='{config.pool.source}' holds no image that can be used: {reasons}.")
    keys = pa.array([seed_for(config.seed, identity, "order") for identity in kept["image_id"].to_pylist()])
    ordered = kept.append_column("key", keys).sort_by([("key", "ascending"), ("image_id", "ascending")])
    ordered = ordered.append_column("position", pa.array(range(ordered.num_rows), pa.int64()))
    if rejected.num_rows:
        output.write_shard(REJECTED_FAMILY, 0, rejected, REJECTED)
    for number, start in enumerate(range(0, ordered.num_rows, config.pool.shard_size)):
        output.write_shard("index", number, ordered.slice(start, config.pool.shard_size), INDEX)
    return row_counts(
        found.num_rows + rejected.num_rows - duplicates.num_rows, kept.num_rows, output.rejected_by_reason()
    )


def _first_of_each(ids: pa.ChunkedArray) -> pa.Array:
    """Return a mask of the rows whose id did not stand before."""
    seen: set[str] = set()
    mask = []
    for identity in ids.to_pylist():
        mask.append(identity not in seen)
        seen.add(identity)
    return pa.array(mask, pa.bool_())


def _duplicate_rows(found: pa.Table, first: pa.Array) -> pa.Table:
    original: dict[str, str] = {}
    duplicates = []
    for row, is_first in zip(found.select(["image_id", "path"]).to_pylist(), first.to_pylist(), strict=True):
        if is_first:
            original[row["image_id"]] = row["path"]
        else:
            message = f"same bytes as '{original[row['image_id']]}'"
            duplicates.append({**row, "reason": Reason.DUPLICATE, "message": message})
    return table_of(duplicates, REJECTED)
