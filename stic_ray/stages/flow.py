"""A shard's way through Ray Data: load, work, publish.

Load (a task, near the storage) -> work (an actor pool, or tasks) -> publish (a task). A shard travels as one row
that holds its tables as Arrow IPC bytes: Ray Data splits and merges blocks on the way, but never a row. Images
travel encoded. An error travels as a row, too: Ray would wrap it in its own words, and print pages of stack.
"""

import json
import logging
import pickle
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from typing import Any, cast

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.util.metrics import Counter, Gauge, Histogram

from stic_ray.core.config import ActorsConfig
from stic_ray.core.errors import StageError, SticError
from stic_ray.core.placement import TASK_CPUS
from stic_ray.core.publishing import ShardRecord, all_families, publish
from stic_ray.engines.guarded import Work
from stic_ray.stages.quarantine import Quarantine, loading, nobody_has_loaded, notes_name
from stic_ray.stages.shards import ShardJob, ShardTask, ShardWorker
from stic_ray.stages.tasks import end_with_parent, explain
from stic_ray.stages.windows import RowWorker, Tables, Windows

Row = dict[str, Any]
"""A shard on its way: its number, a pickled error or nothing, and what the last step made."""
_NO_ERROR = b""
_SHARDS_PER_ACTOR = 2
"""Shards that an actor holds: the next one's windows follow without a gap, and little is lost when it dies."""
_TASK_BYTES, _BYTES_PER_BYTE = 200 * 2**20, 6
"""What a task that reads or writes a shard needs of memory: its process, and copies in Python, Arrow and Ray."""
_LARGEST_SHARE_OF_A_NODE = 0.8


def do_shards(
    job: ShardJob, todo: Sequence[ShardTask], actors: ActorsConfig | None
) -> Generator[tuple[int, ShardRecord, Work]]:
    """Do some shards, and yield each when it is published: its number, its record, and what its engine did.

    Raises UserError as a worker raised it, and StageError for any other failure. Nothing of it is left running when
    the iterator ends or is closed.
    """
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # plans, paths, traces: our own lines say it in one
    nobody_has_loaded(job.output)
    dataset = _dataset(job, todo, actors)
    try:
        for row in dataset.iter_rows():
            if row["error"]:
                raise pickle.loads(row["error"])
            yield row["number"], pickle.loads(row["record"]), pickle.loads(row["work"])
    except SticError:
        raise
    except Exception as error:
        raise explain(job.stage, error) from error
    finally:
        # Ctrl-C does not reach the thread that fetches the rows, so the actors would live on, or be waited for.
        if executor := dataset._current_executor:
            with suppress(Exception):  # it may have ended with an error of its own
                executor.shutdown(force=True)


def _dataset(job: ShardJob, todo: Sequence[ShardTask], actors: ActorsConfig | None) -> Dataset:
    context = DataContext.get_current()
    # Every second Ray Data would add up the memory of every task's process, 5 ms of CPU and more with a large model.
    context.memory_usage_poll_interval_s = None
    # It would end a stage that reports nothing for half an hour; a shard may take hours, and so may finding a place.
    context.execution_no_progress_timeout_s = -1
    context.issue_detectors_config.detectors = []  # advice on settings that are ours
    rows = [{"number": task.number, "error": _NO_ERROR, "payload": json.dumps(task.payload)} for task in todo]
    small = {"num_cpus": TASK_CPUS, "memory": _memory_of(todo)}
    step: Any = _step  # Ray types functions of one argument only
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
    dataset.set_name(job.stage.replace(" ", "_"))
    loaded = dataset.map(step, fn_args=(job, "loading", _load), **small)
    if actors is None:
        worked = loaded.map(step, fn_args=(job, "working on", _work), num_cpus=1)
    else:
        most = min(actors.num_actors, len(rows))
        context.max_consecutive_actor_init_deaths = actors.num_actors  # those that Ray itself has to do with
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
    return worked.map(step, fn_args=(job, "publishing", _publish), **small)


