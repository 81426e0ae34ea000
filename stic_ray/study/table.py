"""The tidy table of a study: cells.parquet and cells.csv."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from stic_ray.core.config import EvaluationConfig
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import STUDY, table_of
from stic_ray.core.steps import BASE
from stic_ray.method.statistics import DIFFERENCES, Scores, columns, differences, score_of
from stic_ray.study.results import Result, Series

DIRECT = "direct"


def study_table(results: Sequence[Result], config: EvaluationConfig) -> pa.Table:
    """Return a row per run, model, mode, benchmark and metric, and one row for a run without scores."""
    bases = base_scores(results)
    rows = [row for result in results for row in _rows(result, bases.get(result.run.source, {}), config)]
    return table_of(rows, STUDY)


def write_table(home: RunDir, table: pa.Table) -> None:
    """Write cells.parquet and cells.csv."""
    parquet, text = pa.BufferOutputStream(), io.BytesIO()
    pq.write_table(table, parquet, compression="zstd")
    csv.write_csv(table, text)
    (home.location / "cells.parquet").write(parquet.getvalue())
    (home.location / "cells.csv").write(text.getvalue())


def base_scores(results: Sequence[Result]) -> dict[str, dict[tuple[str, str], Scores]]:
    """Return by source what the base model scored answering directly: by benchmark and metric, by question."""
    return {
        result.run.source: {
            (series.benchmark, series.metric): by_id
            for series, by_id in result.scores.items()
            if (series.model, series.mode) == (BASE, DIRECT)
        }
        for result in results
        if result.run.variant == BASE
    }


def _rows(result: Result, base: Mapping[tuple[str, str], Scores], config: EvaluationConfig) -> list[dict[str, Any]]:
    run = result.run
    key = {"variant": run.variant, "size": run.size, "seed": run.seed, "source": run.source}
    state = {"status": result.status, "error": result.error}
    rows = []
    for series, by_id in sorted(result.scores.items(), key=lambda item: _order(item[0])):
        cost = result.costs[series.model]
        reference = base.get((series.benchmark, series.metric), {})
        paired = {} if (series.model, series.mode) == (BASE, DIRECT) else differences(by_id, reference)
        rows.append(
            {
                **key,
                "model": series.model,
                "mode": series.mode,
                "benchmark": series.benchmark,
                "metric": series.metric,
                "higher_is_better": result.higher_is_better.get((series.benchmark, series.metric), True),
                "num_questions": len(by_id),
                **columns(score_of([by_id], config, run.seed), "score", ""),
                **columns(score_of([paired], config, run.seed, DIFFERENCES), "difference", "difference_"),
                "num_pairs": cost.num_pairs,
                "core_hours": cost.core_hours,
                "gpu_hours": cost.gpu_hours,
                **state,
            }
        )
    return rows or [{**dict.fromkeys(STUDY.names), **key, **state}]


def _order(series: Series) -> tuple[str, str, str, str]:
    return series.benchmark, series.metric, series.model, series.mode
