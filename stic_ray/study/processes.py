"""One process per run of a study: started with a log, ended with the study, and what its end means."""

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
PIPELINE = (sys.executable, "-m", "stic_ray.study.child")
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
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
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
    """Say what a process's exit status and the end of its log mean."""
    if returncode == 0:
        return Outcome(DONE, None, seconds)
    lines = _last_lines(log)
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else None)
    if returncode in _KILLED:
        return Outcome(OUT_OF_MEMORY, f"killed with signal 9, as the system does when memory runs out; {said}", seconds)
    memory = next((line for line in reversed(lines) if _MEMORY.search(line)), None)
    if memory is not None:
        return Outcome(OUT_OF_MEMORY, memory[:_MAX_ERROR_CHARACTERS], seconds)
    ended = f"ended with status {returncode} and said nothing" if returncode > 0 else f"killed by signal {-returncode}"
    return Outcome(FAILED, (said or ended).removeprefix("error: ")[:_MAX_ERROR_CHARACTERS], seconds)


def _last_lines(log: Path) -> list[str]:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = stream.read().decode("utf-8", "replace")
    lines = [_ANSI.sub("", line).strip() for line in text.splitlines()]
    return [line for line in lines if line][-_LAST_LINES:]
