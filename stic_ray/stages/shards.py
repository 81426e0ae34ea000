"""Shards through Ray Data: one input shard becomes one set of output files with fixed names.

Load (a task, near the storage) -> work (an actor pool, or tasks) -> publish (a task). A shard travels as one row
that holds its tables as Arrow IPC bytes: Ray Data splits and merges blocks on the way, but never a row. Images
travel encoded. The file of the main family is published last, so its presence says that the shard is done. Ray is
imported where something runs: stages are read on machines without it.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import pyarrow as pa

from stic_ray.core.config import ActorsConfig
from stic_ray.core.placement import TASK_CPUS
from stic_ray.core.rundir import STARTED, RunDir
from stic_ray.engines.watched import Work
from stic_ray.method.preferences import Rejection
from stic_ray.stages.attempts import Attempts, attempts_name, loading
from stic_ray.stages.failures import explain
from stic_ray.stages.progress import ActorMetrics, Progress
from stic_ray.stages.windows import Tables, Windows, WindowWorker

logger = logging.getLogger(__name__)

ShardWorker = Callable[[pa.Table], Tables]
"""Turns a whole shard into the output tables by family, all families of the job."""

_SHARDS_PER_ACTOR = 2
"""Shards that an actor holds: the next one's windows follow without a gap, and little is lost when it dies."""


@dataclass(frozen=True)
class ShardTask:
    """One input shard: its number, which names the output, and whatever its loader needs."""

    number: int
    payload: Mapping[str, Any]


@dataclass(frozen=True)
class ShardJob:
    """How a stage turns shards into files."""

    stage: str
    output: RunDir
    families: Mapping[str, pa.Schema]
    """Output families with their schemas; the last one is the main family."""
    load: Callable[[ShardTask], pa.Table]
    make_worker: Callable[[], ShardWorker | WindowWorker]
    """A WindowWorker for a pool of actors, a ShardWorker for tasks."""

    @property
    def main_family(self) -> str:
        """The family whose file marks a shard as done."""
        return list(self.families)[-1]

    @property
    def empty_family(self) -> str:
        """The family whose file stands for a main file without rows."""
        return f"empty-{self.main_family}"


class _Actor:
    """Owns the worker of an actor; called for several rows of Ray Data at a time."""

    def __init__(self, job: ShardJob, actors: ActorsConfig) -> None:
        import ray

        with loading(job.output, ray.get_runtime_context().get_actor_id() or "", actors.max_retries + 1):
            worker = job.make_worker()
        assert isinstance(worker, WindowWorker), f"{job.stage} has actors, but no WindowWorker"
        self.output = job.output
        self.engine = worker.engine
        self.windows = Windows(worker, job.families, actors)
        self.metrics = ActorMetrics(job.stage)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        attempts = Attempts(self.output, row["number"])
        with attempts.handling("unpacking"):
            shard = _unpack(row["shard"])
        tables = self.windows.do(shard, attempts)
        with attempts.handling("packing"):
            result = _packed(row["number"], tables, self.engine.take_work() if self.engine else Work())
        self.metrics.record(shard.num_rows, Work(**result["work"]))
        return result


def run_shards(job: ShardJob, tasks: Sequence[ShardTask], actors: ActorsConfig | None) -> dict[str, Any] | None:
    """Do the shards that are not done yet, with a pool of actors or, where `actors` is None, with plain tasks.

    Returns the figures of what was done for the manifest (see Progress), or None when nothing was left to do. Raises
    UserError as the worker raised it, and StageError for any other failure: finished shards stay, and a rerun does
    the others.
    """
    import ray.exceptions

    done = _finished(job)
    todo = [task for task in tasks if task.number not in done]
    if done:
        logger.info("%s: %d of %d shards are already there", job.stage, len(tasks) - len(todo), len(tasks))
    if not todo:
        return None
    _record_num_shards(job, len(tasks))
    progress = Progress(job.stage, len(todo))
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # plans and paths; our own lines say how far a stage is
    dataset = _dataset(job, todo, actors)
    try:
        for row in dataset.iter_rows():
            progress.advance(row["num_rows"], Work(**row["work"]))
    except KeyboardInterrupt:
        # It does not reach the thread that fetches the rows, so the actors would live on, or be waited for.
        if executor := dataset._current_executor:
            executor.shutdown(force=True)
        raise
    except (ray.exceptions.RayError, RuntimeError, OSError) as error:
        raise explain(job.stage, error) from error
    job.output.delete_leftovers()
    return progress.summary()


