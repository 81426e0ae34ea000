"""One driver at a time: `driver.json` in the run says who holds it, with a sign of life every few seconds.

A second driver is refused while the first one lives. It takes over where the process is gone from this machine, or no
sign of life has come for EXPIRY_S from another one. Object stores have no lock: there a driver writes its name, waits
for whoever may have done the same, and has the run if its own name is still there.
"""

import _thread
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import psutil
from filelock import FileLock

from stic_ray.core.errors import RunError
from stic_ray.core.rundir import RunDir

logger = logging.getLogger(__name__)

LEASE = "driver.json"
_LOCK = ".driver.lock"
"""Held for a moment while a driver of this machine takes a local run."""
BEAT_EVERY_S = 10.0
EXPIRY_S = 60.0
"""Without a sign of life for so long a driver on another machine counts as gone."""
_SETTLE_S = 2.0
_LOOK_EVERY_S = 1.0


@contextmanager
def held(run: RunDir) -> Iterator[float | None]:
    """Hold the run until the end of the block.

    Yields the last sign of life (seconds since 1970) of a driver that was cut off, None where none was. Raises
    RunError when another driver holds the run. A driver that finds its run taken over, as after a long sleep of its
    machine, is interrupted.
    """
    began_at = psutil.Process().create_time()
    own = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid(), "process_began_at": began_at}
    with FileLock(f"{run.location.path}/{_LOCK}") if run.location.is_local else nullcontext():
        before = _take(run, own)
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(run, own, ended), name="lease", daemon=True)
    beating.start()
    try:
        yield before["seen_at"] if before else None
    finally:
        ended.set()
        beating.join()
        if (holder(run) or {}).get("id") == own["id"]:
            (run.location / LEASE).delete()


def holder(run: RunDir) -> dict[str, Any] | None:
    """Return who holds the run: host, pid, and `seen_at`, the last sign of life in seconds since 1970."""
    return run.read_json(LEASE)


def _take(run: RunDir, own: dict[str, Any]) -> dict[str, Any] | None:
    """Write our name once nobody alive holds the run; return the lease that was there. Raises RunError."""
    before = holder(run)
    if before is not None:
        _wait_until_gone(run, before)
    _write(run, own)
    if not run.location.is_local:
        time.sleep(_SETTLE_S)
    now = holder(run)
    if now is None or now["id"] != own["id"]:
        raise _refusal(run, now or own)
    return before


def _wait_until_gone(run: RunDir, first: dict[str, Any]) -> None:
    """Return when the holder is gone. Raises RunError as soon as it is seen to live."""
    if first["host"] == socket.gethostname():
        if _is_alive(first):
            raise _refusal(run, first)
        return
    if time.time() - first["seen_at"] < EXPIRY_S:
        logger.info("the run is held by process %d on %s; waiting for a sign of life", first["pid"], first["host"])
    # Clocks of machines differ: what counts is whether the sign of life changes while we look.
    deadline = time.monotonic() + max(0.0, min(EXPIRY_S, EXPIRY_S - (time.time() - first["seen_at"])))
    while time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)
        now = holder(run)
        if now is None:
            return
        if now != first:
            raise _refusal(run, now)


def _refusal(run: RunDir, holder: dict[str, Any]) -> RunError:
    age_s = max(0.0, time.time() - holder["seen_at"])
    return RunError(
        f"'{run.uri}' is held by another driver: process {holder['pid']} on {holder['host']}, last sign of life "
        f"{age_s:.0f} s ago. Wait for it, or end it and run the same command again."
    )


def _is_alive(holder: dict[str, Any]) -> bool:
    """Whether the process of this machine that wrote a lease is still there; a number may be another's by now."""
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder["process_began_at"]) < 1.0
    except psutil.Error:
        return False


def _beat(run: RunDir, own: dict[str, Any], ended: threading.Event) -> None:
    while not ended.wait(BEAT_EVERY_S):
        try:
            if (holder(run) or own)["id"] != own["id"]:
                logger.error("another driver has taken over '%s'; this one stops", run.uri)
                _thread.interrupt_main()
                return
            _write(run, own)
        except OSError as error:  # the storage is away: the next sign of life may get through
            logger.warning("no sign of life could be written to '%s': %s", run.uri, error)


def _write(run: RunDir, own: dict[str, Any]) -> None:
    run.write_json(LEASE, {**own, "seen_at": time.time()})
