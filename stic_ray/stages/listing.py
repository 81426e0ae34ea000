"""The files of a source, listed once into the run and cut into parts that one task scans.

A source is a folder, a list of paths, a folder that `datasets` saved, or a single file. The listing stays in the run
(`pool/listing-*.parquet`), so that a later invocation can tell what is new.
"""

import json
import logging
import math
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from stic_ray.core.config import PoolConfig
from stic_ray.core.errors import Rejected, SourceError
from stic_ray.core.json_stream import as_text
from stic_ray.core.rundir import RunDir, read_shard, shard_name
from stic_ray.core.storage import Location
from stic_ray.stages.columns import check_column, verbatim_chunk
from stic_ray.stages.containers import kind_of, may_be_image
from stic_ray.stages.source_captions import check_places

logger = logging.getLogger(__name__)

LISTING = pa.schema([("uri", pa.string()), ("num_bytes", pa.int64()), ("mtime_ns", pa.int64())])
"""A file of the source; size and time are unknown (null) where a list of paths names it."""
BUILDING = "building"
"""Folder below pool/ that is there while the index is being built."""
FAMILY = "listing"
PARTS = "parts.json"
"""Written last, so that its presence means that the listing is whole."""

_NUM_THREADS = 8
"""Folders that are listed at a time."""
_ROWS_PER_SHARD = 50_000
_NUM_TABLES_LOOKED_INTO = 8
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


def write_listing(pool: PoolConfig, output: RunDir, known: RunDir) -> list[Part]:
    """Write the files of a source that `known` does not list as shards of `output`, and return the parts to scan.

    Numbers go on behind the shards of `known`. Raises SourceError, also for a table without a column of the settings.
    """
    listed = known.read_table(FAMILY, LISTING, ["uri"])["uri"]
    found = entries(pool.source)
    if len(listed):
        found = iter([_all_of(found).filter(~pc.field("uri").isin(listed.combine_chunks()))])
    number = first = 1 + max(known.shard_numbers(FAMILY), default=-1)
    num_files = num_bytes = weight = 0
    for table in _rebatched(found):
        if number == first and table.num_rows < _ROWS_PER_SHARD and not len(listed):  # this is all of the source
            check_places(pool, map(kind_of, table["uri"].to_pylist()))
        weight = weight or _look_into_tables(table["uri"].to_pylist(), pool)
        output.write_shard(FAMILY, number, table, LISTING)
        num_files, num_bytes = num_files + table.num_rows, num_bytes + sum(_sizes(table, weight))
        number += 1
    totals = ((num_files, *_FILES_PER_PART), (num_bytes, *_BYTES_PER_PART))
    bounds = [min(max(math.ceil(total / _NUM_PARTS), low), high) for total, low, high in totals]
    parts: list[Part] = []
    for shard in range(first, number):
        table = read_shard(output.location / shard_name(FAMILY, shard), LISTING)
        parts += _cut(shard, table, _sizes(table, weight), *bounds)
    output.write_json(PARTS, [asdict(part) for part in parts])
    return parts


def read_parts(output: RunDir) -> list[Part] | None:
    """Return the parts of a finished listing."""
    parts = output.read_json(PARTS)
    return None if parts is None else [Part(**part) for part in parts]


def compare(uri: str, known: RunDir, num_shards: int) -> Change:
    """Say how a source differs from the first shards of the listing in `known`, in linear time."""
    before = _all_of(read_shard(shard, LISTING) for shard in known.shards(FAMILY)[:num_shards])
    now = _all_of(entries(uri))
    both = now.join(before.group_by("uri").aggregate([("num_bytes", "max"), ("mtime_ns", "max")]), "uri", None, "inner")
    differs = [pc.field(name) != pc.field(f"{name}_max") for name in ("num_bytes", "mtime_ns")]  # null for null
    return Change(
        num_new=now.join(before, "uri", join_type="left anti").num_rows,
        num_changed=both.filter(differs[0] | differs[1]).num_rows,
        num_gone=before.join(now, "uri", join_type="left anti").num_rows,
    )


def _all_of(tables: Iterable[pa.Table]) -> pa.Table:
    return pa.concat_tables([LISTING.empty_table(), *tables])


def entries(uri: str) -> Iterator[pa.Table]:
    """Yield the files of a source as tables of LISTING, in an order of their own; no more than a folder at a time.

    Raises SourceError when the source is missing or empty.
    """
    source = Location.of(uri)
    info = source.info()
    if info.type == fs.FileType.NotFound:
        raise SourceError(f"pool.source='{uri}' does not exist.")
    if info.type == fs.FileType.Directory:
        tables = _saved_dataset(source) or (_walk_disk if source.is_local else _walk_store)(source)
        problem = "is an empty folder; it needs at least one image"
    elif kind_of(source.path) == "list":
        tables, problem = _listed(source), "names no file; it needs one path or URI per line"
    else:
        tables, problem = [_table(source, [info])], ""
    num_files = 0
    for table in tables:
        num_files += table.num_rows
        yield table
    if not num_files:
        raise SourceError(f"pool.source='{uri}' {problem}.")


