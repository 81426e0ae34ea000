"""Which errors of workers end a training, by errors as Ray Train hands them on; no Ray is started."""

import pickle
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError
from ray.train import ControllerError, WorkerGroupError

from stic_ray.core.errors import Failed, ModelError, SourceError, StageError
from stic_ray.stages.training.launch import Restarts, WorkerFailure, explain

LOST = RayActorError()
GLOO = RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")


def failure(error: BaseException, step: int = 3) -> WorkerFailure:
    """What reaches the controller of an error in a worker."""
    return pickle.loads(pickle.dumps(WorkerFailure.of(error, step)))


def error_after(*attempts: dict[int, BaseException]) -> BaseException:
    """The error by which a training ends whose attempts meet these errors, by rank; two restarts are allowed."""
    restarts = Restarts("dpo", 2)
    for errors in attempts:
        worker_exceptions: Any = {r: e if e is LOST else failure(e) for r, e in errors.items()}
        try:
            restarts.after_exception(None, worker_exceptions)
        except ControllerError as error:
            assert errors is attempts[-1], "it ended earlier"
            return explain("dpo", pickle.loads(pickle.dumps(error)))
    return explain("dpo", WorkerGroupError("", worker_exceptions))


@pytest.mark.parametrize(
    "error",
    [
        FloatingPointError("the loss is nan"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError("no memory"),
        StageError("training left the model as it was"),
    ],
)
def test_what_would_come_again_ends_training_at_once(error: BaseException) -> None:
    found = error_after({0: GLOO, 1: error})
    assert isinstance(found, StageError) and "\n" not in str(found)
    assert "dpo stopped at step 3: " in str(found) and str(error) in str(found)
    assert isinstance(error, StageError) or type(error).__name__ in str(found)
    assert "restarts were used up" not in str(found)
    assert ("workers.micro_batch=1" in str(found)) == isinstance(error, torch.OutOfMemoryError | MemoryError)


@pytest.mark.parametrize("error", [SourceError("'a.parquet' is damaged."), ModelError("no weights")])
def test_a_mistake_of_the_users_reaches_the_user_as_it_is(error: BaseException) -> None:
    found = error_after({1: error})
    assert type(found) is type(error) and str(found) == str(error)


def test_the_error_of_a_loader_is_named_without_its_traceback() -> None:
    inside = "Caught SourceError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File x"
    found = error_after(
        {0: SourceError(f"{inside}\nstic_ray.core.errors.SourceError: 's3://b/a.parquet' is damaged.\n")}
    )
    assert type(found) is SourceError and str(found) == "'s3://b/a.parquet' is damaged."


def test_any_other_error_ends_training_when_it_comes_again_at_the_same_step() -> None:
    bug = KeyError("chosen")
    found = error_after({0: bug, 1: bug}, {0: bug, 1: bug})
    assert "dpo stopped at step 3: KeyError: 'chosen'" in str(found)
    restarts = Restarts("dpo", 2)
    for step in (3, 4):
        restarts.after_exception(None, {0: failure(bug, step)})
    assert restarts.num_failures == 2, "at another step it is another error"


@pytest.mark.parametrize("lost", [LOST, GLOO, Failed("the storage is away"), ConnectionResetError("connection reset")])
def test_lost_workers_and_storage_restart_however_often_it_happens_at_the_same_step(
    lost: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    bug = KeyError("half of a message")
    found = error_after(*[{0: lost, 1: bug}] * 3)
    assert "stopped after its restarts were used up" in str(found) and "The same command goes on" in str(found)
    told = caplog.text
    assert "failure 2, workers.max_failures=2: restarts" in told and "failure 3, workers.max_failures=2: stops" in told
