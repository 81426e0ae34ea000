"""What a source holds: its files, listed once into the run, and cut into parts that one task scans.

The listing stays in the run (`pool/listing-*.parquet`), so that a later invocation can tell what is new.
"""

import io
import json
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from pyarrow import fs

from stic_ray.core.errors import SourceError
from stic_ray.core.rundir import RunDir, read_shard
from stic_ray.core.storage import Location
from stic_ray.stages.containers import check_column, kind_of

pc: Any = pyarrow.compute
"""Its functions are made when it is imported, which type checkers cannot see."""

LISTING = pa.schema([("uri", pa.string()), ("num_bytes", pa.int64()), ("mtime_ns", pa.int64())])
"""A file of the source; size and time are unknown (null) where a list of paths names it."""

BUILDING = "building"
"""Folder below pool/ that is there while the index is being built."""
FAMILY = "listing"
PARTS = "parts.json"
"""Written last, so that its presence means that the listing is whole."""
_ROWS_PER_SHARD = 50_000
_NUM_PARTS = 1024
"""Parts that a large source is cut into, as far as the bounds below allow."""
_FILES_PER_PART = (256, 4096)
_BYTES_PER_PART = (64 * 2**20, 2 * 2**30)
_BYTES_PER_ADDRESS = 2**10
"""What a byte of a table of addresses weighs against a byte of image: they stand for much work."""


@dataclass(frozen=True)
class Part:
    """Work of one scan task: entries `start` to `stop` of a listing shard, or a slice of a single large file."""

    shard: int
    start: int
    stop: int
    piece: int = 0
    num_pieces: int = 1


@dataclass(frozen=True)
class Change:
    """How a source differs from its listing, in files."""

    num_new: int = 0
    num_changed: int = 0
    num_gone: int = 0


def entries(uri: str) -> Iterator[pa.Table]:
    """Yield the files of a source as tables of LISTING, in an order of their own; no more than a folder at a time.

    Raises SourceError when the source is missing or empty.
    """
    source = Location.of(uri)
    info = source.info()
    if info.type == fs.FileType.NotFound:
        raise SourceError(f"pool.source='{uri}' does not exist.")
    if info.type == fs.FileType.Directory:
        tables = _saved_dataset(source) or _walk(source)
        problem = "is an empty folder; it needs at least one image"
    elif kind_of(source.path) == "list":
        tables, problem = _listed(source), "names no file; it needs one path or URI per line"
    else:
        tables, problem = iter([_table(source, [info])]), ""
    num_files = 0
    for table in tables:
        num_files += table.num_rows
        if table.num_rows:
            yield table
    if not num_files:
        raise SourceError(f"pool.source='{uri}' {problem}.")


def write_listing(uri: str, image_column: str, output: RunDir, known: RunDir) -> list[Part]:
    """Write the files of a source that `known` does not list as shards of `output`, and return the parts to scan.

    Numbers go on behind the shards of `known`. Raises SourceError as `entries` does, and for a table without the
    image column.
    """
    listed = _uris(known)
    number = first = 1 + max(known.shard_numbers(FAMILY), default=-1)
    num_files = num_bytes = 0
    weight = None
    for table in _rebatched(_without(table, listed) for table in entries(uri)):
        if weight is None:
            weight = _weight_of_tables(table, image_column)
        output.write_shard(FAMILY, number, table, LISTING)
        num_files, num_bytes = num_files + table.num_rows, num_bytes + sum(_sizes(table, weight))
        number += 1
    max_files = _clip(math.ceil(num_files / _NUM_PARTS), _FILES_PER_PART)
    max_bytes = _clip(math.ceil(num_bytes / _NUM_PARTS), _BYTES_PER_PART)
    parts = []
    for shard in range(first, number):
        table = read_shard(output.location / f"{FAMILY}-{shard:06d}.parquet", LISTING)
        parts += list(_cut(shard, table, _sizes(table, weight or 1), max_files, max_bytes))
    output.write_json(PARTS, [asdict(part) for part in parts])
    return parts


def read_parts(output: RunDir) -> list[Part] | None:
    """Return the parts of a finished listing."""
    parts = output.read_json(PARTS)
    return None if parts is None else [Part(**part) for part in parts]


def compare(uri: str, known: RunDir, num_shards: int) -> Change:
    """Say how a source differs from the first shards of the listing in `known`."""
    tables = [read_shard(shard, LISTING) for shard in known.shards(FAMILY)[:num_shards]]
    listed = pa.concat_tables([LISTING.empty_table(), *tables]).combine_chunks()
    num_new = num_changed = num_same = 0
    for table in entries(uri):
        places = pc.index_in(table["uri"], value_set=listed["uri"])
        before = listed.take(places.drop_null())
        now = table.filter(pc.is_valid(places))
        same = [pc.fill_null(pc.equal(now[name], before[name]), True) for name in ("num_bytes", "mtime_ns")]
        num_changed += now.num_rows - (pc.sum(pc.and_(*same)).as_py() or 0)
        num_new += places.null_count
        num_same += now.num_rows
    return Change(num_new, num_changed, listed.num_rows - num_same)


