"""Stages `dpo` and `sft` on the driver: what they read, the worker group, and what is left at the end."""

from typing import Any

import ray
import ray.exceptions
from ray.train import CheckpointConfig, FailureConfig, Result, ScalingConfig
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.exceptions import TrainingFailedError

from stic_ray.core.config import WorkersConfig
from stic_ray.core.rundir import digest, row_counts
from stic_ray.core.steps import StepRun
from stic_ray.stages.training.failures import Restarts, explain
from stic_ray.stages.training.index import Rows, index_conversations, index_pairs

_ATTEMPTS = "training"


def train_dpo(step: StepRun) -> dict[str, Any]:
    """Train on pairs; leaves checkpoint, metrics.jsonl and result.json in the step's folder.

    Raises SourceError as `index_pairs`, and StageError.
    """
    return _train("dpo", step, index_pairs(step.config, step.inputs["pairs"].shards("pairs"), step.model()))


def train_sft(step: StepRun) -> dict[str, Any]:
    """Train on the infused rows; leaves the same files in the step's folder, and raises the same errors."""
    infused = step.inputs["rows"]
    rows = index_conversations(step.config, [*infused.shards("rows"), *infused.shards("text")])
    return _train("sft", step, rows)


def _train(kind: str, step: StepRun, rows: Rows) -> dict[str, Any]:
    """Train by the kind of objective, under the name of the step."""
    start, workers = step.model(), step.config.workers
    # Another ZeRO stage has checkpoints of another form, so it starts afresh under another name.
    identity = digest([step.identity, rows.num_trained, workers.zero_stage])
    attempts = (step.output / _ATTEMPTS).location
    settings = {
        "name": step.name,
        "kind": kind,
        "config": step.config,
        "output": step.output.uri,
        "rows": rows,
        "start": start.uri if start else None,
        "record": (attempts / f"start-{identity}.json").uri,
    }
    trainer = _Trainer(
        _run_worker,
        train_loop_config=settings,
        torch_config=TorchConfig(backend="nccl" if workers.num_gpus else "gloo"),
        scaling_config=scaling_of(workers),
        run_config=RayRunConfig(
            name=f"attempt-{identity}",  # the same command finds its checkpoints again, another configuration does not
            storage_path=attempts.path,
            storage_filesystem=None if attempts.is_local else attempts.filesystem,
            failure_config=FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=workers.keep_checkpoints),
            callbacks=[Restarts(step.name, workers.max_failures)],
        ),
    )
    try:
        trainer.fit()
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        raise explain(step.name, error) from error
    result = step.output.read_json("result.json")
    assert result is not None, f"{step.name} ended without an error and without result.json"
    attempts.delete_folder()
    used = result["num_rows"] + result["num_held_out"]
    kept = ("num_steps", "num_held_out", "held_out", "throughput", "warnings")
    return {**row_counts(rows.num_trained + rows.num_held_out, used, {}), **{name: result[name] for name in kept}}


def _run_worker(settings: dict[str, Any]) -> None:
    from stic_ray.stages.training.worker import train_worker  # TRL, which the driver does without

    train_worker(**settings)


def scaling_of(workers: WorkersConfig) -> ScalingConfig:
    """Return what Ray Train asks of the cluster."""
    return ScalingConfig(
        num_workers=workers.num_workers,
        use_gpu=workers.num_gpus > 0,
        resources_per_worker={"CPU": workers.num_cpus, **({"GPU": workers.num_gpus} if workers.num_gpus else {})},
        accelerator_type=workers.accelerator_type,
        placement_strategy=workers.placement_strategy,
        label_selector=dict(workers.label_selector) or None,
    )


class _Trainer(TorchTrainer):
    """Ends at once on Ctrl-C, with Python's own exception.

    Ray Train asks its controller to end, and is never answered while that waits for a place for its workers, as its
    event loop stands still. It also turns the interrupt into an exit with status 0.
    """

    _controller: Any = None

    def fit(self) -> Result:
        """Train; Ctrl-C ends the controller, and with it its workers."""
        try:
            return super().fit()
        except KeyboardInterrupt:
            if self._controller is not None:
                ray.kill(self._controller)
            raise

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def _create_default_callbacks(self) -> list[Any]:
        # The cleaner frees the place of a controller that died while its driver lives on, which ours does not. It
        # would outlive both, and complain every second in a cluster without a dashboard.
        callbacks = super()._create_default_callbacks()
        return [each for each in callbacks if not isinstance(each, PlacementGroupCleanerCallback)]
