"""Scores, intervals and the headline."""

import math
from pathlib import Path

from stic_ray.core.rundir import RunDir
from stic_ray.report.collect import collect
from stic_ray.report.write import render
from tests.report.builders import Page, scores, with_scores


def test_score_table_shows_scores_intervals_and_differences(page: Page) -> None:
    assert "40.0% 34.0 to 46.0 reference" in page.text
    assert "47.0% 41.0 to 53.0 +7.0 points +1.0 to +13.0" in page.text
    labels = [a["aria-label"] for a in page.all("svg") if a["aria-label"].startswith("Scores on")]
    assert len(labels) == 2
    assert "base direct 40.0; " in labels[0] and "sft describe and respond 52.0" in labels[0]


def test_scores_of_an_unfinished_evaluation_are_no_headline(tmp_path: Path) -> None:
    run = RunDir.of(str(tmp_path))
    (run / "evaluation").write_json("scores.json", scores())
    report = collect(run)
    assert report["headline"]["best"] is None
    assert report["headline"]["sentence"] == "Not evaluated (evaluation not finished)."
    assert len(report["scores"]["benchmarks"]) == 2


def test_headline_admits_that_nothing_was_gained(tmp_path: Path) -> None:
    base, trained = scores()[0], scores()[2]
    worse = {**trained, "difference": -0.03, "difference_low": -0.08, "difference_high": 0.02}
    sentence = with_scores(tmp_path, [base, worse])["headline"]["sentence"]
    assert sentence == (
        "No gain: \u22123.0 points on toyworld with dpo, direct (interval \u22128.0 to +2.0), "
        "the only change against the base model answering directly. The interval includes zero."
    )


def test_intervals_without_bounds_are_not_known(tmp_path: Path) -> None:
    rows = [{**row, "low": -math.inf, "high": math.inf, "difference_low": math.nan} for row in scores()[:4]]
    report = with_scores(tmp_path, rows)
    assert "(interval not known)" in report["headline"]["sentence"]
    text = Page(render(report)).text
    assert "40.0% interval not known reference" in text
    assert "+5.0 points interval not known" in text and "nan" not in text.lower() and "inf " not in text


def test_models_and_benchmarks_of_any_name_are_drawn(tmp_path: Path) -> None:
    names = ["$\\frac{$", "模型 <二>", "x" * 200, "line\nbreak\x00"]
    rows = [{**scores()[0], "model": name, "benchmark": name, "mode": name} for name in names]
    report = with_scores(tmp_path, rows)
    page = Page(render(report))
    assert len([a for a in page.all("svg") if a["aria-label"].startswith("Scores on")]) == 4
    assert report["headline"]["sentence"] == "No trained model was compared with the base model."
