"""The shards of a stage: which are done, which are to be done, and what became of their rows.

One input shard becomes one set of output files with fixed names (core/publishing.py), on the way that stages/flow.py
describes. Ray is imported where something runs: stages are read on machines without it.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from stic_ray.core.config import ActorsConfig
from stic_ray.core.errors import SourceError, StageError
from stic_ray.core.publishing import ShardRecord, all_families, delete_leftovers, published
from stic_ray.core.rundir import FAILED_FAMILY, REJECTED_FAMILY, ROWS_NOW, STARTED, RunDir, row_counts
from stic_ray.core.workload import NUM_ROWS_OUT
from stic_ray.engines.guarded import Work
from stic_ray.stages.windows import RowWorker, Tables

logger = logging.getLogger(__name__)

ShardWorker = Callable[[pa.Table], Tables]
"""Turns a whole shard into output tables by family; one without rows may be left out."""

_NUM_FAILED_SHARDS_OF_A_DEAD_STORAGE = 3
"""So many shards one after another of which every row failed are not waited for any further."""
_LOG_EVERY_S = 10.0
_NUM_LOGGED_FOR_RATES = 12
"""Rates are those of the last so many log lines: what a stage does now, without its start."""


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
    beside: tuple[str, ...] = ()
    """Families with more about rows that others hold: they are no rows of their own in accounts, shares and rates."""
    part: str = ""
    """Tells jobs apart that share a folder; a part of the names of their files."""
    max_failed_share: float = 0.0
    """Share of the rows that may fail for the job to be done."""
    num_rows_before: int = 0
    """Rows that the step has from earlier, which count for that share."""


@dataclass(frozen=True)
class Shards:
    """What the shards of a finished job hold."""

    num_rows: Mapping[str, int]
    """By family."""
    rejected_by_reason: Mapping[str, int]
    num_failed: int
    throughput: dict[str, Any] | None
    """Figures of what was done in this call (Progress.summary); None when nothing was left to do."""

    @property
    def num_rows_now(self) -> int:
        """Rows of the shards that were done in this call."""
        return self.throughput["num_rows"] if self.throughput else 0

    def accounts(self, num_rows_in: int) -> dict[str, Any]:
        """Return the row accounts of a manifest and the throughput."""
        num_written = sum(number for family, number in self.num_rows.items() if family != REJECTED_FAMILY)
        counts = row_counts(num_rows_in, num_written, self.rejected_by_reason, self.num_failed)
        return {**counts, ROWS_NOW: self.num_rows_now, "throughput": self.throughput}

    def accounts_by_image(self, num_images: int, family: str) -> dict[str, Any]:
        """Return `accounts` where a row in is an image, whatever it gives; rows of `family` are counted beside.

        So are all rows that were left, which the throughput is of.
        """
        num_ended = sum(self.rejected_by_reason.values()) + self.num_failed
        counts = row_counts(num_images, num_images - num_ended, self.rejected_by_reason, self.num_failed)
        num_out = sum(self.num_rows.values()) + self.num_failed
        given = {f"num_{family}": self.num_rows.get(family, 0), NUM_ROWS_OUT: num_out}
        return {**counts, ROWS_NOW: self.num_rows_now, **given, "throughput": self.throughput}


def run_shards(job: ShardJob, tasks: Sequence[ShardTask], actors: ActorsConfig | None) -> Shards:
    """Do the shards that are not done yet, with a pool of actors or, where `actors` is None, with plain tasks.

    Shards that hold failed rows are done again. Raises UserError as the worker raised it, and StageError for any other
    failure, too many failed rows among them: finished shards stay, and a rerun does the others.
    """
    numbers = {task.number for task in tasks}
    families = list(all_families(job.families))
    found = published(job.output, job.part, families)
    records = {number: record.without(job.beside) for number, record in found.items() if number in numbers}
    todo = [task for task in tasks if task.number not in records or records[task.number].num_failed]
    if records:
        num_again = sum(bool(record.num_failed) for record in records.values())
        again = f", {num_again} of them with failed rows that are tried again" if num_again else ""
        logger.info("%s: %d of %d shards are already there%s", job.stage, len(records), len(tasks), again)
    progress = Progress(job.stage, len(todo))
    if todo:
        from stic_ray.stages.flow import do_shards

        started = job.output.read_json(STARTED) or {}  # for whoever looks how far the stage is
        num_shards = {**started.get("num_shards", {}), job.part: len(tasks)}
        job.output.write_json(STARTED, {**started, "num_shards": num_shards})
        num_dead = 0
        with closing(do_shards(job, todo, actors)) as done:
            for number, record, work in done:
                records[number] = record = record.without(job.beside)
                progress.advance(record.num_rows_in_all, work)
                num_dead = num_dead + 1 if 0 < record.num_failed == record.num_rows_in_all else 0
                if num_dead >= _NUM_FAILED_SHARDS_OF_A_DEAD_STORAGE:
                    _check_failed(job, records)
    delete_leftovers(job.output, job.part, families, {*found, *records})
    _check_failed(job, records)
    num_rows, reasons = _total(records, "num_rows"), _total(records, "rejected_by_reason")
    num_failed = num_rows.pop(FAILED_FAMILY, 0)
    return Shards(num_rows, dict(sorted(reasons.items())), num_failed, progress.summary() if todo else None)


def check_written(accounts: Mapping[str, Any], output: RunDir, problem: str) -> None:
    """Raise SourceError, which begins with `problem`, where not one row was written."""
    if not accounts["num_rows_written"]:
        raise SourceError(
            f"{problem}: {accounts['rejected_by_reason']}. The rejected rows are in '{output.uri}'; delete that folder "
            "to try again with other settings."
        )


def _total(records: Mapping[int, ShardRecord], counts: str) -> Counter[str]:
    """Add up one of the counts that records have."""
    return sum((Counter(getattr(record, counts)) for record in records.values()), Counter())


def _check_failed(job: ShardJob, records: Mapping[int, ShardRecord]) -> None:
    """Raise StageError where more rows have failed than may."""
    counts = _total(records, "num_rows")
    num_failed, num_rows = counts[FAILED_FAMILY], job.num_rows_before + counts.total()
    if num_failed <= job.max_failed_share * num_rows:
        return
    messages = _total(records, "failed_by_message").most_common(3)
    reasons = "; ".join(f"{number} x {message}" for message, number in messages)
    raise StageError(
        f"{job.stage}: {num_failed} of {num_rows} rows failed, more than cluster.max_failed_share="
        f"{job.max_failed_share:g} allows: {reasons}. What is finished stays; the same command tries those rows again."
    )


class _Moment(NamedTuple):
    """How far a stage was at a time."""

    at_s: float
    num_shards: int = 0
    num_rows: int = 0
    work: Work = Work()


class Progress:
    """Adds up what the shards of a stage report: how far it is, how fast, and how busy its actors are."""

    def __init__(self, stage: str, num_shards: int) -> None:
        """Begin with nothing done of so many shards."""
        self.stage, self.num_shards = stage, num_shards
        self.now = self._start = self._halfway = _Moment(time.monotonic())
        self._first_shard = self.now
        self._logged = deque([self.now], maxlen=_NUM_LOGGED_FOR_RATES)

    def advance(self, num_rows: int, work: Work) -> None:
        """Count one more shard, and log every few seconds and at the end."""
        _, num_done, num_rows_before, work_before = self.now
        self.now = _Moment(time.monotonic(), num_done + 1, num_rows_before + num_rows, work_before + work)
        if not num_done:
            self._first_shard = self.now
        if self.now.num_shards == self.num_shards // 2:
            self._halfway = self.now
        every_s = _LOG_EVERY_S / 20 if logger.isEnabledFor(logging.DEBUG) else _LOG_EVERY_S  # a terminal has a bar
        if self.now.at_s - self._logged[-1].at_s >= every_s or self.now.num_shards == self.num_shards:
            self._log()

    def summary(self) -> dict[str, Any]:
        """Return the figures of the whole stage for its manifest, and as `steady` those of its second half."""
        end = self.now._replace(at_s=time.monotonic())
        return {
            "seconds_to_first_shard": round(self._first_shard.at_s - self._start.at_s, 3),
            **_figures(self._start, end),
            "steady": _figures(self._halfway, end),
        }

    def _log(self) -> None:
        then, now = self._logged[0], self.now
        self._logged.append(now)
        recent = _figures(then, now)
        left_s = recent["seconds"] / (now.num_shards - then.num_shards) * (self.num_shards - now.num_shards)
        line = f"{now.num_shards}/{self.num_shards} shards, {now.num_rows} rows, {recent['rows_per_s']:.1f} rows/s"
        if "utilisation" in recent:
            line += (
                f", {recent['tokens_per_s']:.0f} tokens/s, {recent['requests_per_call']:.1f} requests a call, "
                f"{recent['requests_in_flight']:.1f} in flight per actor, actors {recent['utilisation']:.0%} busy"
            )
        logger.info("%s: %s, %.0f s left", self.stage, line, left_s)


def _figures(start: _Moment, end: _Moment) -> dict[str, float]:
    seconds, num_rows, work = end.at_s - start.at_s, end.num_rows - start.num_rows, end.work - start.work
    figures = {"seconds": seconds, "num_rows": num_rows, "rows_per_s": num_rows / seconds}
    if work.num_calls:
        figures |= {"tokens_per_s": work.num_tokens / seconds, "utilisation": work.utilisation}
        figures |= {"requests_per_call": work.requests_per_call, "requests_in_flight": work.requests_in_flight}
    return {name: round(value, 3) for name, value in figures.items()}
