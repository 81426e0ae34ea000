"""Stages `dpo` and `sft` on the driver: what they read, the worker group, and what is left at the end."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.exceptions
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig, UserCallback
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from stic_ray.core.config import MAY_CHANGE, DPOConfig, RunConfig
from stic_ray.core.errors import ConfigError, SourceError, StageError
from stic_ray.core.rundir import RunDir, digest, read_shard, row_counts
from stic_ray.core.schemas import PAIRS
from stic_ray.core.storage import Location
from stic_ray.stages.training.worker import train_worker

_ATTEMPTS = "training"


def train_dpo(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Train on the pairs from the base model; leaves checkpoint, metrics.jsonl and result.json in `run`/dpo.

    Raises SourceError when `dpo.num_images` leaves no pair, or too few to exchange their pictures.
    """
    source = RunDir.of(config.dpo.pairs) if config.dpo.pairs else run / "preferences"
    return _train("dpo", config, run, _choose_pairs(config.dpo, source), start=None)


def train_sft(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Train on the infused rows from the model of `sft.start`; leaves the same files in `run`/sft."""
    start = (run / "dpo").location / "checkpoint" if config.sft.start == "dpo" else None
    infused, workers = run / "infusion", config.workers
    mixed = infused.num_rows(["text"]) and infused.num_rows(["rows"])
    if mixed and workers.zero_stage == 3 and workers.num_workers > 1:
        raise ConfigError(
            "workers.zero_stage=3 cannot train on rows with and without an image: workers would wait for each other's "
            "vision tower for ever. Use workers.zero_stage=2, or instruction data of one kind."
        )
    families = ["rows", "text"]
    rows = _Rows([shard for family in families for shard in infused.shards(family)], infused.num_rows(families))
    return _train("sft", config, run, rows, start=start)


@dataclass(frozen=True)
class _Rows:
    """What a stage trains on: the files that hold it, and how many of their rows it is."""

    shards: list[Location]
    num_rows: int


def _choose_pairs(settings: DPOConfig, source: RunDir) -> _Rows:
    """Return the pairs of the first `dpo.num_images` images. Shards of another run may have any size: look inside."""
    shards, limit = source.shards("pairs"), settings.num_images
    num_rows = source.num_rows(["pairs"])
    if limit is not None:
        column = pa.schema([PAIRS.field("position")])
        counts = [sum(p < limit for p in read_shard(shard, column)["position"].to_pylist()) for shard in shards]
        shards, num_rows = [shard for shard, count in zip(shards, counts, strict=True) if count], sum(counts)
    if not num_rows:
        raise SourceError(f"dpo.num_images={limit} leaves none of the pairs in '{source.uri}'; use more images.")
    if num_rows == 1 and settings.image == "shuffled":
        raise SourceError("dpo.image=shuffled needs at least 2 pairs to exchange their pictures, there is 1.")
    return _Rows(shards, num_rows)


def _train(stage: str, config: RunConfig, run: RunDir, rows: _Rows, start: Location | None) -> dict[str, Any]:
    output, workers, num_rows = run / stage, config.workers, rows.num_rows
    settings = {
        "stage": stage,
        "config": config.model_dump(),
        "output": output.uri,
        "files": [shard.uri for shard in rows.shards],
        "start": start.uri if start else None,
    }
    # Optimiser state is cut by the number of workers, so another number starts afresh under another name.
    cut = [workers.num_workers, workers.micro_batch, workers.zero_stage]
    identity = digest([config.model_dump(exclude=set(MAY_CHANGE)), num_rows, cut])
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if workers.num_gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers.num_workers,
            use_gpu=workers.num_gpus > 0,
            resources_per_worker={"CPU": workers.num_cpus, **({"GPU": workers.num_gpus} if workers.num_gpus else {})},
            label_selector=dict(workers.label_selector) or None,
        ),
        run_config=RayRunConfig(
            name=f"attempt-{identity}",  # the same command finds its checkpoints again, another configuration does not
            storage_path=(output / _ATTEMPTS).uri,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=[_Restarts(stage, workers.max_failures)],
        ),
    )
    try:
        with _plain_interrupts():
            trainer.fit()
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        raise _explain(stage, error) from error
    result = output.read_json("result.json")
    assert result is not None, f"{stage} ended without an error and without result.json"
    (output / _ATTEMPTS).location.delete_folder()
    return {**row_counts(num_rows, result["num_rows"], {}), "num_steps": result["num_steps"]}


class _Restarts(UserCallback):
    """Says when training lost workers, and what comes of it; Ray Train keeps that to itself."""

    def __init__(self, stage: str, max_failures: int) -> None:
        self.stage, self.max_failures = stage, max_failures
        self.num_failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        self.num_failures += 1
        goes_on = "restarts from its last checkpoint" if self.num_failures <= self.max_failures else "stops"
        print(
            f"{self.stage}: lost {len(worker_exceptions)} workers ({_last_lines(worker_exceptions)}); failure "
            f"{self.num_failures}, workers.max_failures={self.max_failures}: {goes_on}",
            flush=True,
        )


@contextmanager
def _plain_interrupts() -> Iterator[None]:
    """Turn Ray Train's answer to Ctrl-C, an exit with status 0, into Python's own, and take its handler away again."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, handler)


def _last_lines(failures: Mapping[int, BaseException]) -> str:
    return "; ".join(sorted({" ".join(str(failure).strip().splitlines()[-1:]) for failure in failures.values()}))[:500]


def _explain(stage: str, error: BaseException) -> StageError:
    reasons = _last_lines(getattr(error, "worker_failures", None) or {0: error})
    return StageError(
        f"{stage} stopped after its restarts were used up: {reasons}. "
        "The same command goes on from the last checkpoint."
    )
