"""Ctrl-C and SIGTERM in the middle of a training: it ends, leaves nothing behind, and the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stic_ray.core.rundir import RunDir
from tests.stages.test_training_batches import write_pairs
from tests.stages.test_training_resume import checkpoints

NUM_STEPS = 20
PATIENCE_S = 150
"""How long anything here may take on the slowest machine."""
JOB = Path(__file__).parents[2] / "jobs" / "full_pipeline.py"


def start(tmp_path: Path, model: Path, **environment: str) -> subprocess.Popen[str]:
    pairs = RunDir.of(str(tmp_path / "pairs" / "preferences"))
    settings = {
        "dpo.pairs": pairs.uri,
        "dpo.num_steps": NUM_STEPS,
        "dpo.global_batch": 4,
        "model.path": model,
        "workers.num_workers": 1,
        "workers.zero_stage": 0,
        "workers.save_every_steps": 4,
    }
    given = [part for setting in settings.items() for part in ("--set", "=".join(map(str, setting)))]
    command = [sys.executable, str(JOB), "--recipe", "demo", "--run", str(tmp_path / "run"), "--stages", "dpo", *given]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, env={**os.environ, **environment}, text=True, start_new_session=True)


def processes_of(session: int) -> list[str]:
    """Return state and command line of what runs in a session: what a terminal's window would hold.

    A process that has ended and that nobody has asked about yet is none: not every container's first process asks.
    """
    found = subprocess.run(["ps", "-o", "stat=,pid=,ppid=,args=", "-s", str(session)], capture_output=True, text=True)
    return [line for line in found.stdout.splitlines() if not line.startswith("Z")]


def checkpoint_of(process: subprocess.Popen[str], run: RunDir, behind: str = "") -> str:
    """Wait for a checkpoint behind another one, and return its name, which begins with when it was made."""
    end = time.monotonic() + PATIENCE_S
    while not (made := [name for name in checkpoints(run) if name > behind]):
        assert process.poll() is None, process.communicate(timeout=PATIENCE_S)[1]
        assert time.monotonic() < end, "\n".join(["no checkpoint came", *processes_of(process.pid)])
        time.sleep(0.1)
    return made[-1]


@pytest.mark.slow
def test_ctrl_c_and_sigterm_end_a_training_and_the_same_command_goes_on(tmp_path: Path, tiny_llava: Path) -> None:
    """The second call has a TMPDIR that is too long for sockets, and a home that does not exist: neither is needed."""
    write_pairs(tmp_path / "pairs" / "preferences", 8)
    pairs = RunDir.of(str(tmp_path / "pairs" / "preferences"))
    pairs.write_manifest({"stage": "preferences", "num_rows_written": 8})
    run = RunDir.of(str(tmp_path / "run"))
    process = start(tmp_path, tiny_llava)
    first = checkpoint_of(process, run)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes in it
    assert_ended(process, 130)

    deep = tmp_path / ("deep" * 20)
    deep.mkdir()
    process = start(tmp_path, tiny_llava, TMPDIR=str(deep), HOME="/proc/nohome")
    checkpoint_of(process, run, behind=first)
    process.terminate()  # as a scheduler does: to the driver alone
    assert_ended(process, 143)

    process = start(tmp_path, tiny_llava)
    said = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 0, said
    result = json.loads((tmp_path / "run" / "dpo" / "result.json").read_text())
    assert result["num_steps"] == NUM_STEPS and result["resumed_from_step"] >= 8


def assert_ended(process: subprocess.Popen[str], status: int) -> None:
    """With this status, a line that says how to go on, and nothing left behind."""
    said = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == status and "interrupted; the same command goes on from here" in said, said
    assert "Traceback" not in said and "PlacementGroupCleaner" not in said, said
    end = time.monotonic() + PATIENCE_S
    while left := processes_of(process.pid):
        assert time.monotonic() < end, "\n".join(["still there:", *left])
        time.sleep(0.1)
