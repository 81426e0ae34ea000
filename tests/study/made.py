"""Studies made by hand: folders as runs leave them, with real Parquet, and scores that follow known curves."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stic_ray.core.config import RunConfig
from stic_ray.core.overrides import apply_values
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import PREDICTIONS, table_of
from stic_ray.recipes import demo
from stic_ray.study.plan import Study, plan_study, write_record

HIGHER = {"toy": ("exact_match", True), "described": ("hallucinated_share", False)}
"""Benchmark -> metric and direction."""
MODES = ("direct", "describe_and_respond")

Truth = Callable[[str, str, str, int], float]
"""Expected score of (benchmark, model, mode, size)."""


def linear_truth(benchmark: str, model: str, mode: str, size: int) -> float:
    """Base 0.4; models gain with the size, described mistakes fall."""
    gain = 0.0 if model == "base" else 0.3 - 1.2 * size**-0.3
    sign = 1 if HIGHER[benchmark][1] else -1
    return min(
        1.0, max(0.0, 0.5 + sign * (gain + (0.05 if model == "sft" else 0.0) + (0.02 if mode != "direct" else 0)))
    )


def made_study(
    folder: Path,
    *,
    sizes: Sequence[int] = (250, 1000, 4000, 16000),
    seeds: Sequence[int] = (0, 1),
    variants: Mapping[str, Mapping[str, Any]] | None = None,
    num_questions: int = 40,
    truth: Truth = linear_truth,
    outcomes: Mapping[str, tuple[str, str | None]] | None = None,
) -> RunDir:
    """Write a whole study; the cells in `outcomes` ended with this status and error instead of scores."""
    home = RunDir.of(str(folder / "study"))
    base = apply_values(demo().config, {"evaluation.num_resamples": 200, "workers.num_gpus": 1})
    study: Study = plan_study(base, home.uri, sizes, seeds, variants or {"default": {}})
    write_record(home, study, {"recipe": "demo", "overrides": []}, None)
    for source in study.sources:
        run = home / source.folder
        _settings(run, study.configs[source])
        _manifest(run / "pool", 10.0, max(sizes))
        _manifest(run / "preferences", 3600.0, max(sizes))
        _evaluation(run, ("base",), 0, source.seed, num_questions, truth)
    for cell in study.cells:
        run = home / cell.folder
        _settings(run, study.configs[cell])
        if outcomes and cell.name in outcomes:
            status, error = outcomes[cell.name]
            run.write_json("outcome.json", {"status": status, "error": error})
            continue
        for stage, seconds in {"dpo": 360.0, "infusion": 36.0, "sft": 720.0}.items():
            _manifest(run / stage, seconds, cell.size - 1)
        _evaluation(run, study.configs[cell].evaluation.models, cell.size, cell.seed, num_questions, truth)
        run.write_text("report.html", "page")
    return home


def _settings(run: RunDir, config: RunConfig) -> None:
    run.write_text("settings.yaml", yaml.safe_dump(config.model_dump(mode="json")))


def _manifest(stage: RunDir, seconds: float, num_rows: int) -> None:
    """Two processes of one CPU each; those that train have a GPU."""
    hours, has_gpu = 2 * seconds / 3600, stage.location.name in ("dpo", "sft")
    reserved = {"core_hours": hours, "gpu_hours": hours if has_gpu else 0.0}
    stage.write_manifest({"seconds": seconds, **reserved, "num_rows_in": num_rows, "num_rows_written": num_rows})


def _evaluation(run: RunDir, models: Sequence[str], size: int, seed: int, num_questions: int, truth: Truth) -> None:
    """Questions differ in how hard they are, the same way for every model, so that pairing tightens differences."""
    output = run / "evaluation"
    for model in models:
        rows = []
        for benchmark, (metric, _) in HIGHER.items():
            hardness = np.random.default_rng(5).normal(scale=0.1, size=num_questions)
            for mode in MODES:
                noise = np.random.default_rng([size, seed, len(mode), len(model)]).normal(
                    scale=0.01, size=num_questions
                )
                scores = np.clip(truth(benchmark, model, mode, size) + hardness + noise, 0, 1)
                rows += [_row(benchmark, metric, model, mode, i, float(score)) for i, score in enumerate(scores)]
        output.write_shard(f"predictions-{model}", 0, table_of(rows, PREDICTIONS), PREDICTIONS)
    scores = [{"benchmark": b, "metric": metric, "higher_is_better": higher} for b, (metric, higher) in HIGHER.items()]
    output.write_json("scores.json", scores)
    _manifest(output, 60.0, len(models))


def _row(benchmark: str, metric: str, model: str, mode: str, number: int, score: float) -> dict[str, Any]:
    words = dict.fromkeys(("prompt", "description", "response", "prediction", "finish_reason"), "x")
    key = {"benchmark": benchmark, "id": f"q{number}", "model": model, "mode": mode, "metric": metric}
    return {**words, **key, "answers": ["x"], "score": score}
