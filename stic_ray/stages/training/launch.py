"""Stages `dpo` and `sft` on the driver: what they read, the worker group, and what is left at the end."""

from typing import Any

import ray.exceptions
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from stic_ray.core.config import RunConfig, WorkersConfig
from stic_ray.core.errors import ConfigError, StageError
from stic_ray.core.rundir import RunDir, digest, row_counts
from stic_ray.core.storage import Location
from stic_ray.stages.training.index import Rows, index_conversations, index_pairs
from stic_ray.stages.training.worker import train_worker

_ATTEMPTS = "training"


def train_dpo(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Train on the pairs from the base model; leaves checkpoint, metrics.jsonl and result.json in `run`/dpo.

    Raises SourceError as `index_pairs`.
    """
    source = RunDir.of(config.dpo.pairs) if config.dpo.pairs else run / "preferences"
    return _train("dpo", config, run, index_pairs(config, source.shards("pairs")), start=None)


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
    rows = index_conversations(config, [*infused.shards("rows"), *infused.shards("text")])
    return _train("sft", config, run, rows, start=start)


def _train(stage: str, config: RunConfig, run: RunDir, rows: Rows, start: Location | None) -> dict[str, Any]:
    output, workers, num_rows = run / stage, config.workers, rows.num_trained
    settings = {
        "stage": stage,
        "config": config.model_dump(),
        "output": output.uri,
        "rows": rows,
        "start": start.uri if start else None,
    }
    # Another ZeRO stage has checkpoints of another form, so it starts afresh under another name.
    identity = digest([config.model_dump(exclude={"actors", "workers"}), num_rows, workers.zero_stage])
    attempts = (output / _ATTEMPTS).location
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if workers.num_gpus else "gloo"),
        scaling_config=scaling_of(workers),
        run_config=RayRunConfig(
            name=f"attempt-{identity}",  # the same command finds its checkpoints again, another configuration does not
            storage_path=attempts.path,
            storage_filesystem=None if attempts.is_local else attempts.filesystem,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=workers.keep_checkpoints),
        ),
    )
    try:
        trainer.fit()
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        raise _explain(stage, error) from error
    result = output.read_json("result.json")
    assert result is not None, f"{stage} ended without an error and without result.json"
    attempts.delete_folder()
    used = result["num_rows"] + result["num_held_out"]
    told = ("num_steps", "num_held_out", "held_out", "throughput", "warnings")
    return {**row_counts(num_rows + rows.num_held_out, used, {}), **{name: result[name] for name in told}}


def scaling_of(workers: WorkersConfig) -> ScalingConfig:
    """Return what Ray Train asks of the cluster."""
    return ScalingConfig(
        num_workers=workers.num_workers,
        use_gpu=workers.num_gpus > 0,
        resources_per_worker={"CPU": workers.num_cpus, **({"GPU": workers.num_gpus} if workers.num_gpus else {})},
        accelerator_type=workers.accelerator_type,
        placement_strategy=workers.placement_strategy,
    )


def _explain(stage: str, error: BaseException) -> StageError:
    failures = getattr(error, "worker_failures", None) or {}
    reasons = {" ".join(str(failure).strip().splitlines()[-1:]) for failure in failures.values()} or {str(error)}
    return StageError(
        f"{stage} stopped after its restarts were used up: {'; '.join(sorted(reasons))[:500]}. "
        "The same command goes on from the last checkpoint."
    )