def _walk_disk(folder: Location) -> Iterator[pa.Table]:
    """List a local folder and all below it, several folders at a time; what cannot be read is listed, too."""
    waiting, entered = deque([folder.path]), set[tuple[int, int]]()
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        while waiting:
            some = [waiting.popleft() for _ in range(min(len(waiting), 8 * _NUM_THREADS))]
            for found in threads.map(_scan_folder, some):
                rows = []
                for name, info, is_link in found:
                    inode = (info.st_dev, info.st_ino) if info and stat.S_ISDIR(info.st_mode) else None
                    if inode is None or (is_link and inode in entered):  # links may go round in circles
                        rows.append((name, info and info.st_size, info and info.st_mtime_ns))
                    else:
                        entered.add(inode)
                        waiting.append(name)
                yield _rows(rows)


def _scan_folder(path: str) -> list[tuple[str, os.stat_result | None, bool]]:
    """Return what is in a folder: path, state, whether it is a link. What cannot be read is there without its state."""
    try:
        with os.scandir(path) as entered:
            inside = sorted(entered, key=lambda entry: entry.name)
    except OSError:
        return [(path, None, False)]
    found = []
    for entry in inside:
        name, info = os.fsencode(entry.path).decode("utf-8", "backslashreplace"), None
        with suppress(OSError):  # a link to nowhere, for one
            info = entry.stat() if name == entry.path else None
        found.append((name, info, entry.is_symlink()))
    return found


def _walk_store(folder: Location) -> Iterator[pa.Table]:
    """List the files of a folder, then each of its folders with all below it, several at a time."""
    found = folder.below()
    yield _table(folder, [info for info in found if info.type != fs.FileType.Directory])
    inner = [info.path for info in found if info.type == fs.FileType.Directory]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        for start in range(0, len(inner), 64):  # bounds what is held
            below = threads.map(lambda path: folder.at(path).files(recursive=True), inner[start : start + 64])
            yield from (_table(folder, infos) for infos in below)


def _table(place: Location, infos: Iterable[fs.FileInfo]) -> pa.Table:
    return _rows([(place.at(info.path).uri, info.size, info.mtime_ns) for info in infos])


def _rows(rows: list[tuple[str, int | None, int | None]]) -> pa.Table:
    return pa.table([list(column) for column in zip(*rows, strict=True)] or [[], [], []], schema=LISTING)


def _listed(source: Location) -> Iterator[pa.Table]:
    """Read paths and URIs, one per line; relative ones are below the file's folder. Bad bytes are those of Windows."""
    folder = source.folder
    with source.open() as stream:
        lines = (_in_windows(line).strip() for line in as_text(stream))
        uris = (folder.address_of(line) for line in lines if line and not line.startswith("#"))
        while some := list(islice(uris, _ROWS_PER_SHARD)):
            yield _rows([(uri, None, None) for uri in some])


def _in_windows(line: str) -> str:
    """Return a line that is UTF-8, or else was written in the code page of Western Windows."""
    try:
        return line.encode().decode()
    except UnicodeEncodeError:
        return line.encode("utf-8", "surrogateescape").decode("cp1252", "replace")


def _saved_dataset(folder: Location) -> list[pa.Table]:
    """Return the Arrow files that `save_to_disk` of `datasets` wrote; none when the folder holds something else."""

    def read(file: Location) -> dict[str, Any]:
        return json.loads(file.read()) if file.info().is_file else {}

    try:
        inner = [folder.inside(name) for name in read(folder / "dataset_dict.json").get("splits", [])] or [folder]
        states = [(each, read(each / "state.json")) for each in inner]
        files = [each.inside(file["filename"]) for each, state in states for file in state.get("_data_files", [])]
    except (AttributeError, ValueError, LookupError, TypeError, Rejected):  # of another program
        return []
    return [_table(file, [file.info()]) for file in files]


def _rebatched(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Gather and cut tables to the size of a listing shard."""
    held = LISTING.empty_table()
    for table in tables:
        held = pa.concat_tables([held, table])
        while held.num_rows >= _ROWS_PER_SHARD:
            yield held.slice(0, _ROWS_PER_SHARD)
            held = held.slice(_ROWS_PER_SHARD)
    if held.num_rows:
        yield held


def _look_into_tables(uris: list[str], pool: PoolConfig) -> int:
    """Return what a byte of the tables weighs, by the first of them; warn where images are compressed together.

    Raises SourceError, before the scan, where no table has the column and no other file looks like an image.
    """
    problem = None
    for uri in islice((uri for uri in uris if kind_of(uri) == "parquet"), _NUM_TABLES_LOOKED_INTO):
        file = Location.of(uri)
        try:
            with file.open() as stream:
                parquet = pq.ParquetFile(stream)
                if not check_column(file, parquet.schema_arrow, pool.image_column, pool.caption_column):
                    return _BYTES_PER_ADDRESS
                group = parquet.metadata.row_group(0)
                is_compressed = verbatim_chunk(group, pool.image_column) is None
        except SourceError as error:
            problem = problem or error
            continue
        except Exception:  # it is damaged, and becomes a rejected row
            return 1
        if group.num_rows > 1 and not pool.copy_compressed and is_compressed:
            logger.warning(
                "pool: images lie in compressed row groups of %d, and for each image that is used, later stages read "
                "and decompress that many. pool.copy_compressed=true copies them once, so that each is read by itself.",
                group.num_rows,
            )
        return 1
    if problem is not None and not any(map(may_be_image, uris)):
        raise problem
    return 1


def _sizes(table: pa.Table, weight: int) -> list[int]:
    """Return the bytes of files; those of tables count `weight` times."""
    files = zip(table["uri"].to_pylist(), table["num_bytes"].to_pylist(), strict=True)
    return [(size or 0) * (weight if weight > 1 and kind_of(uri) == "parquet" else 1) for uri, size in files]


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
