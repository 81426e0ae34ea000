"""The run directory: names of everything in it, atomic writes, manifests, shards.

Layout (docs/architecture.md): config.yaml, estimate.json, one folder per stage with numbered Parquet shards and a
manifest.json that is written last, report.html and report.json.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stic_ray.core.schemas import check
from stic_ray.core.storage import Location

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STARTED = "started.json"
"""What a stage was begun with; replaced by its manifest."""
ROWS_NOW = "num_rows_now"
"""Among the accounts of a stage: the rows of this call alone, where an earlier one had done some."""
ESTIMATE = "estimate.json"
"""What the stages were expected to take, written before they are made."""
REJECTED_FAMILY = "rejected"
FAILED_FAMILY = "failed"
RECORD_FAMILY = "shard"
"""Of the records that say that a shard is done (core/publishing.py)."""
NOTES_FAMILY = "notes"
"""Of small files that are there only while a shard is being made."""


def digest(value: Any) -> str:
    """Return a short, stable hash of a JSON-like value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def shard_name(family: str, number: int) -> str:
    """Return the fixed file name of a shard: "pairs-000007.parquet"."""
    return f"{family}-{number:06d}.parquet"


def record_name(part: str, number: int) -> str:
    """Return the file name of a shard's record: "shard-000007.json", "shard-base-000007.json" of the part `base`."""
    return f"{family_name(RECORD_FAMILY, part)}-{number:06d}.json"


def family_name(family: str, part: str) -> str:
    """Return how the files of a family begin: "predictions-base" in the part `base` of a stage, else "pairs"."""
    return f"{family}-{part}" if part else family


@dataclass(frozen=True)
class RunDir:
    """A run directory, or one stage's folder in it."""

    location: Location

    @staticmethod
    def of(uri: str) -> "RunDir":
        """Open the run directory at a local path or URI; nothing is created."""
        return RunDir(Location.of(uri))

    def __truediv__(self, name: str) -> "RunDir":
        return RunDir(self.location / name)

    @property
    def uri(self) -> str:
        """Address as the user would type it."""
        return self.location.uri

    def write_text(self, name: str, text: str) -> None:
        """Write a text file atomically. Raises OSError with its path."""
        _write(self.location / name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file atomically; numbers that JSON does not know (infinite, not a number) become null."""
        finite = json.loads(json.dumps(value, default=str), parse_constant=lambda constant: None)
        self.write_text(name, json.dumps(finite, indent=2) + "\n")

    def read_json(self, name: str) -> Any:
        """Read a JSON file, or return None when there is none, or half of one, as a machine that lost power leaves."""
        location = self.location / name
        try:
            return json.loads(location.read()) if location.exists() else None
        except ValueError:
            logger.warning("'%s' is damaged and counts as not written", location.uri)
            return None

    def shards(self, family: str) -> list[Location]:
        """Return the shards of a family, ordered by number.

        Where shards are published with records, those that have one; a folder without any, as the pool's, has whole
        shards only.
        """
        names = self._names()
        found = numbered(names, family, "parquet")
        records = numbered(names, family_name(RECORD_FAMILY, family.partition("-")[2]), "json")
        return [self.location / found[number] for number in sorted(found) if not records or number in records]

    def shard_numbers(self, family: str) -> set[int]:
        """Return the numbers of the shards of a family."""
        return set(numbered(self._names(), family, "parquet"))

    def rejected_families(self) -> list[str]:
        """Return the families of rejected rows: one, or one per model of an evaluation."""
        names = [re.fullmatch(rf"({REJECTED_FAMILY}(?:-.+)?)-\d+\.parquet", name) for name in self._names()]
        return sorted({name[1] for name in names if name})

    def _names(self) -> list[str]:
        return [file.base_name for file in self.location.files()]

    def write_shard(self, family: str, number: int, table: pa.Table, schema: pa.Schema) -> int:
        """Write one file of a shard, checked against its schema, whole or not at all, and return its size in bytes.

        Raises OSError with its path.
        """
        sink = pa.BufferOutputStream()
        # Images do not repeat: a dictionary of them is one giant page that every reader must hold.
        pq.write_table(
            check(table, schema),
            sink,
            compression="zstd",
            row_group_size=256,
            use_dictionary=False,
            write_batch_size=16,
        )
        content = sink.getvalue()
        _write(self.location / shard_name(family, number), content)
        return content.size

    def read_table(self, family: str, schema: pa.Schema, columns: list[str] | None = None) -> pa.Table:
        """Read all shards of a family, in order, or the given columns of them."""
        wanted = pa.schema([schema.field(name) for name in columns or schema.names], metadata=schema.metadata)
        tables = [read_shard(shard, wanted) for shard in self.shards(family)]
        return pa.concat_tables(tables) if tables else wanted.empty_table()

    @property
    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None while the stage is not done."""
        return self.read_json(MANIFEST)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Mark the stage as done. Call it last."""
        self.write_json(MANIFEST, {**manifest, "finished_at": datetime.now(UTC).isoformat(timespec="seconds")})


def read_shard(shard: Location, schema: pa.Schema) -> pa.Table:
    """Read the columns of `schema` from one shard and check them."""
    with shard.filesystem.open_input_file(shard.path) as stream:
        return check(pq.read_table(stream, columns=schema.names), schema)


def numbered(names: Iterable[str], family: str, ending: str) -> dict[int, str]:
    """Return the names of a family's files, by number."""
    found = [re.fullmatch(rf"{re.escape(family)}-(\d+)\.{ending}", name) for name in names]
    return {int(name[1]): name[0] for name in found if name}


def _write(file: Location, content: bytes | pa.Buffer) -> None:
    try:
        file.write(content)
    except OSError as error:  # pyarrow says "No space left on device", and not where
        raise OSError(f"'{file.uri}': {error}") from error


def row_counts(
    num_rows_in: int, num_rows_written: int, rejected: Mapping[str, int], num_rows_failed: int = 0
) -> dict[str, Any]:
    """Return the row accounts of a manifest; what goes in must come out: written, rejected, or failed."""
    num_rejected = sum(rejected.values())
    assert num_rows_in == num_rows_written + num_rejected + num_rows_failed, (
        f"{num_rows_in} rows in, but {num_rows_written} written, {num_rejected} rejected and {num_rows_failed} failed"
    )
    return {
        "num_rows_in": num_rows_in,
        "num_rows_written": num_rows_written,
        "num_rows_rejected": num_rejected,
        "num_rows_failed": num_rows_failed,
        "rejected_by_reason": dict(rejected),
    }
