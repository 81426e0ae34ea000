"""A branch of the Hub that moves while a run goes on: all of the run loads the commit that it began with."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests.stages.builders import draw_pictures

ROOT = Path(__file__).parents[2]
FIRST, SECOND = "1" * 40, "2" * 40


def preferences(folder: Path) -> set[str]:
    """Run the first two stages with a model from the Hub's cache, and return the revisions that the pairs name."""
    settings = {
        "name": "hub",
        "model": {"path": "owner/name"},
        "pool": {"source": str(folder / "pictures")},
        "preferences": {"num_images": 4, "max_new_tokens": 8, "allow_truncated": True},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, str(ROOT / "jobs" / "full_pipeline.py"), "--config", str(folder / "config.yaml")]
    command += ["--run", str(folder / "run"), "--stages", "pool,preferences"]
    environment = {**os.environ, "HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    shards = sorted((folder / "run" / "preferences").glob("pairs-*.parquet"))
    return {revision for shard in shards for revision in pq.read_table(shard)["model_revision"].to_pylist()}


@pytest.mark.slow
def test_a_run_keeps_the_commit_that_it_began_with(tiny_llava: Path, tmp_path: Path) -> None:
    draw_pictures(tmp_path / "pictures", 4)
    cached = tmp_path / "hub" / "models--owner--name"
    for commit in (FIRST, SECOND):
        shutil.copytree(tiny_llava, cached / "snapshots" / commit)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(FIRST)
    assert preferences(tmp_path) == {FIRST}
    assert json.loads((tmp_path / "run" / "model_commits.json").read_text()) == {"owner/name@main": FIRST}

    (cached / "refs" / "main").write_text(SECOND)
    shutil.rmtree(tmp_path / "run" / "preferences")
    assert preferences(tmp_path) == {FIRST}
