"""Shards through Ray Data: one input shard becomes one set of output files with fixed names.

Load (a task, near the storage) -> work (an actor pool, or tasks) -> publish (a task). A shard travels as one row
that holds its tables as Arrow IPC bytes: Ray Data splits and merges blocks on the way, but never a row. Images
travel encoded. The file of the main family is published last, so its presence says that the shard is done.
"""

import builtins
import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import pyarrow as pa
import ray
import ray.exceptions
from ray.data import ActorPoolStrategy, Dataset
from ray.util.annotations import RayDeprecationWarning

from stic_ray.core import errors
from stic_ray.core.config import ActorsConfig
from stic_ray.core.errors import StageError, UserError
from stic_ray.core.rundir import RunDir
from stic_ray.method.preferences import Rejection
from stic_ray.stages.cluster import TASK_CPUS

logger = logging.getLogger(__name__)

Tables = dict[str, pa.Table]


@dataclass(frozen=True)
class ShardTask:
    """One input shard: its number, which names the output, and whatever its loader needs."""

    number: int
    payload: Mapping[str, Any]


class ShardWorker(Protocol):
    """Owns what is expensive to set up, a model above all."""

    def __call__(self, shard: pa.Table) -> Tables:
        """Return the output tables by family, all families of the job."""
        ...


@dataclass(frozen=True)
class ShardJob:
    """How a stage turns shards into files."""

    stage: str
    output: RunDir
    families: Mapping[str, pa.Schema]
    """Output families with their schemas; the last one is the main family."""
    load: Callable[[ShardTask], pa.Table]
    make_worker: Callable[[], ShardWorker]

    @property
    def main_family(self) -> str:
        """The family whose file marks a shard as done."""
        return list(self.families)[-1]

    @property
    def empty_family(self) -> str:
        """The family whose file stands for a main file without rows."""
        return f"empty-{self.main_family}"


class _Worker:
    """Adapts a ShardWorker to rows of Ray Data."""

    def __init__(self, job: ShardJob) -> None:
        self.work = job.make_worker()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        tables = self.work(_unpack(row["shard"]))
        return {"number": row["number"], "tables": [_pack(table) for table in tables.values()], "names": list(tables)}


def run_shards(job: ShardJob, tasks: Sequence[ShardTask], actors: ActorsConfig | None) -> None:
    """Do the shards that are not done yet, with a pool of actors or, where `actors` is None, with plain tasks.

    Raises UserError as the worker raised it, and StageError for any other failure: finished shards stay, and a
    rerun does the others.
    """
    done = job.output.shard_numbers(job.main_family) | job.output.shard_numbers(job.empty_family)
    todo = [task for task in tasks if task.number not in done]
    if done:
        logger.info("%s: %d of %d shards are already there", job.stage, len(tasks) - len(todo), len(tasks))
    if not todo:
        return
    progress = _Progress(job.stage, len(todo))
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # plans and paths; our own lines say how far a stage is
    # Ray 2.60 deprecates `max_task_retries` in map() for 2.64 without having another place for it yet.
    warnings.filterwarnings("ignore", message=".*ray_remote_args.*", category=RayDeprecationWarning)
    try:
        for row in _dataset(job, todo, actors).iter_rows():
            progress.advance(row["num_rows"])
    except (ray.exceptions.RayError, RuntimeError, OSError) as error:
        raise _explain(job.stage, error) from error


def rejected_row(identity: str, path: str, rejection: Rejection) -> dict[str, Any]:
    """Return a row of the table `rejected`."""
    return {"image_id": identity, "path": path, "reason": rejection.reason, "message": rejection.message}


def _dataset(job: ShardJob, todo: Sequence[ShardTask], actors: ActorsConfig | None) -> Dataset:
    rows = [{"number": task.number, "payload": json.dumps(task.payload)} for task in todo]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset.set_name(job.stage.replace(" ", "_"))
    loaded = dataset.map(
        lambda row: {"number": row["number"], "shard": _pack(job.load(_task(row)))}, num_cpus=TASK_CPUS
    )
    if actors is None:
        worked = loaded.map(lambda row: _Worker(job)(row), num_cpus=1)
    else:
        worked = loaded.map(
            cast(Any, _Worker),  # Ray types functions only
            fn_constructor_args=(job,),
            compute=ActorPoolStrategy(size=min(actors.num_actors, len(rows))),
            num_cpus=actors.num_cpus,
            num_gpus=actors.num_gpus,
            # Unbounded retries, Ray Data's default, would try an image that kills its actor for ever.
            max_restarts=-1,
            max_task_retries=actors.max_retries,
        )
    return worked.map(lambda row: _publish(job, row), num_cpus=TASK_CPUS)


def _task(row: dict[str, Any]) -> ShardTask:
    return ShardTask(row["number"], json.loads(row["payload"]))


def _publish(job: ShardJob, row: dict[str, Any]) -> dict[str, Any]:
    tables = {name: _unpack(data) for name, data in zip(row["names"], row["tables"], strict=True)}
    assert set(tables) == set(job.families), f"{job.stage} gave {sorted(tables)}, expected {sorted(job.families)}"
    for family, schema in job.families.items():
        if tables[family].num_rows:
            job.output.write_shard(family, row["number"], tables[family], schema)
        elif family == job.main_family:
            # `datasets` cannot read a file without rows, so the mark that the shard is done has another name.
            job.output.write_shard(job.empty_family, row["number"], tables[family], schema)
    return {"num_rows": sum(table.num_rows for table in tables.values())}


def _pack(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _unpack(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


def _explain(stage: str, error: BaseException) -> Exception:
    """Return the error that a task or actor raised as the user's own, or as a StageError with stage and cause.

    Ray hands the remote traceback over as text, with the exception that came first on its first unindented line.
    """
    lines = str(error).splitlines()
    raised = [match for line in lines if (match := re.match(r"([\w.]+(?:Error|Exception)): (.+)", line))]
    ours = (match for match in raised if match[1].startswith("stic_ray."))  # says more than what it was raised from
    first = next(ours, None) or next((match for match in raised if not match[1].startswith("ray.")), None)
    if first is None:
        last = next((line.strip() for line in reversed(lines) if line.strip()), type(error).__name__)
        return StageError(f"{stage} stopped: {last}")
    name, message = first[1].rsplit(".", 1)[-1], first[2].strip()
    kind = getattr(errors if first[1].startswith("stic_ray.") else builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, UserError):
        return kind(message)
    if isinstance(kind, type) and issubclass(kind, OSError):
        return StageError(f"{stage} could not read or write: {message}. Mend this and run the same command again.")
    return StageError(f"{stage} stopped: {name}: {message}")


class _Progress:
    """Logs how far a stage is, how fast, and how long still."""

    def __init__(self, stage: str, num_shards: int) -> None:
        self.stage, self.num_shards = stage, num_shards
        self.num_done = self.num_rows = 0
        self.start_s = self.logged_s = time.monotonic()

    def advance(self, num_rows: int) -> None:
        self.num_done += 1
        self.num_rows += num_rows
        now_s = time.monotonic()
        if now_s - self.logged_s < 5 and self.num_done < self.num_shards:
            return
        self.logged_s = now_s
        elapsed_s = now_s - self.start_s
        left_s = elapsed_s / self.num_done * (self.num_shards - self.num_done)
        rate = self.num_rows / elapsed_s if elapsed_s else 0.0
        logger.info(
            "%s: %d/%d shards, %d rows, %.1f rows/s, %.0f s left",
            self.stage,
            self.num_done,
            self.num_shards,
            self.num_rows,
            rate,
            left_s,
        )
