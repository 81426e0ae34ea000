"""One driver at a time: who holds a run, who is refused, and who takes over."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from stic_ray.core import lease
from stic_ray.core.errors import RunError
from stic_ray.core.rundir import RunDir

HOLD = """
import sys
from stic_ray.core import lease
from stic_ray.core.rundir import RunDir
with lease.held(RunDir.of(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def another_driver(folder: Path) -> subprocess.Popen[str]:
    """A process that holds the run until its input ends."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def left_by(run: RunDir, *, host: str, pid: int, seen_s_ago: float) -> None:
    """Write the lease of a driver that is somewhere else, or gone."""
    seen_at = time.time() - seen_s_ago
    run.write_json(lease.LEASE, {"id": "x", "host": host, "pid": pid, "process_began_at": 1.0, "seen_at": seen_at})


def test_a_second_driver_is_refused_and_learns_who_holds_the_run(tmp_path: Path) -> None:
    first = another_driver(tmp_path)
    with pytest.raises(RunError) as refused, lease.held(RunDir.of(str(tmp_path))):
        pass
    assert f"process {first.pid} on {socket.gethostname()}, last sign of life 0 s ago" in str(refused.value)
    first.communicate()
    with lease.held(RunDir.of(str(tmp_path))) as cut_off_at:
        assert cut_off_at is None, "it ended, and was not cut off"
    assert lease.holder(RunDir.of(str(tmp_path))) is None


def test_a_driver_that_was_killed_is_followed_at_once(tmp_path: Path) -> None:
    before = time.time()
    first = another_driver(tmp_path)
    first.kill()
    first.wait()
    with lease.held(RunDir.of(str(tmp_path))) as cut_off_at:
        assert cut_off_at is not None and before - 1 <= cut_off_at <= time.time()


def test_a_number_of_a_process_that_is_anothers_by_now_holds_nothing(tmp_path: Path) -> None:
    run = RunDir.of(str(tmp_path))
    left_by(run, host=socket.gethostname(), pid=os.getppid(), seen_s_ago=1)
    with lease.held(run):
        assert (lease.holder(run) or {})["pid"] == os.getpid()


def test_a_driver_on_another_machine_holds_while_it_gives_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir.of(str(tmp_path))
    left_by(run, host="elsewhere", pid=7, seen_s_ago=3600)
    with lease.held(run):
        pass  # its last sign of life is old
    monkeypatch.setattr(lease, "EXPIRY_S", 3.0)
    left_by(run, host="elsewhere", pid=7, seen_s_ago=0)
    with lease.held(run):
        pass  # none came while we looked
    monkeypatch.setattr(lease, "_LOOK_EVERY_S", 0.0)
    signs = iter([{"host": "elsewhere", "pid": 7, "id": "x", "seen_at": time.time() + n} for n in (0, 1)])
    monkeypatch.setattr(lease, "holder", lambda run: next(signs))
    with pytest.raises(RunError, match="process 7 on elsewhere"), lease.held(run):
        pass


def test_who_comes_at_the_same_time_is_one_driver(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    drivers = [subprocess.Popen(command, **pipes, text=True) for _ in range(4)]
    # The first line of each that holds the run comes while it holds it; the others end by themselves.
    ended = [driver for driver in drivers if driver.stdout is not None and driver.stdout.readline() != "held\n"]
    assert len(ended) == 3
    assert all("is held by another driver" in (driver.communicate()[1] or "") for driver in ended)
    [holder] = [driver for driver in drivers if driver not in ended]
    assert (lease.holder(RunDir.of(str(tmp_path))) or {})["pid"] == holder.pid
    holder.communicate()


def test_half_a_lease_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / lease.LEASE).write_text('{"id": ')
    with lease.held(RunDir.of(str(tmp_path))):
        assert psutil.pid_exists((lease.holder(RunDir.of(str(tmp_path))) or {})["pid"])
