"""Which errors end a training, and after which its workers start again from the last checkpoint.

| what a worker met | what follows |
|---|---|
| its process or node is lost, or the connection to another worker | a restart, `workers.max_failures` times |
| a storage that is away (`Failed`) | the same |
| a mistake of the user's, a stage's own error, a loss that is no number, too little memory | the training ends |
| any other exception | a restart; the second time at the same step the training ends |
"""

import logging
import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from ray.train import ControllerError, UserCallback
from torch.distributed import DistError

from stic_ray.core.errors import Failed, StageError, SticError, UserError, one_line, type_name

logger = logging.getLogger(__name__)

Outcome = Literal["lost", "final", "unknown"]
_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
_CONNECTION = re.compile(r"gloo|nccl|connection|\bpeer\b|socket|broken pipe|rendezvous", re.IGNORECASE)
"""What torch's collectives say in a RuntimeError when another worker is gone."""
_LESS_MEMORY = "workers.micro_batch=1, workers.gradient_checkpointing=true or workers.zero_stage=3 need less memory"


class WorkerFailure(SticError):
    """What a worker met, in a form that reaches the driver whole."""

    def __init__(self, error: UserError | None, line: str, step: int, outcome: Outcome) -> None:
        super().__init__(error, line, step, outcome)
        self.error, self.line, self.step, self.outcome = error, line, step, outcome

    @classmethod
    def of(cls, error: BaseException, step: int = 0) -> "WorkerFailure":
        """Describe an error that a worker raised behind so many steps, in one line with its type."""
        line = _message_of(error)
        of_user = type(error)(line) if isinstance(error, UserError) else None
        if isinstance(error, _OUT_OF_MEMORY):
            line = f"{line}. {_LESS_MEMORY}."
        line = line if isinstance(error, SticError) else f"{type_name(error)}: {line}"
        return cls(of_user, line, step, _outcome_of(error))

    def __str__(self) -> str:
        return self.line


def _message_of(error: BaseException) -> str:
    """Return a message in one line; that of a loader's process stands at the end of its traceback."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2] or text
    return one_line(text or "no message")


def _outcome_of(error: BaseException) -> Outcome:
    if isinstance(error, (UserError, StageError, FloatingPointError, *_OUT_OF_MEMORY)):
        return "final"
    is_connection = isinstance(error, RuntimeError | OSError) and _CONNECTION.search(str(error)) is not None
    return "lost" if is_connection or isinstance(error, DistError | Failed) else "unknown"


class Restarts(UserCallback):
    """Says when training lost workers and what follows, and ends it where a restart would meet the same error.

    Ray Train calls this before it decides about a restart. A ControllerError ends the training and reaches the driver.
    """

    def __init__(self, step_name: str, max_failures: int) -> None:
        self.step_name, self.max_failures = step_name, max_failures
        self.num_failures = 0
        self._met: set[tuple[str, int]] = set()
        """Exceptions so far, by their type and step."""

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Count the failure. Raises ControllerError with a WorkerFailure where it is final."""
        logging.getLogger("ray.train").setLevel(logging.WARNING)  # it would print its own traceback to our line
        failures = [_failure_of(error) for _, error in sorted(worker_exceptions.items())]
        final = [failure for failure in failures if failure.outcome == "final"]
        if all(failure.outcome == "unknown" for failure in failures):  # else they may be what a lost worker left
            final += [failure for failure in failures if _kind_of(failure) in self._met]
            self._met |= {_kind_of(failure) for failure in failures}
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
    if isinstance(failure, WorkerFailure) and failure.error is not None:
        return failure.error
    if isinstance(failure, WorkerFailure):
        return StageError(
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


def _kind_of(failure: WorkerFailure) -> tuple[str, int]:
    return failure.line.partition(":")[0], failure.step


def _lines(failures: list[WorkerFailure]) -> str:
    return "; ".join(sorted({failure.line for failure in failures}))[:500]
