"""A run directory as one plain dict: all that the page shows, and nothing that the run does not hold."""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from stic_ray.core.errors import RunError
from stic_ray.core.rundir import ESTIMATE, RunDir, read_shard
from stic_ray.core.schemas import REJECTED
from stic_ray.core.steps import left_out_of_record, read_from, read_record
from stic_ray.report.candidates import collect_candidates
from stic_ray.report.formats import shortened
from stic_ray.report.gallery import collect_gallery
from stic_ray.report.scores import collect_scores, headline

CANDIDATES_ROLE = "candidates"
"""Of inputs: a step that decides about candidates has a gallery of its own."""
SCORES, PAIRS_FILES, VERDICT = "scores.json", "pairs-*.parquet", "verdict.json"
"""What steps write that the page has a section of its own for."""
MAX_REJECTED_SHARDS = 64
"""Shards of rejected rows that are searched for examples; the counts come from the manifests."""
MAX_EXAMPLES = 5
"""Example messages per stage and reason."""
MAX_POINTS = 400
"""Points per training metric; longer trainings are averaged over windows of equal length."""

_FACTS = ("recipe", "overrides", "package_versions", "git_commit")
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
    """Read a run directory into plain, JSON-safe values; what the run does not hold is None.

    Reads manifests, metrics and scores whole, of the pairs only the rows that the gallery shows (out of the
    first `gallery.MAX_SHARDS` shards), and of the rejected rows a few examples. Raises RunError when there is
    no such folder or its config.yaml is no YAML mapping, OSError when a file cannot be read.
    """
    if not run.location.is_folder():
        raise RunError(f"No run at '{run.uri}'; start one with --run {run.uri}.")
    record = read_record(run)
    steps = {step["name"]: step for step in record.steps}
    manifests = {name: (run / name).manifest for name in steps}
    found = {name: manifest for name, manifest in manifests.items() if manifest is not None}
    statuses = _statuses(steps, found, left_out_of_record(record, run), run)
    scored = [name for name, step in steps.items() if step["writes"] == SCORES]
    scores_status = next((statuses[name] for name in scored), "not run")
    scores = collect_scores([run / name for name in scored], record.config, list(steps))
    trainings = [name for name, step in steps.items() if step["processes"] == "workers"]
    report = {
        "name": record.config.get("name") or run.location.name,
        "uri": run.uri,
        "finished_at": max((manifest["finished_at"] for manifest in found.values()), default=None),
        "headline": headline(scores, scores_status),
        "scores": {"status": scores_status, **scores, "rounds": _verdicts(steps, run)},
        "stages": [_stage(step, run, statuses[name], found.get(name, {})) for name, step in steps.items()],
        "estimates": _estimates(run.read_json(ESTIMATE) or {}, found),
        "training": [
            {
                "stage": name,
                "status": statuses[name],
                "curves": read_curves(run / name),
                "result": (run / name).read_json("result.json"),
            }
            for name in trainings
        ],
        "rejected": [_rejected(run / name, name, statuses[name], manifests[name]) for name in steps],
        "setup": {**dict.fromkeys(_FACTS), **record.facts, "config": dict(record.config) or None},
    }
    galleries = [
        {
            "stage": name,
            "status": statuses[name],
            "num_pairs": found.get(name, {}).get("num_rows_written"),
            **collect_gallery(run / name, num_gallery_pairs),
        }
        for name, step in steps.items()
        if step["writes"] == PAIRS_FILES and CANDIDATES_ROLE not in step["inputs"]
    ]
    chosen = [step for step in record.steps if CANDIDATES_ROLE in step["inputs"] and step["section"] == "rules"]
    candidates = [
        {"stage": step["name"], "status": statuses[step["name"]], **_rules_of(record.config, step)}
        | collect_candidates(run, step, num_gallery_pairs // 2)
        for step in chosen
    ]
    return {**_without_passwords(report), "galleries": galleries, "candidates": candidates}


def _verdicts(steps: Mapping[str, Mapping[str, Any]], run: RunDir) -> list[dict[str, Any]]:
    """Return how far the model of each round is from the one before it."""
    found = [(run / name).read_json(VERDICT) for name, step in steps.items() if step["writes"] == VERDICT]
    return [each for each in found if each]


def _statuses(
    steps: Iterable[str], finished: Collection[str], unwanted: Collection[str], run: RunDir
) -> dict[str, str]:
    """Return how far each step is."""

    def status(name: str) -> str:
        if name in finished or name in unwanted:
            return "finished" if name in finished else "left out"
        return "not finished" if (run / name).location.exists() else "not run"

    return {name: status(name) for name in steps}


def _rules_of(config: Mapping[str, Any], step: Mapping[str, Any]) -> dict[str, Any]:
    """Return a step's rules that are set, and whether they put several scores together."""
    rules = dict(config.get("rules") or {}) | {key.partition(".")[2]: value for key, value in step["settings"].items()}
    is_combined = len(rules.get("scorers") or ()) != 1 or rules.get("combine") == "rank"
    return {"rules": {name: value for name, value in rules.items() if value is not None}, "is_combined": is_combined}


def _without_passwords(value: Any) -> Any:
    """Hide passwords in addresses, as reports are passed around."""
    if isinstance(value, Mapping):
        return {str(key): _without_passwords(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_passwords(item) for item in value]
    return _PASSWORD.sub("***@", value) if isinstance(value, str) else value


def _stage(step: Mapping[str, Any], run: RunDir, status: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    num_rows, seconds = manifest.get("num_rows_in"), manifest.get("seconds")
    return {
        **{key: manifest.get(key) for key in _MANIFEST_KEYS},
        "stage": step["name"],
        "reads": list(dict.fromkeys(read_from(source, run) for source in step["inputs"].values())),
        "status": status,
        "rows_per_second": num_rows / seconds if num_rows is not None and seconds else None,
        "details": {key: value for key, value in manifest.items() if key not in _MANIFEST_KEYS},
    }


def _estimates(recorded: Mapping[str, Any], manifests: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what finished steps were expected to take, beside what all attempts at them took."""
    rows = []
    for stage, manifest in manifests.items():
        expected = recorded.get(stage)
        if not expected or expected["wall_s"] is None:
            continue
        seconds = {"expected": expected["wall_s"], "actual": manifest["seconds"]}
        hours = {"expected": expected["num_gpus"] * expected["wall_s"] / 3600, "actual": manifest["gpu_hours"]}
        price = expected["price_per_gpu_hour"]
        money = {which: None if price is None else price * value for which, value in hours.items()}
        rows.append(
            {"stage": stage, "basis": expected["basis"], "seconds": seconds, "gpu_hours": hours, "money": money}
        )
    return rows


def _rejected(stage: RunDir, name: str, status: str, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return a stage's rejected rows by reason: the manifest's count and a few examples."""
    counts = dict((manifest or {}).get("rejected_by_reason") or {})
    examples: dict[str, list[dict[str, str]]] = {reason: [] for reason, count in counts.items() if count}
    shards = [shard for family in stage.rejected_families() for shard in stage.shards(family)]
    for shard in shards[:MAX_REJECTED_SHARDS]:
        if manifest and all(len(known) >= min(MAX_EXAMPLES, counts[reason]) for reason, known in examples.items()):
            break
        for row in read_shard(shard, REJECTED).to_pylist():
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


def read_curves(stage: RunDir) -> dict[str, Any] | None:
    """Read the training metrics of a stage; None when it has none.

    Returns
    - `steps`: optimiser steps, rising;
    - `metrics`: for each numeric key one value per step, None where it was not logged or not finite;
    - `num_missing`: how many of these are None, before averaging;
    - `steps_per_point`: 1, or the number of logged steps that each point is the mean of;
    - `num_resumes`: how often the step count went back; of a step logged twice the later values hold;
    - `num_skipped_lines`: lines that are no JSON object with a step, such as one cut short by a crash.
    """
    location = stage.location / "metrics.jsonl"
    if not location.exists():
        return None
    lines = [line for line in location.read().decode("utf-8", "replace").splitlines() if line.strip()]
    logged: list[int] = []
    by_step: dict[int, dict[str, float | None]] = {}
    for line in lines:
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
            continue
        logged.append(step)
        numbers = {key: value for key, value in values.items() if value is None or isinstance(value, (int, float))}
        by_step.setdefault(step, {}).update(numbers)
    steps = sorted(by_step)
    keys = dict.fromkeys(key for step in steps for key in by_step[step])
    series = {key: [_finite(by_step[step].get(key)) for step in steps] for key in keys}
    window = max(1, math.ceil(len(steps) / MAX_POINTS))
    chunks = [slice(start, start + window) for start in range(0, len(steps), window)]
    return {
        "steps": [steps[chunk][-1] for chunk in chunks],
        "metrics": {key: [_mean(values[chunk]) for chunk in chunks] for key, values in series.items()},
        "num_missing": {key: values.count(None) for key, values in series.items()},
        "steps_per_point": window,
        "num_resumes": sum(after < before for before, after in zip(logged, logged[1:], strict=False)),
        "num_skipped_lines": len(lines) - len(logged),
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return fmean(present) if present else None
