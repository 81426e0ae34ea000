"""How far a run is, from its directory alone: no Ray, no cluster, while it runs or after it died."""

import re
import time
from typing import Any

import yaml

from stic_ray.core.errors import RunError
from stic_ray.core.rundir import ATTEMPTS_FAMILY, STARTED, RunDir
from stic_ray.pipeline import STAGES
from stic_ray.report.formats import duration, number
from stic_ray.stages.extents import index_shards

_TRAINING = "training"
"""Folder of Ray Train's checkpoints while a training is not finished."""


def run_status(run: RunDir) -> list[str]:
    """Return a line per stage: finished and with what, under way and how far, or not begun.

    Raises RunError when there is no run.
    """
    record = run.location / "config.yaml"
    if not record.exists():
        raise RunError(f"No run at '{run.uri}': it has no config.yaml.")
    config = yaml.safe_load(record.read())["config"]
    return [f"{stage.name:<12} {_stage(run / stage.name, stage.name, run, config)}" for stage in STAGES]


def _stage(stage: RunDir, name: str, run: RunDir, config: dict[str, Any]) -> str:
    if manifest := stage.manifest:
        counts = ", ".join(f"{number(manifest[f'num_rows_{what}'])} {what}" for what in ("in", "written", "rejected"))
        reasons = ", ".join(f"{reason} {number(count)}" for reason, count in manifest["rejected_by_reason"].items())
        took = f"{manifest['finished_at']} after {duration(manifest['seconds'])}"
        return f"finished    {counts}{f' ({reasons})' if reasons else ''}; {took}"
    if stage.read_json(STARTED) is None:
        return "not begun"
    files = stage.location.files()
    age_s = time.time() - max(file.mtime_ns for file in files) / 1e9
    return f"begun       {_progress(stage, name, run, config)}; last file {duration(max(0.0, age_s))} ago"


def _progress(stage: RunDir, name: str, run: RunDir, config: dict[str, Any]) -> str:
    """Say how many shards are there, or checkpoints, of a stage that is not finished."""
    if name in ("dpo", "sft"):
        found = [file.path for file in (stage.location / _TRAINING).below(recursive=True)]
        names = {match[0] for path in found if (match := re.search(r"checkpoint_\S+?(?=/|$)", path))}
        return f"last checkpoint {max(names)}" if names else "no checkpoint yet"
    families = [re.match(r"(.+)-\d{6,}\.(?:parquet|json)$", file.base_name) for file in stage.location.files()]
    counts: dict[str, int] = {}
    for family in (match[1] for match in families if match):
        counts[family] = counts.get(family, 0) + 1
    num_open = counts.pop(ATTEMPTS_FAMILY, 0)
    total = _num_shards(run, config) if name == "preferences" else None
    done = counts.get("pairs", 0) + counts.get("empty-pairs", 0)
    shards = f"{done} of {total} shards" if total else ", ".join(f"{n} {family}" for family, n in counts.items())
    return f"{shards or 'no shard yet'}, {num_open} at work or cut off"


def _num_shards(run: RunDir, config: dict[str, Any]) -> int | None:
    """Return how many shards the pool cuts the images of `preferences` into, or None while there is no pool."""
    pool = run / "pool"
    if pool.manifest is None:
        return None
    return len(index_shards(pool, config["pool"]["shard_size"], config["preferences"]["num_images"]))
