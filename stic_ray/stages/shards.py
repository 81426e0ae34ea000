"""The shards of a stage: which are done, which are to be done, and what became of their rows.

One input shard becomes one set of output files with fixed names (core/publishing.py), on the way that stages/flow.py
describes. Ray is imported where something runs: stages are read on machines without it.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stic_ray.core.config import ActorsConfig
from stic_ray.core.errors import StageError
from stic_ray.core.publishing import ShardRecord, all_families, delete_leftovers, published
from stic_ray.core.rundir import FAILED_FAMILY, ROWS_NOW, STARTED, RunDir, row_counts
from stic_ray.stages.progress import Progress
from stic_ray.stages.windows import RowWorker, Tables

logger = logging.getLogger(__name__)

ShardWorker = Callable[[pa.Table], Tables]
"""Turns a whole shard into output tables by family; one without rows may be left out."""

_NUM_FAILED_SHARDS_OF_A_DEAD_STORAGE = 3
"""So many shards one after another of which every row failed are not waited for any further."""


@dataclass(frozen=True)
class ShardTask:
    """One input shard: its number, which names the output, and whatever its loader needs."""

    number: int
    payload: Mapping[str, Any]
    num_bytes: int = 0
    """Size of its images, for the memory of the tasks that handle it; 0 where it is not known."""


@dataclass(frozen=True)
class ShardJob:
    """How a stage turns shards into files."""

    stage: str
    output: RunDir
    families: Mapping[str, pa.Schema]
    """Output families with their schemas; rejected and failed rows have their own beside them."""
    load: Callable[[ShardTask], pa.Table]
    make_worker: Callable[[], ShardWorker | RowWorker]
    """A RowWorker for a pool of actors, a ShardWorker for tasks."""
    part: str = ""
    """Tells jobs apart that share a folder; a part of the names of their files."""
    max_failed_share: float = 0.0
    """Share of the rows that may fail for the job to be done."""

    @property
    def all_families(self) -> dict[str, pa.Schema]:
        """The families with those of rejected and failed rows."""
        return all_families(self.families)


@dataclass(frozen=True)
class Shards:
    """What the shards of a finished job hold."""

    num_rows: Mapping[str, int]
    """By family."""
    rejected_by_reason: Mapping[str, int]
    num_failed: int
    throughput: dict[str, Any] | None
    """Figures of what was done in this call (see Progress); None when nothing was left to do."""

    @property
    def num_rows_now(self) -> int:
        """Rows of the shards that were done in this call."""
        return self.throughput["num_rows"] if self.throughput else 0

    def accounts(self, num_rows_in: int, families: Sequence[str]) -> dict[str, Any]:
        """Return the row accounts of a manifest, the rows of these families being those that were written."""
        num_written = sum(self.num_rows.get(family, 0) for family in families)
        counts = row_counts(num_rows_in, num_written, self.rejected_by_reason, self.num_failed)
        return {**counts, ROWS_NOW: self.num_rows_now}


def run_shards(job: ShardJob, tasks: Sequence[ShardTask], actors: ActorsConfig | None) -> Shards:
    """Do the shards that are not done yet, with a pool of actors or, where `actors` is None, with plain tasks.

    Shards that hold failed rows are done again. Raises UserError as the worker raised it, and StageError for any other
    failure, too many failed rows among them: finished shards stay, and a rerun does the others.
    """
    numbers = {task.number for task in tasks}
    families = list(job.all_families)
    found = published(job.output, job.part, families)
    records = {number: record for number, record in found.items() if number in numbers}
    todo = [task for task in tasks if task.number not in records or records[task.number].num_failed]
    if records:
        num_again = sum(bool(record.num_failed) for record in records.values())
        again = f", {num_again} of them with failed rows that are tried again" if num_again else ""
        logger.info("%s: %d of %d shards are already there%s", job.stage, len(records), len(tasks), again)
    progress = Progress(job.stage, len(todo))
    if todo:
        from stic_ray.stages.flow import do_shards

        _record_num_shards(job, len(tasks))
        num_dead = 0
        with closing(do_shards(job, todo, actors)) as done:
            for number, record, work in done:
                records[number] = record
                progress.advance(record.num_rows_in_all, work)
                num_dead = num_dead + 1 if 0 < record.num_failed == record.num_rows_in_all else 0
                if num_dead >= _NUM_FAILED_SHARDS_OF_A_DEAD_STORAGE:
                    _check_failed(job, records)
    delete_leftovers(job.output, job.part, families, {*found, *records})
    _check_failed(job, records)
    num_rows, reasons = _total(records, "num_rows"), _total(records, "rejected_by_reason")
    num_failed = num_rows.pop(FAILED_FAMILY, 0)
    return Shards(num_rows, dict(sorted(reasons.items())), num_failed, progress.summary() if todo else None)


def _total(records: Mapping[int, ShardRecord], counts: str) -> Counter[str]:
    """Add up one of the counts that records have."""
    return sum((Counter(getattr(record, counts)) for record in records.values()), Counter())


def _record_num_shards(job: ShardJob, num_shards: int) -> None:
    """Leave the number of shards for whoever looks how far the stage is."""
    started = job.output.read_json(STARTED) or {}
    numbers = {**started.get("num_shards", {}), job.part: num_shards}
    job.output.write_json(STARTED, {**started, "num_shards": numbers})


def _check_failed(job: ShardJob, records: Mapping[int, ShardRecord]) -> None:
    """Raise StageError where more rows have failed than may."""
    num_rows = _total(records, "num_rows")
    num_failed = num_rows[FAILED_FAMILY]
    if num_failed <= job.max_failed_share * num_rows.total():
        return
    messages = _total(records, "failed_by_message").most_common(3)
    reasons = "; ".join(f"{number} x {message}" for message, number in messages)
    raise StageError(
        f"{job.stage}: {num_failed} of {num_rows.total()} rows failed, more than cluster.max_failed_share="
        f"{job.max_failed_share:g} allows: {reasons}. What is finished stays; the same command tries those rows again."
    )
