"""Work on the cluster, and its errors as a user should read them.

`map_tasks` is for small work: a function over items, each a Ray task that leaves files and returns little.
"""

import os
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from stic_ray.core.errors import StageError, UserError, type_name

_IN_FLIGHT = 256


def map_tasks(what: str, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return `function(*each)` for each of `arguments`, in order, every call a task on the cluster.

    Calls may be made again when a worker dies. Raises UserError as a task raised it, StageError for anything else; no
    task is left running then.
    """
    import ray  # only where something runs: stages are read without it
    import ray.exceptions

    task = cast(Any, ray.remote(function))  # Ray types functions of a known number of arguments only
    calls: list[Any] = []
    running: set[Any] = set()

    def finish_one() -> None:
        [ended], _ = ray.wait(list(running), num_returns=1)
        running.remove(ended)  # before it may raise: Ray 2.60 aborts when a task that has ended is cancelled
        ray.get(ended)

    try:
        for each in arguments:
            if len(running) == _IN_FLIGHT:
                finish_one()
            calls.append(task.remote(*each))
            running.add(calls[-1])
        while running:
            finish_one()
        return ray.get(calls)
    except BaseException as error:
        for left in running:
            ray.cancel(left)
        if isinstance(error, ray.exceptions.RayError):
            raise explain(what, error) from error
        raise


def explain(stage: str, error: BaseException, doing: str = "") -> UserError | StageError:
    """Return an error of a task, an actor or Ray in one line: a UserError as it came, else a StageError.

    The line has the stage and the message; of an error that nothing was prepared for also its type, its place in the
    code and what was being done.
    """
    cause = getattr(error, "cause", None)  # of what Ray raises for a task's error
    error = cause if isinstance(cause, BaseException) else error
    if isinstance(error, UserError):
        return error
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    where = f" while {doing}" if doing else ""
    if isinstance(error, StageError):
        return StageError(f"{stage} stopped: {message}")
    if isinstance(error, OSError):
        return StageError(f"{stage} could not read or write: {message}. Mend this and run the same command again.")
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames and doing else ""
    return StageError(f"{stage} stopped{where}: {type_name(error)}: {message}{place}")


def end_with_parent() -> None:
    """End this process within a second of the one that started it, whatever its threads wait for.

    Ray's workers end with their raylet, but Python first waits for the threads of pools: one that hangs in an engine,
    or hands a checkpoint to a controller that is gone, would keep the process and its GPU for ever.
    """
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="end_with_parent", daemon=True).start()
