"""The files of a source, listed once into the run and cut into parts that one task scans.

The listing stays in the run (`pool/listing-*.parquet`), so that a later invocation can tell what is new.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from stic_ray.core.errors import SourceError
from stic_ray.core.rundir import RunDir, read_shard
from stic_ray.core.storage import Location
from stic_ray.stages.columns import check_column
from stic_ray.stages.containers import kind_of, may_be_image
from stic_ray.stages.sources import LISTING, entries

pc: Any = pyarrow.compute
"""Its functions are made when it is imported, which type checkers cannot see."""

BUILDING = "building"
"""Folder below pool/ that is there while the index is being built."""
FAMILY = "listing"
PARTS = "parts.json"
"""Written last, so that its presence means that the listing is whole."""
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


def write_listing(uri: str, image_column: str, output: RunDir, known: RunDir) -> list[Part]:
    """Write the files of a source that `known` does not list as shards of `output`, and return the parts to scan.

    Numbers go on behind the shards of `known`. Raises SourceError as `entries` does, and for a table without the
    image column.
    """
    listed = _all_of(read_shard(shard, LISTING) for shard in known.shards(FAMILY))["uri"]
    found = entries(uri)
    if len(listed):
        found = iter([_without(_all_of(found), listed)])
    number = first = 1 + max(known.shard_numbers(FAMILY), default=-1)
    num_files = num_bytes = 0
    weight = None
    for table in _rebatched(found):
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
    """Say how a source differs from the first shards of the listing in `known`; in one join, so in linear time."""
    listed = _all_of(read_shard(shard, LISTING) for shard in known.shards(FAMILY)[:num_shards])
    found = _all_of(entries(uri))
    places = pc.index_in(found["uri"], value_set=listed["uri"])
    now, places_before = found.filter(pc.is_valid(places)), places.drop_null()
    before = {name: listed[name].take(places_before) for name in ("num_bytes", "mtime_ns")}
    same = [pc.fill_null(pc.equal(now[name], column), True) for name, column in before.items()]
    num_changed = now.num_rows - (pc.sum(pc.and_(*same)).as_py() or 0)
    return Change(places.null_count, num_changed, listed.num_rows - now.num_rows)


def _all_of(tables: Iterable[pa.Table]) -> pa.Table:
    return pa.concat_tables([LISTING.empty_table(), *tables])


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
    """Look into the first tables: a wrong image column is found now, not after hours of scanning.

    Raises SourceError where no table has the column and no other file looks like an image.
    """
    problem = None
    for file in _first_tables(table):
        try:
            with file.open() as stream:
                return 1 if check_column(file, pq.read_schema(stream), image_column) else _BYTES_PER_ADDRESS
        except SourceError as error:
            problem = problem or error
        except Exception:  # it is damaged, and becomes a rejected row
            return 1
    if problem is not None and not any(may_be_image(uri) for uri in table["uri"].to_pylist()):
        raise problem
    return 1


def images_read_for_one(output: RunDir, image_column: str) -> int | None:
    """Return the images in a row group of the listed tables, where they are compressed; None where they are not."""
    for file in _first_tables(_all_of(read_shard(shard, LISTING) for shard in output.shards(FAMILY)[:1])):
        try:
            with file.open() as stream:
                metadata, schema = pq.read_metadata(stream), pq.read_schema(stream)
            if not check_column(file, schema, image_column):
                return None
            group = metadata.row_group(0)
            chunks = [group.column(i) for i in range(group.num_columns)]
            kinds = {chunk.compression for chunk in chunks if chunk.path_in_schema.split(".")[0] == image_column}
            return None if kinds == {"UNCOMPRESSED"} else group.num_rows
        except Exception:  # side files and damaged ones become rejected rows
            continue
    return None


def _first_tables(table: pa.Table) -> Iterator[Location]:
    """Yield some of the Parquet files of a listing."""
    uris = (uri for uri in table["uri"].to_pylist() if kind_of(uri) == "parquet")
    return (Location.of(uri) for uri in islice(uris, _NUM_TABLES_LOOKED_INTO))


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
