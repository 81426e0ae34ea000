"""A run directory as one plain dict: all that the page shows, and nothing that the run does not hold."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from stic_ray.core.errors import RunError
from stic_ray.core.rundir import ESTIMATE, RunDir, read_shard
from stic_ray.core.schemas import REJECTED
from stic_ray.core.steps import read_record
from stic_ray.core.storage import Location
from stic_ray.report.curves import read_curves
from stic_ray.report.formats import shortened
from stic_ray.report.gallery import collect_gallery
from stic_ray.report.scores import collect_scores, headline

SCORES, PAIRS_FILES = "scores.json", "pairs-*.parquet"
"""What steps write that the page has a section of its own for."""
_FACTS = ("recipe", "overrides", "package_versions", "git_commit")

MAX_REJECTED_SHARDS = 64
"""Shards of rejected rows that are searched for examples; the counts come from the manifests."""
MAX_EXAMPLES = 5
"""Example messages per stage and reason."""

_MAX_MESSAGE_CHARACTERS = 400
_MANIFEST_KEYS = (
    "finished_at",
    "seconds",
    "num_attempts",
    "gpu_hours",
    "num_rows_in",
    "num_rows_written",
    "num_rows_rejected",
    "num_rows_failed",
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
    record = read_record(run)
    steps = {step["name"]: step for step in record.steps}
    manifests = {name: (run / name).manifest for name in steps}
    statuses = {name: _status(run / name, manifests[name]) for name in steps}
    scored = [name for name, step in steps.items() if step["writes"] == SCORES]
    scores_status = next((statuses[name] for name in scored), "not run")
    scores = collect_scores([run / name for name in scored], record.config, list(steps))
    finished = [manifest["finished_at"] for manifest in manifests.values() if manifest]
    report = {
        "name": record.config.get("name") or run.location.name,
        "uri": run.uri,
        "finished_at": max(finished, default=None),
        "headline": headline(scores, scores_status),
        "scores": {"status": scores_status, **scores},
        "stages": [_stage(step, statuses[name], manifests[name] or {}) for name, step in steps.items()],
        "estimates": _estimates(run.read_json(ESTIMATE) or {}, manifests),
        "training": [
            _training(run / name, name, statuses[name])
            for name, step in steps.items()
            if step["processes"] == "workers"
        ],
        "rejected": [_rejected(run / name, name, statuses[name], manifests[name]) for name in steps],
        "setup": {**dict.fromkeys(_FACTS), **record.facts, "config": dict(record.config) or None},
    }
    galleries = [
        {
            "stage": name,
            "status": statuses[name],
            "num_pairs": (manifests[name] or {}).get("num_rows_written"),
            **collect_gallery(run / name, num_gallery_pairs),
        }
        for name, step in steps.items()
        if step["writes"] == PAIRS_FILES
    ]
    return {**_plain(report, hide_passwords=True), "galleries": _plain(galleries, hide_passwords=False)}


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


def _status(stage: RunDir, manifest: Mapping[str, Any] | None) -> str:
    if manifest is not None:
        return "finished"
    return "not finished" if stage.location.exists() else "not run"


def _stage(step: Mapping[str, Any], status: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    num_rows, seconds = manifest.get("num_rows_in"), manifest.get("seconds")
    return {
        **{key: manifest.get(key) for key in _MANIFEST_KEYS},
        "stage": step["name"],
        "reads": list(dict.fromkeys(step["inputs"].values())),
        "status": status,
        "rows_per_second": num_rows / seconds if num_rows is not None and seconds else None,
        "details": {key: value for key, value in manifest.items() if key not in _MANIFEST_KEYS},
    }


def _estimates(recorded: Mapping[str, Any], manifests: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what finished steps were expected to take, beside what all attempts at them took."""
    rows = []
    for stage, manifest in manifests.items():
        expected = recorded.get(stage)
        if not expected or not manifest or expected["wall_s"] is None:
            continue
        seconds = {"expected": expected["wall_s"], "actual": manifest["seconds"]}
        hours = {"expected": expected["num_gpus"] * expected["wall_s"] / 3600, "actual": manifest["gpu_hours"]}
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
