"""A training on the driver: its worker group, which errors restart it, and what is left at the end.

| what a worker met | what follows |
|---|---|
| its process or node is lost, or the connection to another worker | a restart, `workers.max_failures` times |
| a storage that is away (`Failed`) | the same |
| a mistake of the user's, a stage's own error, a loss that is no number, too little memory | the training ends |
| any other exception | a restart; the second time at the same step the training ends |
"""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ray
import ray.exceptions
import torch
from ray.train import CheckpointConfig, ControllerError, FailureConfig, Result, ScalingConfig, UserCallback
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.exceptions import TrainingFailedError
from torch.distributed import DistError

from stic_ray.core.config import WorkersConfig
from stic_ray.core.errors import Failed, StageError, SticError, UserError, one_line, type_name
from stic_ray.core.rundir import digest, row_counts
from stic_ray.core.steps import StepRun
from stic_ray.stages.training.index import Rows

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
_CONNECTION = re.compile(r"gloo|nccl|connection|\bpeer\b|socket|broken pipe|rendezvous", re.IGNORECASE)
"""What torch's collectives say in a RuntimeError when another worker is gone."""
_LESS_MEMORY = "workers.micro_batch=1, workers.gradient_checkpointing=true or workers.zero_stage=3 need less memory"


def train(section: Literal["dpo", "sft"], step: StepRun, rows: Rows) -> dict[str, Any]:
    """Train by the settings of a section; leaves checkpoint, metrics.jsonl and result.json in the step's folder.

    Returns the row accounts of the manifest. Raises StageError, or the UserError that a worker met.
    """
    workers = step.config.workers
    # Another ZeRO stage has checkpoints of another form, so it starts afresh under another name.
    planned = [rows.plan.num_steps, dict(rows.plan.facts)] if rows.plan else []
    identity = digest([step.identity, rows.num_trained, workers.zero_stage, *planned])
    attempts = (step.output / "training").location
    record = attempts / f"start-{identity}.json"

    def run_worker() -> None:
        from stic_ray.stages.training.worker import train_worker  # TRL, which the driver does without

        train_worker(section, step, rows, record)

    trainer = _Trainer(
        run_worker,
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
    attempts.delete_folder()
    num_rows = rows.num_trained + rows.num_held_out
    kept = ("num_steps", "num_held_out", "held_out", "throughput", "warnings")
    facts = rows.plan.facts if rows.plan else {}
    return {**row_counts(num_rows, num_rows, {}), **{name: result[name] for name in kept}, **facts}


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


class WorkerFailure(SticError):
    """What a worker met, in a form that reaches the driver whole."""

    def __init__(
        self, error: UserError | None, line: str, step: int, outcome: Literal["lost", "final", "unknown"]
    ) -> None:
        super().__init__(error, line, step, outcome)
        self.error, self.line, self.step, self.outcome = error, line, step, outcome

    @classmethod
    def of(cls, error: BaseException, step: int) -> "WorkerFailure":
        """Describe an error that a worker raised after so many steps, in one line with its type."""
        line = str(error).strip()
        if "Original Traceback" in line:  # of a loader's process: the message is at its end
            line = line.splitlines()[-1].partition(": ")[2] or line
        line = one_line(line or "no message")
        if isinstance(error, UserError):
            return cls(type(error)(line), line, step, "final")
        if not isinstance(error, SticError):
            line = f"{type_name(error)}: {line}"
        if isinstance(error, _OUT_OF_MEMORY):
            line = f"{line}. {_LESS_MEMORY}."
        if isinstance(error, (StageError, FloatingPointError, *_OUT_OF_MEMORY)):
            return cls(None, line, step, "final")
        is_connection = isinstance(error, RuntimeError | OSError) and _CONNECTION.search(str(error))
        return cls(None, line, step, "lost" if is_connection or isinstance(error, DistError | Failed) else "unknown")

    def __str__(self) -> str:
        return self.line


class Restarts(UserCallback):
    """Logs that training lost workers and what follows, and ends it where a restart would meet the same error.

    Ray Train calls this before it decides about a restart. A ControllerError ends the training and reaches the driver.
    """

    def __init__(self, step_name: str, max_failures: int) -> None:
        self.step_name, self.max_failures = step_name, max_failures
        self.num_failures = 0
        self._seen: set[tuple[str, int]] = set()
        """Exceptions so far, by their type and step."""

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Count the failure. Raises ControllerError with a WorkerFailure where it is final."""
        logging.getLogger("ray.train").setLevel(logging.WARNING)  # it would print its own traceback to our line
        failures = [_failure_of(error) for _, error in sorted(worker_exceptions.items())]
        final = [failure for failure in failures if failure.outcome == "final"]
        if all(failure.outcome == "unknown" for failure in failures):  # else they may be what a lost worker left
            kinds = [(failure.line.partition(":")[0], failure.step) for failure in failures]
            final += [failure for failure, kind in zip(failures, kinds, strict=True) if kind in self._seen]
            self._seen.update(kinds)
        if final:
            raise ControllerError(final[0])
        self.num_failures += 1
        goes_on = "restarts from its last checkpoint" if self.num_failures <= self.max_failures else "stops"
        logger.warning(
            f"{self.step_name}: lost {len(failures)} workers ({_lines(failures)}); failure "
            f"{self.num_failures}, workers.max_failures={self.max_failures}: {goes_on}",
        )


def explain(step_name: str, error: BaseException) -> SticError:
    """Return the error that a user sees when Ray Train has given up, in one line."""
    failure = getattr(error, "controller_failure", None)
    if isinstance(failure, WorkerFailure):
        return failure.error or StageError(
            f"{step_name} stopped at step {failure.step}: {failure.line}. It would happen again, so nothing was "
            "restarted; the last checkpoint stays."
        )
    failures = getattr(error, "worker_failures", None) or {0: failure or error}
    return StageError(
        f"{step_name} stopped after its restarts were used up: {_lines([_failure_of(e) for e in failures.values()])}. "
        "The same command goes on from the last checkpoint."
    )


def _failure_of(error: BaseException) -> WorkerFailure:
    """Return what a worker raised, out of Ray Train's wrapper; any other error means that it was lost."""
    raised = getattr(error, "_base_exc", error)
    if isinstance(raised, WorkerFailure):
        return raised
    return WorkerFailure(None, "".join(str(error).strip().splitlines()[-1:])[:500], 0, "lost")


def _lines(failures: Sequence[WorkerFailure]) -> str:
    return "; ".join(sorted({failure.line for failure in failures}))[:500]
