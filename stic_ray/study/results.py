"""What the runs of a study left behind: scores question by question, costs, how each run ended; and the tidy table."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from pyarrow import csv

from stic_ray.core.columns import column, schema
from stic_ray.core.config import EvaluationConfig, RunConfig
from stic_ray.core.overrides import build_config
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import PREDICTIONS, table_of
from stic_ray.core.steps import BASE, with_inputs
from stic_ray.method.statistics import Question, Scores, summary
from stic_ray.recipes import stic
from stic_ray.study.plan import SCORING, Run, Study
from stic_ray.study.processes import DONE
from stic_ray.study.run import SETTINGS, outcome

DIRECT = "direct"

STUDY = schema(
    column("variant", pa.string(), "name in the variants file; `base` for the base model of a source"),
    column("size", pa.int64(), "images of the pool that were trained on; 0 for the base model"),
    column("seed", pa.int64(), "of the pool, the preferences and the training"),
    column("source", pa.string(), "folder below sources/ with the pool, the pairs and the base model's scores"),
    column("model", pa.string(), "`base`, `dpo` or `sft`; null without scores", nullable=True),
    column("mode", pa.string(), "`direct` or `describe_and_respond`", nullable=True),
    column("benchmark", pa.string(), "as in the predictions", nullable=True),
    column("metric", pa.string(), "as in the predictions", nullable=True),
    column("higher_is_better", pa.bool_(), "false for shares of mistakes", nullable=True),
    column("num_questions", pa.int64(), "that were scored", nullable=True),
    column("score", pa.float64(), "mean over the questions, 0 to 1", nullable=True),
    column("low", pa.float64(), "interval over images and their questions", nullable=True),
    column("high", pa.float64(), "interval over images and their questions", nullable=True),
    column("difference", pa.float64(), "to the source's base model answering directly", nullable=True),
    column("difference_low", pa.float64(), "paired by question", nullable=True),
    column("difference_high", pa.float64(), "paired by question", nullable=True),
    column("num_pairs", pa.int64(), "preference pairs that were trained on", nullable=True),
    column("core_hours", pa.float64(), "reserved to make this model, without its evaluation", nullable=True),
    column("gpu_hours", pa.float64(), "reserved to make this model, without its evaluation", nullable=True),
    column("status", pa.string(), "`done`, `failed`, `out_of_memory` or `not_run`"),
    column("error", pa.string(), "why there are no scores", nullable=True),
)
"""Results of a scaling study: a row per cell, model, mode, benchmark and metric; one row for a cell without scores."""


class Series(NamedTuple):
    """What was scored: a model in a mode on a benchmark under a metric."""

    model: str
    mode: str
    benchmark: str
    metric: str

    @property
    def measure(self) -> tuple[str, str]:
        """Benchmark and metric."""
        return self.benchmark, self.metric


@dataclass(frozen=True)
class Cost:
    """What making a model took, its evaluation left out."""

    num_pairs: int | None = None
    """Preference pairs that were trained on; None where there were none to train on."""
    core_hours: float = 0.0
    gpu_hours: float = 0.0


@dataclass(frozen=True)
class Result:
    """One run."""

    run: Run
    status: str
    error: str | None
    scores: Mapping[Series, Scores] = field(default_factory=dict)
    higher_is_better: Mapping[tuple[str, str], bool] = field(default_factory=dict)
    """By benchmark and metric."""
    costs: Mapping[str, Cost] = field(default_factory=dict)
    """By model."""


def read_results(record: Study, home: RunDir) -> list[Result]:
    """Return the results of all sources, then of all cells."""
    return [_result(run, home) for run in (*record.sources, *record.cells)]


def _result(run: Run, home: RunDir) -> Result:
    status, error = outcome(run, home)
    if status != DONE:
        return Result(run, status, error)
    folder = home / run.folder
    config = build_config(yaml.safe_load((folder.location / SETTINGS).read()))
    scores = read_scores(folder / SCORING, config.evaluation.models)
    rows: list[dict[str, Any]] = (folder / SCORING).read_json("scores.json") or []
    higher = {(row["benchmark"], row["metric"]): row["higher_is_better"] for row in rows}
    models = dict.fromkeys(series.model for series in scores)
    costs = {model: Cost() if model == BASE else _cost(model, config, folder, run.size) for model in models}
    return Result(run, status, None, scores, higher, costs)


def read_scores(evaluation: RunDir, models: Iterable[str]) -> dict[Series, dict[Question, float]]:
    """Return what models scored in an evaluation, question by question."""
    columns = [*Series._fields, "id", "image", "score"]
    scores: dict[Series, dict[Question, float]] = {}
    for model in models:
        for row in evaluation.read_table(f"predictions-{model}", PREDICTIONS, columns).to_pylist():
            series = Series(*(row[name] for name in Series._fields))
            scores.setdefault(series, {})[Question(row["id"], row["image"])] = row["score"]
    return scores


def _cost(model: str, config: RunConfig, folder: RunDir, size: int) -> Cost:
    """Add up what the steps behind a model reserved, and of the pairs of a source the share of this prefix."""
    num_pairs, core_hours, gpu_hours = None, 0.0, 0.0
    steps = stic(config)
    for step in steps:
        if step.name not in with_inputs({model}, steps):
            continue
        made = (folder / step.name).manifest or {}
        parts = [(made, 1.0)]
        if "pairs" in step.inputs:
            pairs = step.place("pairs", folder).manifest or {}
            parts.append((pairs, min(1.0, size / (pairs.get("num_rows_in") or size))))
            num_pairs = made["num_rows_written"] - made.get("num_held_out", 0) if made else None
        core_hours += sum(share * part.get("core_hours", 0.0) for part, share in parts)
        gpu_hours += sum(share * part.get("gpu_hours", 0.0) for part, share in parts)
    return Cost(num_pairs, core_hours, gpu_hours)


def base_scores(results: Sequence[Result]) -> dict[tuple[str, tuple[str, str]], Scores]:
    """Return what the base model of each source scored answering directly, by source and measure."""
    return {
        (result.run.source, series.measure): scores
        for result in results
        if result.run.is_source
        for series, scores in result.scores.items()
        if (series.model, series.mode) == (BASE, DIRECT)
    }


def study_table(results: Sequence[Result], config: EvaluationConfig) -> pa.Table:
    """Return a row per run, model, mode, benchmark and metric, and one row for a run without scores."""
    bases = base_scores(results)
    rows = []
    for result in results:
        run = result.run
        key = {**asdict(run), "status": result.status, "error": result.error}
        for series in sorted(result.scores, key=lambda series: (series.measure, series)):
            cost, scores = result.costs[series.model], result.scores[series]
            base = {} if (series.model, series.mode) == (BASE, DIRECT) else bases.get((run.source, series.measure), {})
            rows.append(
                {
                    **key,
                    **series._asdict(),
                    "higher_is_better": result.higher_is_better.get(series.measure, True),
                    "num_questions": len(scores),
                    **summary([scores], [base], config, run.seed),
                    "num_pairs": cost.num_pairs,
                    "core_hours": cost.core_hours,
                    "gpu_hours": cost.gpu_hours,
                }
            )
        if not result.scores:
            rows.append({**dict.fromkeys(STUDY.names), **key})
    return table_of(rows, STUDY)


def write_table(home: RunDir, table: pa.Table) -> None:
    """Write cells.parquet and cells.csv."""
    parquet, text = pa.BufferOutputStream(), io.BytesIO()
    pq.write_table(table, parquet, compression="zstd")
    csv.write_csv(table, text)
    (home.location / "cells.parquet").write(parquet.getvalue())
    (home.location / "cells.csv").write(text.getvalue())
