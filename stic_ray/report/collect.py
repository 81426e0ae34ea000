"""A run directory as one plain dict: all that the page shows, and nothing that the run does not hold."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from stic_ray.core.errors import RunError
from stic_ray.core.rundir import ESTIMATE, RunDir, read_shard
from stic_ray.core.schemas import REJECTED
from stic_ray.core.storage import Location
from stic_ray.report.curves import read_curves
from stic_ray.report.formats import shortened
from stic_ray.report.gallery import collect_gallery
from stic_ray.report.scores import collect_scores, headline

STAGES = ("pool", "preferences", "dpo", "infusion", "sft", "evaluation")
TRAINING_STAGES = ("dpo", "sft")

MAX_REJECTED_SHARDS = 64
"""Shards of rejected rows that are searched for examples; the counts come from the manifests."""
MAX_EXAMPLES = 5
"""Example messages per stage and reason."""

_MAX_MESSAGE_CHARACTERS = 400
_MANIFEST_KEYS = (
    "stage",
    "finished_at",
    "seconds",
    "num_rows_in",
    "num_rows_written",
    "num_rows_rejected",
    "rejected_by_reason",
)
_PASSWORD = re.compile(r"(?<=://)[^/\s@:]+:[^/\s@]+@")


def collect(run: RunDir, *, num_gallery_pairs: int = 24) -> dict[str, Any]:
    """Read a run directory into plain, JSON-safe values; what the run does not hold is None, NaN included.

    Reads manifests, metrics and scores whole, of the pairs only the rows that the gallery shows (out of the
    first `gallery.MAX_SHARDS` shards), and of the rejected rows a few examples. Raises RunError when there is
    no such folder or its config.yaml is no YAML mapping, OSError when a file cannot be read.
    """
    if not run.location.is_folder():
        raise RunError(f"No run at '{run.uri}'; start one with --run {run.uri}.")
    setup = _setup(run)
    config = setup["config"] or {}
    manifests = {stage: (run / stage).manifest for stage in STAGES}
    statuses = {stage: _status(run / stage, manifests[stage]) for stage in STAGES}
    scores = collect_scores(run / "evaluation", config)
    finished = [manifest["finished_at"] for manifest in manifests.values() if manifest]
    report = {
        "name": config.get("name") or run.location.name,
        "uri": run.uri,
        "finished_at": max(finished, default=None),
        "headline": headline(scores, statuses["evaluation"]),
        "scores": {"status": statuses["evaluation"], **scores},
        "stages": [_stage(stage, statuses[stage], manifests[stage] or {}) for stage in STAGES],
        "estimates": _estimates(run.read_json(ESTIMATE) or {}, manifests),
        "training": [_training(run / stage, stage, statuses[stage]) for stage in TRAINING_STAGES],
        "rejected": [_rejected(run / stage, stage, statuses[stage], manifests[stage]) for stage in STAGES],
        "setup": setup,
    }
    gallery = {
        "status": statuses["preferences"],
        "num_pairs": (manifests["preferences"] or {}).get("num_rows_written"),
        **collect_gallery(run / "preferences", num_gallery_pairs),
    }
    return {**_plain(report, hide_passwords=True), "gallery": _plain(gallery, hide_passwords=False)}


def _plain(value: Any, *, hide_passwords: bool) -> Any:
    """Return `value` in JSON's own types: no NaN or infinity, only string keys.

    Passwords in addresses are hidden where asked for, as reports are passed around; not in what a model said.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(item, hide_passwords=hide_passwords) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, hide_passwords=hide_passwords) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int)):
        return value
    return _PASSWORD.sub("***@", str(value)) if hide_passwords else str(value)


def _setup(run: RunDir) -> dict[str, Any]:
    """Return config.yaml with every key present; None for what was not recorded."""
    keys = ("config", "recipe", "overrides", "package_versions", "git_commit")
    location = run.location / "config.yaml"
    if not location.exists():
        return dict.fromkeys(keys)
    try:
        found = yaml.safe_load(location.read())
    except yaml.YAMLError as error:
        raise RunError(f"'{location.uri}' is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise RunError(f"'{location.uri}' must hold a mapping, found {type(found).__name__}.")
    return {key: found.get(key) for key in keys}


def _status(stage: RunDir, manifest: Mapping[str, Any] | None) -> str:
    if manifest is not None:
        return "finished"
    return "not finished" if stage.location.exists() else "not run"


def _stage(name: str, status: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    num_rows, seconds = manifest.get("num_rows_in"), manifest.get("seconds")
    return {
        **{key: manifest.get(key) for key in _MANIFEST_KEYS},
        "stage": name,
        "status": status,
        "rows_per_second": num_rows / seconds if num_rows is not None and seconds else None,
        "details": {key: value for key, value in manifest.items() if key not in _MANIFEST_KEYS},
    }


def _estimates(recorded: Mapping[str, Any], manifests: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what finished stages were expected to take, beside what they took."""
    rows = []
    for stage in STAGES:
        expected, manifest = recorded.get(stage), manifests[stage]
        if not expected or not manifest or expected["wall_s"] is None:
            continue
        seconds = {"expected": expected["wall_s"], "actual": manifest["seconds"]}
        hours = {which: expected["num_gpus"] * value / 3600 for which, value in seconds.items()}
        price = expected["price_per_gpu_hour"]
        money = {which: None if price is None else price * value for which, value in hours.items()}
        rows.append(
            {"stage": stage, "basis": expected["basis"], "seconds": seconds, "gpu_hours": hours, "money": money}
        )
    return rows


def _training(stage: RunDir, name: str, status: str) -> dict[str, Any]:
    return {
        "stage": name,
        "status": status,
        "curves": read_curves(stage),
        "result": stage.read_json("result.json"),
    }


def _rejected(stage: RunDir, name: str, status: str, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a stage's rejected rows by reason: the manifest's count and a few examples."""
    counts = dict((manifest or {}).get("rejected_by_reason") or {})
    examples: dict[str, list[dict[str, str]]] = {reason: [] for reason, count in counts.items() if count}

    def is_complete() -> bool:
        wanted = {reason: min(MAX_EXAMPLES, counts.get(reason, 0)) for reason in examples}
        return manifest is not None and all(len(examples[reason]) >= wanted[reason] for reason in examples)

    for shard in [s for f in stage.rejected_families() for s in stage.shards(f)][:MAX_REJECTED_SHARDS]:
        if is_complete():
            break
        for row in _rows(shard):
            known = examples.setdefault(row["reason"], [])
            if len(known) < MAX_EXAMPLES:
                message = shortened(row["message"], _MAX_MESSAGE_CHARACTERS)
                known.append({"image_id": row["image_id"], "path": row["path"], "message": message})
    reasons = [{"reason": reason, "count": counts.get(reason), "examples": known} for reason, known in examples.items()]
    return {
        "stage": name,
        "status": status,
        "num_rejected": (manifest or {}).get("num_rows_rejected"),
        "reasons": sorted(reasons, key=lambda each: (-(each["count"] or 0), each["reason"])),
    }


def _rows(shard: Location) -> Iterator[dict[str, str]]:
    for batch in read_shard(shard, REJECTED).to_batches(max_chunksize=256):
        yield from batch.to_pylist()
