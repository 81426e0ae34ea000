"""What the runs of a study left behind: scores question by question, costs, and how each run ended."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from stic_ray.core.config import RunConfig
from stic_ray.core.overrides import build_config
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import PREDICTIONS
from stic_ray.core.steps import BASE, with_inputs
from stic_ray.method.statistics import Question, Scores
from stic_ray.recipes import stic
from stic_ray.study.plan import SCORING
from stic_ray.study.processes import DONE
from stic_ray.study.record import Known, Record
from stic_ray.study.run import SETTINGS, cell_is_done, outcome, source_is_done

_COLUMNS = ["benchmark", "id", "image", "model", "mode", "metric", "score"]


@dataclass(frozen=True)
class Series:
    """What was scored: a model in a mode on a benchmark under a metric."""

    model: str
    mode: str
    benchmark: str
    metric: str


@dataclass(frozen=True)
class Cost:
    """What making a model took, its evaluation left out."""

    num_pairs: int | None
    """Preference pairs that were trained on; None where there were none to train on."""
    core_hours: float
    gpu_hours: float


@dataclass(frozen=True)
class Result:
    """One run."""

    run: Known
    status: str
    error: str | None
    scores: Mapping[Series, Scores]
    higher_is_better: Mapping[tuple[str, str], bool]
    """By benchmark and metric."""
    costs: Mapping[str, Cost]
    """By model."""


def read_results(record: Record, home: RunDir) -> list[Result]:
    """Return the results of all sources (variant `base`, size 0), then of all cells."""
    sources = [Known(name, BASE, 0, seed, name) for name, seed in record.sources.items()]
    return [
        *(_result(known, home / f"sources/{known.name}") for known in sources),
        *(_result(known, home / f"cells/{known.name}") for known in record.cells),
    ]


def _result(known: Known, run: RunDir) -> Result:
    is_base = known.variant == BASE
    status, error = outcome(run, is_done=source_is_done(run) if is_base else cell_is_done(run))
    if status != DONE:
        return Result(known, status, error, {}, {}, {})
    config = _config(run)
    assert config is not None, f"'{run.uri}' is done and has no {SETTINGS}"
    scores: dict[Series, dict[Question, float]] = {}
    for model in config.evaluation.models:
        for row in (run / SCORING).read_table(f"predictions-{model}", PREDICTIONS, _COLUMNS).to_pylist():
            series = Series(row["model"], row["mode"], row["benchmark"], row["metric"])
            scores.setdefault(series, {})[Question(row["id"], row["image"])] = row["score"]
    rows: list[dict[str, Any]] = (run / SCORING).read_json("scores.json") or []
    higher = {(row["benchmark"], row["metric"]): row["higher_is_better"] for row in rows}
    costs = {BASE: Cost(None, 0.0, 0.0)} if is_base else {m: _cost(m, config, run, known.size) for m in _models(scores)}
    return Result(known, status, None, scores, higher, costs)


def _models(scores: Mapping[Series, Any]) -> list[str]:
    return list(dict.fromkeys(series.model for series in scores))


def _config(run: RunDir) -> RunConfig | None:
    location = run.location / SETTINGS
    return build_config(yaml.safe_load(location.read())) if location.exists() else None


def _cost(model: str, config: RunConfig, run: RunDir, size: int) -> Cost:
    """Add up what the steps behind a model reserved, and of the pairs of a source the share of this prefix."""
    steps = [step for step in stic(config) if step.name in with_inputs({model}, stic(config))]
    parts = [_reserved((run / step.name).manifest, 1.0) for step in steps]
    num_pairs = None
    for step in steps:
        if "pairs" in step.inputs:
            trained, pairs = (run / step.name).manifest, step.place("pairs", run).manifest or {}
            num_pairs = trained["num_rows_written"] - trained.get("num_held_out", 0) if trained else None
            parts.append(_reserved(pairs, min(1.0, size / (pairs.get("num_rows_in") or size))))
    return Cost(num_pairs, sum(cores for cores, _ in parts), sum(gpus for _, gpus in parts))


def _reserved(manifest: Mapping[str, Any] | None, share: float) -> tuple[float, float]:
    """Return core-hours and GPU-hours that all attempts at a step reserved."""
    found = manifest or {}
    return share * found.get("core_hours", 0.0), share * found.get("gpu_hours", 0.0)