def _memory_of(todo: Sequence[ShardTask]) -> float | None:
    """Return the bytes of memory that a task for any of these shards reserves, or None where their size is not known.

    What no node has is not asked for, as it would be waited for without end.
    """
    largest = max(task.num_bytes for task in todo)
    if not largest:
        return None
    largest_node = max((node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    return min(_TASK_BYTES + _BYTES_PER_BYTE * largest, _LARGEST_SHARE_OF_A_NODE * largest_node) or None


def _step(row: Row, job: ShardJob, doing: str, function: Callable[[ShardJob, Row], Row]) -> Row:
    """Return what `function` makes of a shard's row, or the row of the error that it or a step before it raised."""
    done = {"number": row["number"], "error": row["error"]}
    if row["error"]:
        return done
    try:
        return done | function(job, row)
    except Exception as error:
        return done | {"error": pickle.dumps(explain(job.stage, error, f"{doing} shard {row['number']}"))}


def _load(job: ShardJob, row: Row) -> Row:
    return {"shard": _pack(job.load(ShardTask(row["number"], json.loads(row["payload"]))))}


def _work(job: ShardJob, row: Row) -> Row:
    return _packed(cast(ShardWorker, job.make_worker())(_unpack(row["shard"])), Work())


def _publish(job: ShardJob, row: Row) -> Row:
    tables = {name: _unpack(data) for name, data in zip(row["names"], row["tables"], strict=True)}
    schemas = all_families(job.families)
    assert tables.keys() <= schemas.keys(), f"{job.stage} gave {sorted(tables)}, not all of {sorted(schemas)}"
    record = publish(job.output, job.part, row["number"], tables, schemas)
    (job.output.location / notes_name(row["number"])).delete()
    return {"record": pickle.dumps(record), "work": row["work"]}


def _packed(tables: Tables, work: Work) -> Row:
    """Return a shard's tables, and what its engine did meanwhile, as a row."""
    return {"tables": [_pack(table) for table in tables.values()], "names": list(tables), "work": pickle.dumps(work)}


def _pack(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _unpack(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()


class _Actor:
    """Owns the worker of an actor; called for several rows of Ray Data at a time."""

    def __init__(self, job: ShardJob, actors: ActorsConfig) -> None:
        end_with_parent()
        self.job, self.actors = job, actors
        self.error = _NO_ERROR
        try:
            with loading(job.output, ray.get_runtime_context().get_actor_id() or "", actors.max_retries + 1):
                worker = cast(RowWorker, job.make_worker())
        except Exception as error:  # the first call reports it, and the stage stops
            self.error = pickle.dumps(explain(job.stage, error, "loading the model"))
            return
        self.engine = worker.engine
        self.windows = Windows(worker, all_families(job.families), actors)
        self.metrics = ActorMetrics(job.stage)

    def __call__(self, row: Row) -> Row:
        return _step(row | {"error": row["error"] or self.error}, self.job, "working on", self.work)

    def work(self, job: ShardJob, row: Row) -> Row:
        quarantine = Quarantine(job.output, row["number"], self.actors.max_retries)
        with quarantine.handling("unpacking"):
            shard = _unpack(row["shard"])
        try:
            tables = self.windows.do(shard, quarantine)
        except StageError as error:  # one bad GPU among many is a likely cause
            raise StageError(f"{error} This was on node {ray.util.get_node_ip_address()}.") from error
        work = self.engine.take_work() if self.engine else Work()
        self.metrics.record(shard.num_rows, work)
        with quarantine.handling("packing"):
            return _packed(tables, work)


class ActorMetrics:
    """What an actor did as Ray metrics, which Ray exports as ray_stic_*; every one carries the tag `stage`."""

    def __init__(self, stage: str) -> None:
        tags = ("stage",)
        self._rows = Counter("stic_rows", "Rows that shards were finished with", tags)
        self._tokens = Counter("stic_generated_tokens", "Tokens that the model generated", tags)
        self._requests = Counter("stic_requests", "Requests that the model answered", tags)
        self._utilisation = Gauge("stic_actor_utilisation", "Share of time inside the engine, last shard", tags)
        self._in_flight = Gauge("stic_requests_in_flight", "Mean requests inside the engine, last shard", tags)
        sizes = [2.0**n for n in range(12)]
        self._call_size = Histogram("stic_requests_per_call", "Requests that an engine call held", sizes, tags)
        for metric in vars(self).values():
            metric.set_default_tags({"stage": stage})

    def record(self, num_rows: int, work: Work) -> None:
        """Add what one shard took."""
        amounts = {self._rows: num_rows, self._tokens: work.num_tokens, self._requests: work.num_requests}
        for counter, amount in amounts.items():
            if amount:  # Ray refuses to add nothing
                counter.inc(amount)
        if work.num_calls:
            self._utilisation.set(work.utilisation)
            self._in_flight.set(work.requests_in_flight)
            self._call_size.observe(work.requests_per_call)
