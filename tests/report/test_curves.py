"""Training curves: gaps, resumed and killed trainings, many steps."""

import json
import math
from pathlib import Path
from typing import Any

from stic_ray.core.rundir import RunDir
from stic_ray.report.collect import MAX_POINTS, read_curves
from stic_ray.report.plots import training_plot
from tests.report.builders import write_lines


def test_missing_metric_is_a_gap_and_not_a_zero(tmp_path: Path) -> None:
    lines: list[dict[str, Any]]
    lines = [{"step": step, "loss": 1.0 + step, "rewards/margins": 0.5} for step in range(1, 10)]
    del lines[3]["loss"]
    lines[6]["loss"] = math.nan
    lines[8]["loss"] = None
    write_lines(RunDir.of(str(tmp_path)) / "dpo", lines)
    curves = read_curves(RunDir.of(str(tmp_path)) / "dpo")
    assert curves is not None
    assert curves["metrics"]["loss"] == [2.0, 3.0, 4.0, None, 6.0, 7.0, None, 9.0, None]
    assert curves["num_missing"] == {"loss": 3, "rewards/margins": 0}
    svg = training_plot("dpo", "Loss", curves)
    assert svg is not None and "6 points, 3 missing" in svg
    line = svg.partition('id="dpo-loss-loss"')[2].partition("</g>")[0]
    assert (line.count("M "), line.count("L ")) == (3, 3)  # steps 1 to 3, 5 to 6, and 8 alone
    assert training_plot("dpo", "Gradient norm", curves) is None


def test_evaluations_are_joined_over_the_steps_between_them(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [{"step": step, "loss": 1.0 + step} for step in range(1, 10)]
    lines[2]["eval_loss"], lines[8]["eval_loss"] = 4.5, 9.5
    write_lines(RunDir.of(str(tmp_path)) / "dpo", lines)
    curves = read_curves(RunDir.of(str(tmp_path)) / "dpo")
    assert curves is not None
    svg = training_plot("dpo", "Loss", curves)
    assert svg is not None and "held out: first 4.5, last 9.5, 2 points." in svg
    line = svg.partition('id="dpo-loss-eval_loss"')[2].partition("</g>")[0]
    assert (line.count("M "), line.count("L ")) == (1, 1)


def test_metrics_of_a_resumed_and_killed_training(tmp_path: Path) -> None:
    stage = RunDir.of(str(tmp_path))
    text = "".join(json.dumps({"step": s, "loss": v}) + "\n" for s, v in [(1, 9.0), (2, 8.0), (2, 5.0), (1, 7.0)])
    stage.write_text("metrics.jsonl", text + '{"train_runtime": 3}\n{"step": 3, "lo')
    curves = read_curves(stage)
    assert curves is not None
    assert curves["steps"] == [1, 2] and curves["metrics"] == {"loss": [7.0, 5.0]}
    assert (curves["num_resumes"], curves["num_skipped_lines"]) == (1, 2)


def test_long_trainings_are_averaged_to_a_bounded_number_of_points(tmp_path: Path) -> None:
    stage = RunDir.of(str(tmp_path))
    write_lines(stage, [{"step": step, "loss": float(step)} for step in range(1, 1001)])
    curves = read_curves(stage)
    assert curves is not None
    assert curves["steps_per_point"] == 3 and len(curves["steps"]) == 334 <= MAX_POINTS
    assert curves["steps"][:2] == [3, 6] and curves["metrics"]["loss"][:2] == [2.0, 5.0]
    assert curves["steps"][-1] == 1000 and curves["metrics"]["loss"][-1] == 1000.0