def _record_num_shards(job: ShardJob, num_shards: int) -> None:
    """Leave the number of shards for whoever looks how far the stage is."""
    started = job.output.read_json(STARTED) or {}
    numbers = {**started.get("num_shards", {}), job.main_family: num_shards}
    job.output.write_json(STARTED, {**started, "num_shards": numbers})


def rejected_row(identity: str, path: str, rejection: Rejection) -> dict[str, Any]:
    """Return a row of the table `rejected`."""
    return {"image_id": identity, "path": path, "reason": rejection.reason, "message": rejection.message}


def _finished(job: ShardJob) -> set[int]:
    """Return the numbers of the finished shards; those with a damaged file are removed, to be made again."""
    families = [*job.families, job.empty_family]
    damaged = job.output.damaged_shards(families)
    if damaged:
        logger.warning("%s: %d shards have a damaged file and are made again", job.stage, len(damaged))
        job.output.delete_shards(families, damaged)
    return job.output.shard_numbers(job.main_family) | job.output.shard_numbers(job.empty_family)


def _dataset(job: ShardJob, todo: Sequence[ShardTask], actors: ActorsConfig | None) -> Any:
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    # Every second Ray Data would add up the memory of every task's process, 5 ms of CPU and more with a large model.
    context.memory_usage_poll_interval_s = None
    # It would end a stage that reports nothing for half an hour; a shard may take hours, and so may finding a place.
    context.execution_no_progress_timeout_s = -1
    rows = [{"number": task.number, "payload": json.dumps(task.payload)} for task in todo]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset.set_name(job.stage.replace(" ", "_"))
    loaded = dataset.map(
        lambda row: {"number": row["number"], "shard": _pack(job.load(_task(row)))}, num_cpus=TASK_CPUS
    )
    if actors is None:
        worked = loaded.map(lambda row: _work_whole(job, row), num_cpus=1)
    else:
        most = min(actors.num_actors, len(rows))
        worked = loaded.map(
            cast(Any, _Actor),  # Ray types functions only
            fn_constructor_args=(job, actors),
            compute=ActorPoolStrategy(
                min_size=min(actors.min_actors or most, most),
                max_size=most,
                max_concurrent_calls_per_actor=_SHARDS_PER_ACTOR,
                max_tasks_in_flight_per_actor=_SHARDS_PER_ACTOR,
                enable_true_multi_threading=True,
            ),
            num_cpus=actors.num_cpus,
            num_gpus=actors.num_gpus,
            label_selector=dict(actors.label_selector) or None,
        )
    return worked.map(lambda row: _publish(job, row), num_cpus=TASK_CPUS)


def _task(row: dict[str, Any]) -> ShardTask:
    return ShardTask(row["number"], json.loads(row["payload"]))


def _work_whole(job: ShardJob, row: dict[str, Any]) -> dict[str, Any]:
    work = cast(ShardWorker, job.make_worker())
    return _packed(row["number"], work(_unpack(row["shard"])), Work())


def _publish(job: ShardJob, row: dict[str, Any]) -> dict[str, Any]:
    tables = {name: _unpack(data) for name, data in zip(row["names"], row["tables"], strict=True)}
    assert set(tables) == set(job.families), f"{job.stage} gave {sorted(tables)}, expected {sorted(job.families)}"
    for family, schema in job.families.items():
        if tables[family].num_rows:
            job.output.write_shard(family, row["number"], tables[family], schema)
        elif family == job.main_family:
            # `datasets` cannot read a file without rows, so the mark that the shard is done has another name.
            job.output.write_shard(job.empty_family, row["number"], tables[family], schema)
    attempts = job.output.location / attempts_name(row["number"])
    if attempts.exists():
        attempts.delete()
    return {"num_rows": sum(table.num_rows for table in tables.values()), "work": row["work"]}


def _packed(number: int, tables: Tables, work: Work) -> dict[str, Any]:
    """Return a shard's tables, and what its engine did meanwhile, as a row."""
    packed = [_pack(table) for table in tables.values()]
    return {"number": number, "tables": packed, "names": list(tables), "work": asdict(work)}


def _pack(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _unpack(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
