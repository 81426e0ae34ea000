"""Studies in a temporary folder, and a stand-in for the pipeline that takes milliseconds."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stic_ray.core.rundir import RunDir
from stic_ray.recipes import demo
from stic_ray.study.plan import Study, plan_study

FAKE = """
import json, os, signal, sys, time
from pathlib import Path

options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run = Path(options["--run"])
(run / "calls.txt").open("a").write("called\\n")
trouble = Path(__file__).parent / "trouble" / run.name
if trouble.exists():
    print("some line before")
    exec(trouble.read_text())
stages = options.get("--stages", "dpo,infusion,sft,evaluation").split(",")
for stage in stages:
    (run / stage).mkdir(parents=True, exist_ok=True)
    (run / stage / "manifest.json").write_text(json.dumps({"num_rows_written": 100, "seconds": 1.0}))
(run / "report.html").write_text("page")
"""
"""Does as a run does; a file named like the run in the folder `trouble` is executed before it."""


def fake_entry(folder: Path, **trouble: str) -> tuple[str, ...]:
    """A command instead of the pipeline; `trouble` is Python code by name of the run, "_" for "-"."""
    (folder / "trouble").mkdir(exist_ok=True)
    for name, code in trouble.items():
        (folder / "trouble" / name.replace("_", "-")).write_text(code)
    script = folder / "fake.py"
    script.write_text(FAKE)
    return sys.executable, str(script)


def study_in(
    folder: Path,
    sizes: Sequence[int] = (10, 20),
    seeds: Sequence[int] = (0,),
    variants: Mapping[str, Mapping[str, Any]] | None = None,
) -> tuple[Study, RunDir]:
    home = RunDir.of(str(folder / "study"))
    return plan_study(demo().config, home.uri, sizes, seeds, variants or {"default": {}}), home


def calls(run: RunDir) -> int:
    """How often a run was attempted."""
    path = Path(run.uri) / "calls.txt"
    return len(path.read_text().splitlines()) if path.exists() else 0
