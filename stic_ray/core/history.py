"""What was done at a step, as it happened: `attempts.jsonl` in its folder, a line per attempt, only appended to.

A line is written when an attempt begins and replaced when it ends. One that was killed is closed by the next driver,
at the last sign of life of the one that was killed. Readers add up all attempts, each with the processes it had.
"""

import json
import os
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from stic_ray.core.placement import Need
from stic_ray.core.rundir import RunDir

ATTEMPTS = "attempts.jsonl"
FINISHED = "finished"
KILLED = "killed"

PACKAGES = ("stic-ray", "torch", "ray", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "pyarrow")
"""Those that results depend on."""


@dataclass(frozen=True)
class Totals:
    """What all attempts at a step took together."""

    num_attempts: int
    seconds: float
    core_hours: float
    """CPUs reserved by the step's processes, times the hours of each attempt."""
    gpu_hours: float


def read_attempts(step: RunDir) -> list[dict[str, Any]]:
    """Return the attempts at a step, the first one first; a line that was cut off is left out."""
    file, found = step.location / ATTEMPTS, []
    for line in file.read().splitlines() if file.exists() else ():
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def begin_attempt(step: RunDir, need: Need, num_processes: int) -> None:
    """Append an attempt that begins now, with the processes that it asks for and what it is made with."""
    processes = {"what": need.what, "num": num_processes, **{kind: need.each.get(kind, 0.0) for kind in ("CPU", "GPU")}}
    attempt = {
        "began_at": _moment(time.time()),
        "ended_at": None,
        "ended": None,
        "num_rows": None,
        "processes": processes,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        **code_versions(),
    }
    _write(step, [*read_attempts(step), attempt])


def end_attempt(step: RunDir, ended: str, num_rows: int | None = None, at: float | None = None) -> None:
    """Close the last attempt, if it is open: how it ended, the rows that it did, and when (seconds since 1970)."""
    *earlier, last = read_attempts(step) or [{"ended": "never begun"}]
    if last["ended"] is None:
        ended_s = max(time.time() if at is None else at, _seconds(last["began_at"]))
        _write(step, [*earlier, {**last, "ended_at": _moment(ended_s), "ended": ended, "num_rows": num_rows}])


def totals(attempts: Sequence[Mapping[str, Any]], now_s: float | None = None) -> Totals:
    """Add up attempts; one that is open counts until `now_s`, seconds since 1970, or not at all without it."""
    seconds = core_hours = gpu_hours = 0.0
    for attempt in attempts:
        began_s = _seconds(attempt["began_at"])
        ended_s = _seconds(attempt["ended_at"]) if attempt["ended_at"] else max(now_s or began_s, began_s)
        processes = attempt["processes"]
        seconds += ended_s - began_s
        core_hours += processes["num"] * processes["CPU"] * (ended_s - began_s) / 3600
        gpu_hours += processes["num"] * processes["GPU"] * (ended_s - began_s) / 3600
    return Totals(len(attempts), round(seconds, 3), core_hours, gpu_hours)


def code_versions() -> dict[str, Any]:
    """Return what runs here: the commit of the source tree and the versions of the packages that are installed.

    The commit has "+changes" behind it if there are any, and is None when it is not known. Of a package that
    cluster/submit.sh sent, STIC_RAY_COMMIT says it.
    """
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    commit = os.environ.get("STIC_RAY_COMMIT") or None
    with suppress(OSError, subprocess.CalledProcessError):
        commit = commit or _git("rev-parse", "HEAD") + ("+changes" if _git("status", "--porcelain") else "")
    return {"git_commit": commit, "package_versions": versions}


def _git(*arguments: str) -> str:
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def _write(step: RunDir, attempts: Sequence[Mapping[str, Any]]) -> None:
    step.write_text(ATTEMPTS, "".join(json.dumps(attempt) + "\n" for attempt in attempts))


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
