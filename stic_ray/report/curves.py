"""Training metrics: the lines of a metrics.jsonl as one series per metric, gaps kept as gaps."""

import json
import math
from collections.abc import Sequence
from typing import Any, TypeVar

from stic_ray.core.rundir import RunDir

_T = TypeVar("_T")

METRICS_FILE = "metrics.jsonl"
MAX_POINTS = 400
"""Points per series; longer trainings are averaged over windows of equal length."""


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
    location = stage.location / METRICS_FILE
    if not location.exists():
        return None
    lines = [line for line in location.read().decode("utf-8", "replace").splitlines() if line.strip()]
    records = [record for record in map(_record, lines) if record is not None]
    by_step: dict[int, dict[str, float | None]] = {}
    for step, values in records:
        by_step.setdefault(step, {}).update(values)
    steps = sorted(by_step)
    keys = dict.fromkeys(key for step in steps for key in by_step[step])
    series = {key: [by_step[step].get(key) for step in steps] for key in keys}
    window = max(1, math.ceil(len(steps) / MAX_POINTS))
    return {
        "steps": [chunk[-1] for chunk in _windows(steps, window)],
        "metrics": {key: [_mean(chunk) for chunk in _windows(values, window)] for key, values in series.items()},
        "num_missing": {key: sum(value is None for value in values) for key, values in series.items()},
        "steps_per_point": window,
        "num_resumes": sum(after[0] < before[0] for before, after in zip(records, records[1:], strict=False)),
        "num_skipped_lines": len(lines) - len(records),
    }


def _record(line: str) -> tuple[int, dict[str, float | None]] | None:
    """Return the step and the numeric values of one line, or None if it is no JSON object with a step."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    step = _finite(record.get("step")) if isinstance(record, dict) else None
    if step is None:
        return None
    numeric = {
        key: _finite(value) for key, value in record.items() if key != "step" and (value is None or _is_number(value))
    }
    return int(step), numeric


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: Any) -> float | None:
    return float(value) if _is_number(value) and math.isfinite(value) else None


def _windows(values: Sequence[_T], window: int) -> list[Sequence[_T]]:
    return [values[start : start + window] for start in range(0, len(values), window)]


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
