"""A real study through the command line: a source, two sizes, and the same command again."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]

SETTINGS = {
    "toyworld.num_pictures": 12,
    "toyworld.num_scenes": 2,
    "pool.shard_size": 12,
    "preferences.max_new_tokens": 64,
    "evaluation.max_answer_tokens": 4,
    "evaluation.max_description_tokens": 6,
    "actors.num_actors": 1,
    "workers.num_workers": 1,
    "workers.zero_stage": 0,
    "dpo.global_batch": 4,
    "dpo.num_held_out": 0,  # so that all pairs of a size are counted
}


def study(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
    command = [sys.executable, str(ROOT / "jobs" / "scaling_study.py"), "--run", str(folder / "study"), *settings]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=280)


def test_two_sizes_train_on_prefixes_of_one_pool(tmp_path: Path) -> None:
    variants = tmp_path / "variants.yaml"
    variants.write_text("only_dpo: {evaluation.models: [dpo]}\n")
    asked = ["--sizes", "4,8", "--variants", str(variants), "--parallel", "2"]
    done = study(tmp_path, *asked)
    home = tmp_path / "study"
    logs = "".join(log.read_text()[-1500:] for log in home.glob("cells/*/log.txt"))
    assert done.returncode == 0, done.stderr[-3000:] + logs
    rows = pq.read_table(home / "cells.parquet").to_pylist()
    trained = [row for row in rows if row["variant"] == "only_dpo"]
    (pairs,) = home.glob("sources/*/preferences/pairs-*.parquet")
    positions = pq.read_table(pairs, columns=["position"])["position"].to_pylist()
    prefixes = {size: sum(position < size for position in positions) for size in (4, 8)}
    assert 0 < prefixes[4] < prefixes[8]
    assert {(row["size"], row["num_pairs"], row["model"]) for row in trained} == {
        (size, number, "dpo") for size, number in prefixes.items()
    }
    assert all(row["difference"] is not None and row["core_hours"] > 0 for row in trained)
    assert {row["model"] for row in rows if row["size"] == 0} == {"base"}
    assert "<svg" in (home / "report.html").read_text()
    manifest = home / "cells" / "only_dpo-n8-seed0" / "dpo" / "manifest.json"
    before = json.loads(manifest.read_text())
    again = study(tmp_path, *asked)
    assert again.returncode == 0 and "2 of 2 cells are already done, skipped" in again.stderr
    assert json.loads(manifest.read_text()) == before
