"""Small work on the cluster: a function over items, each a Ray task that leaves files and returns little."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from stic_ray.core.errors import StageError, UserError

_IN_FLIGHT = 256


def map_tasks(what: str, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return `function(*each)` for each of `arguments`, in order, every call a task on the cluster.

    Calls may be made again when a worker dies. Raises UserError as a task raised it, StageError for anything else.
    """
    import ray  # only where something runs: stages are read without it
    import ray.exceptions

    task = cast(Any, ray.remote(function))  # Ray types functions of a known number of arguments only
    results: dict[int, Any] = {}
    running: dict[Any, int] = {}
    try:
        for number, each in enumerate(arguments):
            if len(running) == _IN_FLIGHT:
                _take_one(running, results)
            running[task.remote(*each)] = number
        while running:
            _take_one(running, results)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise StageError(f"{what} stopped: {type(error.cause).__name__}: {error.cause}") from error
    except ray.exceptions.RayError as error:
        raise StageError(f"{what} stopped: {str(error).splitlines()[0]}") from error
    return [results[number] for number in range(len(arguments))]


def _take_one(running: dict[Any, int], results: dict[int, Any]) -> None:
    import ray

    [ready], _ = ray.wait(list(running), num_returns=1)
    results[running.pop(ready)] = ray.get(ready)
