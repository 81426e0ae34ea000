"""Scores, intervals and the headline."""

import math
from pathlib import Path

import pytest

from stic_ray.method.scoring import METRICS
from stic_ray.report.collect import collect
from stic_ray.report.formats import label
from stic_ray.report.scores import verdict
from stic_ray.report.write import render
from tests.report.builders import Page, new_run, scores, scores_of, with_scores


def test_score_table_shows_scores_intervals_and_differences(page: Page) -> None:
    assert "40.0% 34.0 to 46.0 reference" in page.text
    assert "47.0% 41.0 to 53.0 +7.0 points +1.0 to +13.0" in page.text
    labels = [a["aria-label"] for a in page.all("svg") if a["aria-label"].startswith("Scores on")]
    assert len(labels) == 2
    assert "base direct 40.0; " in labels[0] and "sft describe and respond 52.0" in labels[0]


def test_scores_of_an_unfinished_evaluation_are_no_headline(tmp_path: Path) -> None:
    run = new_run(tmp_path)
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


MANY = [
    *scores_of("toy_choice", "multiple_choice"),
    *scores_of("toy_short", "exact_match", gain=0.01),
    *scores_of("photos", "object_f1", gain=-0.01),
    *scores_of("photos", "hallucinated_share", gain=-0.1),
    *scores_of("photos", "any_hallucination", gain=0.07),
    *scores_of("presence", "yes_no", gain=0.08),
    *scores_of("few", "hallucinated_share", gain=-0.005),
    *scores_of("charts", "relaxed_number", gain=0.0),
]
"""Eight tables; the best change is 20 points fewer hallucinated objects."""


def test_a_lower_score_is_a_gain_where_lower_is_better(tmp_path: Path) -> None:
    report = with_scores(tmp_path, MANY)
    assert report["headline"]["sentence"] == (
        "\u221220.0 points (lower is better) on photos: hallucinated objects with sft, direct "
        "(interval \u221226.0 to \u221214.0), the best of 32 changes against the base model answering directly. "
        "The interval is of this change alone: it is not corrected for being the best of several."
    )
    assert (report["headline"]["best"]["metric"], report["headline"]["best"]["mode"]) == (
        "hallucinated_share",
        "direct",
    )
    text = render(report)
    assert '<span class="gain">\u221220.0 points</span>' in text
    assert '<span class="loss">+14.0 points</span>' in text and '<span class="gain">+14.0 points</span>' not in text
    assert '<span class="gain">+16.0 points</span>' in text


def test_only_more_hallucinations_are_no_gain(tmp_path: Path) -> None:
    sentence = with_scores(tmp_path, scores_of("photos", "any_hallucination", gain=0.1))["headline"]["sentence"]
    assert sentence.startswith("No gain: +10.0 points (lower is better) on photos with dpo, direct")


@pytest.mark.parametrize(
    ("low", "high", "higher_is_better", "expected"),
    [
        (0.1, 0.2, True, "gain"),
        (0.1, 0.2, False, "loss"),
        (-0.2, -0.1, True, "loss"),
        (-0.2, -0.1, False, "gain"),
        (-0.1, 0.1, True, ""),
        (-0.1, 0.1, False, ""),
        (0.0, 0.1, True, ""),
        (-0.1, 0.0, False, ""),
        (None, None, False, ""),
        (None, -0.1, False, "gain"),
    ],
)
def test_verdict(low: float | None, high: float | None, higher_is_better: bool, expected: str) -> None:
    cell = {"difference_low": low, "difference_high": high, "higher_is_better": higher_is_better}
    assert verdict(cell) == expected


def test_metrics_are_named_where_a_benchmark_has_several(tmp_path: Path) -> None:
    report = with_scores(tmp_path, MANY)
    assert [each["title"] for each in report["scores"]["benchmarks"]] == [
        "toy_choice",
        "toy_short",
        "photos: object F1",
        "photos: hallucinated objects",
        "photos: descriptions with a hallucination",
        "presence",
        "few",
        "charts",
    ]
    page = Page(render(report))
    assert "240 questions, scored by yes or no." in page.text
    assert page.text.count("lower is better") == 1 + 3 * 3, "headline; overview, title and plot of each"
    labels = [a["aria-label"] for a in page.all("svg") if a["aria-label"].startswith("Scores on")]
    assert [each.partition(", in percent")[0] for each in labels if "lower is better" in each] == [
        "Scores on photos: hallucinated objects",
        "Scores on photos: descriptions with a hallucination",
        "Scores on few",
    ]


def test_overview_has_every_score_in_one_table(tmp_path: Path) -> None:
    rows = [row for row in MANY if (row["benchmark"], row["model"]) != ("presence", "dpo")]
    page = Page(render(with_scores(tmp_path, [*rows, {**MANY[0], "model": "checkpoint"}])))
    start, end = page.text.index("All scores, %"), page.text.index("Better and worse")
    shown = page.text[start:end].replace("lower is better ", "")
    assert shown.startswith(
        "All scores, % base dpo sft checkpoint " + "direct describe and respond " * 3 + "direct toy"
    )
    assert "toy_choice 40.0 42.0 45.0 47.0 50.0 52.0 40.0 toy_short" in shown
    assert "presence 40.0 42.0 \u2013 \u2013 56.0 58.0 \u2013 few" in shown
    assert len(page.all("table", **{"class": "overview"})) == 1


def test_one_table_needs_no_overview(tmp_path: Path) -> None:
    assert "All scores" not in render(with_scores(tmp_path, scores_of("photos", "object_f1")))


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_has_words(metric: str) -> None:
    assert "_" not in label(metric)
