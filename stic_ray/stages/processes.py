"""The processes of a stage: what it waits for while none has a place, and that they give back what they held."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._private import state

from stic_ray.core.errors import StageError, type_and_message
from stic_ray.core.placement import TASK_CPUS, Need, format_machines, num_places
from stic_ray.stages.cluster import nodes

logger = logging.getLogger(__name__)

_CLASSES = {"actors": "MapWorker", "workers": "RayTrainWorker"}
"""How the classes begin that Ray Data and Ray Train start for a stage."""
_LOOK_EVERY_S = 1.0
_LOG_AFTER_S, _LOG_EVERY_S = 5.0, 30.0
_TIMES_AS_LATE_WITH_ROOM = 6
"""Where the machines are large enough, processes are most likely starting, which takes them some seconds."""
_INTERRUPT_EVERY_S = 30.0
"""An interrupt that meets the thread in a finalizer is lost, as Python ignores what one raises; cleaning up, which a
second one would cut short, takes seconds."""
_RELEASE_TIMEOUT_S = 120.0


def own_processes(what: str | None = None) -> list[dict[str, Any]]:
    """Return this job's `actors` or `workers`, or both, that are there or wanted.

    One without a place yet has port 0. Ray's public list of actors asks the dashboard, which a cluster may not have.
    """
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    classes = (_CLASSES[what],) if what else tuple(_CLASSES.values())
    found = state.actors(job_id=job).values()
    return [each for each in found if each["State"] != "DEAD" and each["ActorClassName"].startswith(classes)]


@contextmanager
def released() -> Iterator[None]:
    """Run a stage, then wait until the processes that it started have given back what they held.

    Other jobs of the cluster are not looked at: what they take or give back is theirs.
    """
    before = {process["ActorID"] for process in own_processes()}
    yield
    deadline = time.monotonic() + _RELEASE_TIMEOUT_S
    while left := {process["ActorID"] for process in own_processes()} - before:
        if time.monotonic() > deadline:
            logger.warning("%d processes of the stage are still there after %.0f s", len(left), _RELEASE_TIMEOUT_S)
            return
        time.sleep(0.1)


@contextmanager
def watched(stage: str, need: Need, timeout_s: float) -> Iterator[None]:
    """Run a stage, and log every so often what it waits for while none of its processes has a place.

    Raises StageError after `timeout_s` seconds of waiting without a break. The stage is ended as by Ctrl-C, which
    reaches whatever it waits in, so this must be called in the main thread.
    """
    ended = threading.Event()
    gave_up: list[str] = []
    thread = threading.Thread(target=_watch, args=(stage, need, timeout_s, ended, gave_up), daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if gave_up:
            raise StageError(gave_up[0]) from None
        raise
    finally:
        ended.set()
        thread.join()


def _watch(stage: str, need: Need, timeout_s: float, ended: threading.Event, gave_up: list[str]) -> None:
    """Look until the stage has ended; where it waits too long, put the reason into `gave_up` and interrupt it."""
    since_s = logged_s = None
    while not ended.wait(_LOOK_EVERY_S):
        now_s = time.monotonic()
        try:
            lack, there, be_quiet_s = _lack(need), f"The cluster has {format_machines(nodes())}", quiet_s(need)
        except Exception as error:  # a head that is busy; without a watch the stage could wait for ever
            logger.warning("%s: what it waits for cannot be seen now: %s", stage, type_and_message(error))
            continue
        if lack is None:
            if logged_s is not None:
                logger.info("%s: has a place now, goes on", stage)
            since_s = logged_s = None
            continue
        since_s = now_s if since_s is None else since_s
        waited_s = now_s - since_s
        if waited_s >= timeout_s:
            section = "" if need.what == "tasks" else f" or ask for less in {need.what}.*"
            gave_up.append(
                f"{stage} waited {timeout_s:g} s (cluster.resource_timeout_s) for {need}: {lack}. {there}. "
                f"Start nodes that fit{section}, and run the same command again."
            )
            _interrupt(ended)
            return
        if waited_s >= be_quiet_s and (logged_s is None or now_s - logged_s >= _LOG_EVERY_S):
            logged_s = now_s
            logger.info("%s: has waited %.0f s for %s: %s. %s", stage, waited_s, need, lack, there)


def _interrupt(ended: threading.Event) -> None:
    """Interrupt the main thread itself, so that what it waits in ends, until the stage has ended."""
    main = threading.main_thread().ident
    assert main is not None, "it has begun"
    signal.pthread_kill(main, signal.SIGINT)
    while not ended.wait(_INTERRUPT_EVERY_S):
        signal.pthread_kill(main, signal.SIGINT)


def quiet_s(need: Need) -> float:
    """Return how long to log nothing: not as long where nothing that is there could ever hold the processes."""
    wanted = need.num if need.what == "workers" else 1  # those start together
    return _LOG_AFTER_S * (_TIMES_AS_LATE_WITH_ROOM if num_places(need, nodes()) >= wanted else 1)


def _lack(need: Need) -> str | None:
    """Return what is missing, or None when the stage can work."""
    if need.what == "tasks":
        return None if num_places(need, nodes()) else "no node is large enough"
    mine = own_processes(need.what)
    placed = [process["Address"]["NodeID"] for process in mine if process["Address"]["Port"]]
    if not placed:
        is_waiting = mine or need.what == "workers"  # workers are there only when all of them have a place
        return "none of them has a place" if is_waiting else None
    if need.reads_with_tasks and len(placed) < len(mine):
        cpus = need.each.get("CPU", 0.0)
        left = [
            node["Resources"].get("CPU", 0.0) - placed.count(node["NodeID"]) * cpus
            for node in ray.nodes()
            if node["Alive"]
        ]
        if max(left, default=0.0) < TASK_CPUS:
            return f"{len(placed)} of them leave no CPU for the tasks that read and write shards"
    return None
