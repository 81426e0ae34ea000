"""Publishing a shard: all of its files, or none.

A shard is a file per family that has rows (pairs-000007.parquet, rejected-000007.parquet) and a record of them, which
is written last (shard-000007.json). Without its record a shard is not done: files that a kill, a full disk or a fault
of the storage left are no part of it, and are replaced or deleted when the shard is done again. Then the record goes
first.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from stic_ray.core.rundir import (
    FAILED_FAMILY,
    NOTES_FAMILY,
    RECORD_FAMILY,
    REJECTED_FAMILY,
    RunDir,
    family_name,
    numbered,
    record_name,
    shard_name,
)
from stic_ray.core.schemas import FAILED, REJECTED

logger = logging.getLogger(__name__)

_NUM_READERS = 32
"""Threads that read records and footers, which is mostly waiting for the storage."""
_NUM_MESSAGES = 5
"""Messages of failed rows that a record keeps, the most frequent ones."""


@dataclass(frozen=True)
class ShardRecord:
    """What a published shard holds."""

    num_rows: Mapping[str, int]
    """By family; a family without rows has no file and is left out."""
    num_bytes: Mapping[str, int]
    """Sizes of the files, by family."""
    rejected_by_reason: Mapping[str, int] = field(default_factory=dict)
    failed_by_message: Mapping[str, int] = field(default_factory=dict)
    """The most frequent messages of its failed rows, with their numbers."""

    @property
    def num_failed(self) -> int:
        """Rows to be tried again."""
        return self.num_rows.get(FAILED_FAMILY, 0)

    @property
    def num_rows_in_all(self) -> int:
        """Rows of all families together."""
        return sum(self.num_rows.values())

    def without(self, families: Collection[str]) -> "ShardRecord":
        """Return the record without the rows of some families."""
        return replace(self, num_rows={family: n for family, n in self.num_rows.items() if family not in families})


def all_families(families: Mapping[str, pa.Schema]) -> dict[str, pa.Schema]:
    """Return the families of a stage with those that every stage has: rejected and failed rows."""
    return {REJECTED_FAMILY: REJECTED, FAILED_FAMILY: FAILED, **families}


def publish(
    output: RunDir, part: str, number: int, tables: Mapping[str, pa.Table], schemas: Mapping[str, pa.Schema]
) -> ShardRecord:
    """Write the files of a shard and its record; `tables` may leave out families of `schemas` that have no rows.

    `part` tells apart the jobs that share a folder (`predictions-base`), and is empty where there is one. Raises
    OSError with the path of what could not be written; the same call then begins again.
    """
    record_file = output.location / record_name(part, number)
    record_file.delete()
    sizes = {}
    for family, schema in schemas.items():
        table = tables.get(family)
        if table is not None and table.num_rows:
            sizes[family] = output.write_shard(family_name(family, part), number, table, schema)
        else:
            (output.location / shard_name(family_name(family, part), number)).delete()
    rejected, failed = tables.get(REJECTED_FAMILY), tables.get(FAILED_FAMILY)
    record = ShardRecord(
        {family: tables[family].num_rows for family in sizes},
        sizes,
        dict(sorted(Counter(rejected["reason"].to_pylist()).items())) if rejected is not None else {},
        dict(_messages(failed).most_common(_NUM_MESSAGES)) if failed is not None else {},
    )
    output.write_text(record_file.name, json.dumps(asdict(record)))
    return record


def published(output: RunDir, part: str, families: Iterable[str]) -> dict[int, ShardRecord]:
    """Return the records of the shards that are done, by number.

    A shard whose files are not those of its record, or damaged, as a machine that lost power may leave them, is not
    done.
    """
    files = {file.base_name: file for file in output.location.files()}
    numbers = sorted(numbered(files, family_name(RECORD_FAMILY, part), "json"))
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        records = list(readers.map(lambda number: _whole_record(output, part, number, families, files), numbers))
    found = {number: record for number, record in zip(numbers, records, strict=True) if record}
    if len(found) < len(numbers):
        logger.warning("'%s': %d shards are damaged and are made again", output.uri, len(numbers) - len(found))
    return found


def delete_leftovers(output: RunDir, part: str, families: Iterable[str], done: Iterable[int]) -> None:
    """Remove what writers left that did not finish: temporary files, notes, files of shards that are not `done`.

    Call it when no writer is alive.
    """
    kept = set(done)
    names = "|".join(re.escape(family_name(family, part)) for family in families)
    for file in output.location.files():
        unfinished = re.fullmatch(rf"(?:{names})-(\d+)\.parquet", file.base_name)
        temporary = re.fullmatch(rf"\..+\.tmp|{NOTES_FAMILY}-.+\.json", file.base_name)
        if temporary or (unfinished and int(unfinished[1]) not in kept):
            output.location.at(file.path).delete()


def _messages(failed: pa.Table) -> Counter[str]:
    """Count the messages of failed rows; a row's own file is named by its folder, so that equal causes are one."""
    rows = failed.select(["path", "message"]).to_pylist()
    return Counter(
        row["message"].replace(row["path"], re.sub(r"[^/]+$", "...", row["path"])) if row["path"] else row["message"]
        for row in rows
    )


def _whole_record(
    output: RunDir, part: str, number: int, families: Iterable[str], files: Mapping[str, fs.FileInfo]
) -> ShardRecord | None:
    """Return the record of a shard whose files are all there, and no others; None for any other shard."""
    try:
        record = ShardRecord(**output.read_json(record_name(part, number)))
        names = {family: shard_name(family_name(family, part), number) for family in {*families, *record.num_bytes}}
        there = {family: files[name].size for family, name in names.items() if name in files}
        if output.location.is_local:  # where machines lose power, a file may have its size and not its content
            for family in there:
                pq.read_metadata((output.location / names[family]).path)
    except (TypeError, pa.ArrowInvalid):
        return None
    return record if there == dict(record.num_bytes) else None