def _walk(folder: Location) -> Iterator[pa.Table]:
    """List the files of a folder, then each of its folders with all below it, several at a time."""
    found = folder.below()
    yield _table(folder, [info for info in found if info.type != fs.FileType.Directory])
    inner = [info.path for info in found if info.type == fs.FileType.Directory]
    with ThreadPoolExecutor(8) as threads:
        for start in range(0, len(inner), 64):  # bounds what is held
            below = threads.map(lambda path: folder.at(path).files(recursive=True), inner[start : start + 64])
            yield from (_table(folder, infos) for infos in below)


def _table(place: Location, infos: Iterable[fs.FileInfo]) -> pa.Table:
    rows = [(place.at(info.path).uri, info.size, info.mtime_ns) for info in infos]
    return pa.table([list(column) for column in zip(*rows, strict=True)] or [[], [], []], schema=LISTING)


def _listed(source: Location) -> Iterator[pa.Table]:
    """Read paths and URIs, one per line; relative ones are below the file's folder."""
    folder = source.folder
    with source.open() as stream, io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8") as text:
        lines = (line.strip() for line in text)
        uris = (folder.address_of(line) for line in lines if line and not line.startswith("#"))
        while some := list(islice(uris, _ROWS_PER_SHARD)):
            unknown = pa.nulls(len(some), pa.int64())
            yield pa.table([pa.array(some, pa.string()), unknown, unknown], schema=LISTING)


def _saved_dataset(folder: Location) -> Iterator[pa.Table] | None:
    """Return the Arrow files that `save_to_disk` of `datasets` wrote, or None when the folder holds something else."""
    splits = _json(folder / "dataset_dict.json")
    inner = [folder / name for name in splits["splits"]] if splits else [folder]
    states = [(each, _json(each / "state.json")) for each in inner]
    files = [each / file["filename"] for each, state in states if state for file in state.get("_data_files", ())]
    return (_table(file, [file.info()]) for file in files) if files else None


def _json(file: Location) -> dict[str, Any] | None:
    return json.loads(file.read()) if file.info().is_file else None


def _uris(known: RunDir) -> pa.ChunkedArray:
    names = pa.schema([LISTING.field("uri")])
    tables = [read_shard(shard, names) for shard in known.shards(FAMILY)]
    return pa.concat_tables([names.empty_table(), *tables])["uri"]


def _without(table: pa.Table, listed: pa.ChunkedArray) -> pa.Table:
    return table.filter(pc.invert(pc.is_in(table["uri"], value_set=listed)))


def _rebatched(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Gather and cut tables to the size of a listing shard."""
    held = LISTING.empty_table()
    for table in tables:
        held = pa.concat_tables([held, table])
        while held.num_rows >= _ROWS_PER_SHARD:
            yield held.slice(0, _ROWS_PER_SHARD).combine_chunks()
            held = held.slice(_ROWS_PER_SHARD)
    if held.num_rows:
        yield held.combine_chunks()


def _weight_of_tables(table: pa.Table, image_column: str) -> int:
    """Look into the first Parquet file: a wrong image column is found now, not after hours of scanning."""
    first = next((uri for uri in table["uri"].to_pylist() if kind_of(uri) == "parquet"), None)
    if first is None:
        return 1
    file = Location.of(first)
    try:
        with file.open() as stream:
            holds_bytes = check_column(file, pq.read_schema(stream), image_column)
    except (OSError, pa.ArrowInvalid):
        return 1  # told when it is scanned
    return 1 if holds_bytes else _BYTES_PER_ADDRESS


def _sizes(table: pa.Table, weight: int) -> list[int]:
    sizes = pc.fill_null(table["num_bytes"], 0).to_pylist()
    if weight == 1:
        return sizes
    uris = table["uri"].to_pylist()
    return [size * (weight if kind_of(uri) == "parquet" else 1) for uri, size in zip(uris, sizes, strict=True)]


def _clip(value: int, bounds: tuple[int, int]) -> int:
    return min(max(value, bounds[0]), bounds[1])


def _cut(shard: int, table: pa.Table, sizes: list[int], max_files: int, max_bytes: int) -> Iterator[Part]:
    """Cut a listing shard: files together up to the bounds, a larger Parquet file in pieces."""
    start = num_bytes = 0
    for place, (uri, size) in enumerate(zip(table["uri"].to_pylist(), sizes, strict=True)):
        if place > start and (place - start == max_files or num_bytes + size > max_bytes):
            yield Part(shard, start, place)
            start, num_bytes = place, 0
        num_bytes += size
        if num_bytes > max_bytes and kind_of(uri) == "parquet":  # then it is alone in its part
            pieces = math.ceil(size / max_bytes)
            yield from (Part(shard, place, place + 1, piece, pieces) for piece in range(pieces))
            start, num_bytes = place + 1, 0
    if start < table.num_rows:
        yield Part(shard, start, table.num_rows)
