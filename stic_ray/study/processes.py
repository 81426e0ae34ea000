"""One process per run of a study: started with a log, ended with the study, and what its end means.

The process is this module run as a program, with the options of jobs/full_pipeline.py. The study holds the other end
of its input. When that end closes, however the study ended, the process and what it started end too, so that a rerun
of the study never meets a process of the last one.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DONE, FAILED, OUT_OF_MEMORY, NOT_RUN = "done", "failed", "out_of_memory", "not_run"
PIPELINE = (sys.executable, "-m", "stic_ray.study.processes")
"""The command that a run's options are given to."""

_GRACE_S = 15.0
_TAIL_BYTES = 65536
_LAST_LINES = 40
_MAX_ERROR_CHARACTERS = 500
_KILLED = (-signal.SIGKILL, 128 + signal.SIGKILL)
_MEMORY = re.compile(r"out of memory|outofmemory|running low on memory|cannot allocate memory", re.IGNORECASE)
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    status: str
    error: str | None
    seconds: float


class Interrupted(Exception):
    """A process was ended, or not started, because the study stops."""


class Children:
    """The running processes of a study; all of them can be stopped from another thread."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopping = False

    def run(self, command: Sequence[str], log: Path) -> int:
        """Run a command in a session of its own, its output in `log`, and return its exit status.

        Raises Interrupted when the study was stopped meanwhile.
        """
        with log.open("wb") as output:
            with self._lock:
                if self._stopping:
                    raise Interrupted
                # The child's input stays open as long as this process lives, which the child watches.
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
                self._running.add(process)
            try:
                status = process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)
                assert process.stdin is not None
                process.stdin.close()
                _signal_group(process, signal.SIGKILL)  # what it may have left behind
        if self._stopping:
            raise Interrupted
        return status

    def stop(self) -> None:
        """End all processes with what they started: politely, then for certain. No other is started after this."""
        with self._lock:
            self._stopping = True
            running = list(self._running)
        for process in running:
            _signal_group(process, signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_S
        while any(process.poll() is None for process in running) and time.monotonic() < deadline:
            time.sleep(0.1)
        for process in running:
            _signal_group(process, signal.SIGKILL)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return  # nobody is left


def outcome_of(returncode: int, log: Path, seconds: float) -> Outcome:
    """Return what a process's exit status and the end of its log mean."""
    if returncode == 0:
        return Outcome(DONE, None, seconds)
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = stream.read().decode("utf-8", "replace")
    lines = [line for line in (_ANSI.sub("", line).strip() for line in text.splitlines()) if line]
    last_first = lines[: -_LAST_LINES - 1 : -1]
    ended = f"ended with status {returncode} and wrote nothing" if returncode > 0 else f"killed by signal {-returncode}"
    error = next((line for line in last_first if line.startswith("error: ")), next(iter(last_first), ended))
    if returncode in _KILLED:
        return Outcome(
            OUT_OF_MEMORY, f"killed with signal 9, as the system does when memory runs out; {error}", seconds
        )
    memory = next((line for line in last_first if _MEMORY.search(line)), None)
    status, error = (OUT_OF_MEMORY, memory) if memory else (FAILED, error.removeprefix("error: "))
    return Outcome(status, error[:_MAX_ERROR_CHARACTERS], seconds)


def end_with_the_study() -> None:
    """Wait until the study is gone, then end the process group: politely, then for certain."""
    while os.read(0, 1024):
        pass
    os.killpg(0, signal.SIGTERM)
    time.sleep(_GRACE_S)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    from stic_ray import cli

    threading.Thread(target=end_with_the_study, daemon=True).start()
    cli.main(cli.full_pipeline, __doc__)
