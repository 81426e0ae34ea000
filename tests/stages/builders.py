"""Pictures, configurations and tables that the tests of the stages share."""

from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from stic_ray.core.config import RunConfig
from stic_ray.core.overrides import build_config
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import PAIRS, REJECTED
from stic_ray.core.steps import Step, StepRun, prepare_step
from stic_ray.core.storage import Location
from stic_ray.pipeline import run_pipeline
from stic_ray.preparation import check_before_work
from stic_ray.recipes import stic
from stic_ray.stages.training.index import Rows, index_conversations, index_pairs
from stic_ray.toyworld.scenes import draw_scene, sample_scene

TELLING = "rules: [{prompt: step, answer: 'Chosen {size} {seed}.'}]\ndefault: 'Seen {size} in {colour}.'"
"""Script of a fake engine that says which picture it was shown."""


def draw_pictures(folder: Path, number: int) -> Path:
    """Write so many different JPEG pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        draw_scene(sample_scene(7, index), side_px=64).save(folder / f"{index:03d}.jpg", quality=90)
    return folder


def fake_script(folder: Path, text: str = "") -> str:
    """Write a script for the fake engine and return its path."""
    path = folder / "script.yaml"
    path.write_text(text)
    return str(path)


def fake_config(folder: Path, pictures: Path, script: str = "", **sections: dict[str, Any]) -> RunConfig:
    """A run with the fake engine over `pictures`, in shards of four."""
    defaults: dict[str, dict[str, Any]] = {
        "model": {"engine": "fake", "path": fake_script(folder, script)},
        "pool": {"source": str(pictures), "shard_size": 4},
        "actors": {"num_actors": 2, "batch_size": 4},
    }
    for name, fields in sections.items():
        defaults[name] = {**defaults.get(name, {}), **fields}
    return build_config({"name": "test", "seed": 3, **defaults})


def run_stages(config: RunConfig, folder: Path, *stages: str) -> RunDir:
    """Run stages into `folder` and return the run directory."""
    run = RunDir.of(str(folder))
    run_pipeline(config, stic(config), run, stages, {"recipe": "test", "overrides": []})
    return run


def step_of(config: RunConfig, run: RunDir, name: str) -> StepRun:
    """Return a step of STIC as its stage's function gets it."""
    return prepare_step(find_step(config, name), config, run, config)


def find_step(config: RunConfig, name: str) -> Step:
    """Return a step of STIC by its name."""
    return next(step for step in stic(config) if step.name == name)


def check(config: RunConfig, *names: str, run: str = "run") -> None:
    """Look for the mistakes that are found before any work."""
    check_before_work([(find_step(config, name), step_of(config, RunDir.of(run), name)) for name in names])


def pairs_of(run: RunDir) -> pa.Table:
    """Return all pairs of a run."""
    return (run / "preferences").read_table("pairs", PAIRS)


def rejected_of(run: RunDir, stage: str) -> list[dict[str, Any]]:
    """Return all rejected rows of a stage."""
    return (run / stage).read_table("rejected", REJECTED).to_pylist()


def white_picture(path: Path, side_px: int = 40) -> None:
    """Write a picture that no corruption changes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side_px, side_px), "white").save(path)


def pairs_in(config: RunConfig, *files: Path) -> Rows:
    """Return the pairs of some files as stage `dpo` takes them."""
    return index_pairs(config, [Location.of(str(file)) for file in files])


def conversations_in(config: RunConfig, *files: Path) -> Rows:
    """Return the rows of some files as stage `sft` takes them."""
    return index_conversations(config, {"infusion": [Location.of(str(file)) for file in files]})
