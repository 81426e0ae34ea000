"""Recipe `vila2` on a few pictures: killed in its second round, and gone on with by the same command."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from stic_ray.core.rundir import STARTED, RunDir
from stic_ray.core.schemas import INFUSED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # four trainings, and three evaluations

JOB = Path(__file__).parents[2] / "jobs" / "full_pipeline.py"
PATIENCE_S = 600
QUESTION = "How many shapes are there?"
SETTINGS = {
    "recipe": "vila2",
    "pool": {"shard_size": 16},
    "rounds": {"num": 2, "specialists": {"counts": {"source": "toyworld", "questions": [QUESTION]}}},
    "sft": {"num_steps": 2},
    "evaluation": {"benchmarks": ["toyworld:toy_describe"]},
    "toyworld": {"num_pictures": 32, "num_instructions": 16, "num_scenes": 4},
    "actors": {"num_actors": 1, "batch_size": 16},
    "workers": {"num_workers": 1},
}


def test_a_kill_in_the_second_round_goes_on_there_and_specialists_come_behind_it(tmp_path: Path) -> None:
    (tmp_path / "vila2.yaml").write_text(yaml.safe_dump(SETTINGS))
    command = [sys.executable, str(JOB), "--config", str(tmp_path / "vila2.yaml"), "--run", str(tmp_path / "run")]
    run, end = RunDir.of(str(tmp_path / "run")), time.monotonic() + PATIENCE_S
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    while (run / "captions_2").read_json(STARTED) is None:
        assert process.poll() is None and time.monotonic() < end, "the second round did not begin"
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {name: (run / name).manifest for name in ("pool", "captions", "corpus", "sft", "evaluation")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert "base " in done.stdout and "-> sft_specialists " in done.stdout, "what the last training brought"
    assert all(manifest and (run / name).manifest == manifest for name, manifest in before.items())
    again = (run / "captions_2").manifest
    assert again and again["num_attempts"] == 2 and again["num_rows_written"] < 32, (
        "a half of the pictures is asked about"
    )
    scores = (run / "evaluation_2").read_json("scores.json")
    assert {row["model"] for row in scores} == {"sft_2"} and all(row["difference"] is not None for row in scores)
    corpus = (run / "corpus_specialists").manifest
    assert corpus and corpus["num_specialist_turns"] > 0 and corpus["num_by_source"]["both"] > 0
    rows = (run / "corpus_specialists").read_table("rows", INFUSED).to_pylist()
    assert any(row["messages"][2]["content"] == QUESTION for row in rows if len(row["messages"]) > 2)
