"""A stage without a place for its processes: says what it waits for, and ends in the end."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray

from stic_ray.core.errors import StageError
from stic_ray.core.placement import TASK_CPUS, Need, format_machines, num_places
from stic_ray.stages.cluster import nodes, own_processes

logger = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0
_LOG_AFTER_S, _LOG_EVERY_S = 5.0, 30.0
_TIMES_AS_LATE_WITH_ROOM = 6
"""Where the machines are large enough, processes are most likely starting, which takes them some seconds."""


@contextmanager
def watching(stage: str, need: Need, timeout_s: float) -> Iterator[None]:
    """Run a stage, and say every so often what it waits for while none of its processes has a place.

    Raises StageError after `timeout_s` seconds of waiting without a break. The stage is ended as by Ctrl-C, which
    reaches whatever it waits in, so this must be called in the main thread.
    """
    watch = _Watch(stage, need, timeout_s)
    thread = threading.Thread(target=watch.run, name="placement watch", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if watch.gave_up is None:
            raise
        raise StageError(watch.gave_up) from None
    finally:
        watch.ended.set()
        thread.join()


class _Watch:
    def __init__(self, stage: str, need: Need, timeout_s: float) -> None:
        self.stage, self.need, self.timeout_s = stage, need, timeout_s
        self.ended = threading.Event()
        self.gave_up: str | None = None

    def run(self) -> None:
        """Look until the stage has ended."""
        since_s = logged_s = None
        while not self.ended.wait(_LOOK_EVERY_S):
            now_s = time.monotonic()
            lack = self._lack()
            if lack is None:
                if logged_s is not None:
                    logger.info("%s: has a place now, goes on", self.stage)
                since_s = logged_s = None
                continue
            since_s = now_s if since_s is None else since_s
            waited_s = now_s - since_s
            if waited_s >= self.timeout_s:
                self._give_up(lack)
                return
            if waited_s >= self._quiet_s() and (logged_s is None or now_s - logged_s >= _LOG_EVERY_S):
                logged_s = now_s
                logger.info(
                    "%s: waits since %.0f s for %s: %s. The cluster has %s",
                    *(self.stage, waited_s, self.need, lack, format_machines(nodes())),
                )

    def _quiet_s(self) -> float:
        """Return how long to say nothing: not as long where nothing that is there could ever hold the processes."""
        wanted = self.need.num if self.need.what == "workers" else 1  # those start together
        fits = num_places(self.need, nodes()) >= wanted
        return _LOG_AFTER_S * (_TIMES_AS_LATE_WITH_ROOM if fits else 1)

    def _give_up(self, lack: str) -> None:
        section = "" if self.need.what == "tasks" else f" or ask for less in {self.need.what}.*"
        self.gave_up = (
            f"{self.stage} waited {self.timeout_s:g} s (cluster.resource_timeout_s) for {self.need}: {lack}. The "
            f"cluster has {format_machines(nodes())}. Start nodes that fit{section}, and run the same command again."
        )
        main = threading.main_thread().ident
        assert main is not None, "it has begun"
        signal.pthread_kill(main, signal.SIGINT)  # that thread itself, so that what it waits in is interrupted

    def _lack(self) -> str | None:
        """Say what is missing, or None when the stage can work."""
        if self.need.what == "tasks":
            return None if num_places(self.need, nodes()) else "no node is large enough"
        mine = own_processes(self.need.what)
        placed = [process["Address"]["NodeID"] for process in mine if process["Address"]["Port"]]
        if not placed:
            wanted = mine or self.need.what == "workers"  # workers are there only when all of them have a place
            return "none of them has a place" if wanted else None
        if self.need.reads_with_tasks and len(placed) < len(mine) and not self._tasks_have_room(placed):
            return f"{len(placed)} of them leave no CPU for the tasks that read and write shards"
        return None

    def _tasks_have_room(self, placed: list[str]) -> bool:
        cpus = self.need.each.get("CPU", 0.0)
        return any(
            node["Resources"].get("CPU", 0.0) - placed.count(node["NodeID"]) * cpus >= TASK_CPUS
            for node in ray.nodes()
            if node["Alive"]
        )
