"""What the cells say together: means over seeds, gains, fits and prices, and what cannot be said."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stic_ray.core.rundir import RunDir
from stic_ray.study.analysis import analyse
from stic_ray.study.plan import read_record
from stic_ray.study.results import read_results
from tests.study.made import made_study


def analysed(home: RunDir) -> dict[str, Any]:
    record = read_record(home)
    assert record is not None
    found = analyse(read_results(record, home), record.base.evaluation)
    json.dumps(found, allow_nan=False)
    return found


def curve_of(found: dict[str, Any], benchmark: str, model: str = "dpo", mode: str = "direct") -> dict[str, Any]:
    wanted = (benchmark, model, mode)
    return next(c for c in found["curves"] if (c["benchmark"], c["model"], c["mode"]) == wanted)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return analysed(made_study(tmp_path_factory.mktemp("analysis"), num_questions=100))


def test_points_are_means_over_seeds_with_spread_and_interval(found: dict[str, Any]) -> None:
    curve = curve_of(found, "toy")
    assert [point["size"] for point in curve["points"]] == [250, 1000, 4000, 16000]
    for point in curve["points"]:
        assert point["seeds"] == [0, 1] and 0 < point["spread"] < 0.01
        assert point["low"] < point["score"] < point["high"]
        assert point["difference"] == pytest.approx(0.3 - 1.2 * point["size"] ** -0.3, abs=0.01)
        assert point["difference_low"] < point["difference"] < point["difference_high"]


@pytest.mark.parametrize("benchmark", ["toy", "described"])
def test_the_fit_follows_the_truth_in_both_directions(benchmark: str, found: dict[str, Any]) -> None:
    curve, sign = curve_of(found, benchmark), 1 if benchmark == "toy" else -1
    fit = curve["fit"]
    assert curve["higher_is_better"] == (benchmark == "toy") and fit["reason"] is None
    assert fit["limit_low"] <= fit["limit"] <= fit["limit_high"]
    assert fit["limit"] == pytest.approx(0.5 + sign * 0.3, abs=0.03)
    assert fit["exponent"] == pytest.approx(0.3, abs=0.06) and fit["resampled"] == "questions and seeds"
    now = curve["points"][-1]["score"]
    then = fit["limit"] - sign * fit["factor"] * (16000 + fit["further_images"]) ** -fit["exponent"]
    assert sign * (then - now) == pytest.approx(0.01, abs=0.002)
    assert fit["further_low"] <= fit["further_images"] <= fit["further_high"]
    line = fit["line"]
    assert np.all(np.array(line["low"]) <= np.array(line["scores"]) + 1e-9)
    assert np.all(np.array(line["scores"]) <= np.array(line["high"]) + 1e-9)


@pytest.mark.parametrize("benchmark", ["toy", "described"])
def test_a_point_has_a_price_where_something_is_gained(benchmark: str, found: dict[str, Any]) -> None:
    for point in curve_of(found, benchmark)["points"]:
        price = point["hours_per_point"]
        assert point["hours_are"] == "GPU-hours"
        assert price["value"] == pytest.approx(point["gpu_hours"] * 0.01 / abs(point["difference"]))
        assert price["low"] < price["value"] < price["high"]


def test_base_is_one_row_for_each_measure(found: dict[str, Any]) -> None:
    assert {(row["benchmark"], row["metric"]) for row in found["base"]} == {
        ("toy", "exact_match"),
        ("described", "hallucinated_share"),
    }
    assert all(row["low"] < row["score"] < row["high"] for row in found["base"])


def test_few_sizes_give_points_and_a_reason(tmp_path: Path) -> None:
    found = analysed(made_study(tmp_path, sizes=(10, 20), seeds=(3,)))
    curve = curve_of(found, "toy", "sft")
    assert len(curve["points"]) == 2 and curve["points"][0]["spread"] is None
    assert "at least 4 sizes with scores, there are 2" in curve["fit"]["reason"]


def test_a_study_that_gains_nothing_says_so(tmp_path: Path) -> None:
    found = analysed(made_study(tmp_path, truth=lambda benchmark, model, mode, size: 0.5 - 0.1 * (model != "base")))
    curve = curve_of(found, "toy")
    assert curve["points"][-1]["hours_per_point"] == {"value": None, "low": None, "high": None}
    assert curve["fit"]["reason"] is None and curve["fit"]["share_never"] > 0.5
    assert curve_of(found, "described")["points"][0]["hours_per_point"]["value"] is not None, "fewer mistakes"


def test_scores_that_are_all_the_same_are_a_constant(tmp_path: Path) -> None:
    found = analysed(made_study(tmp_path, truth=lambda benchmark, model, mode, size: 5.0))
    fit = curve_of(found, "toy")["fit"]
    assert (fit["limit"], fit["exponent"], fit["further_images"]) == (1.0, None, None)
    assert fit["note"] == "no growth: the best curve is a constant" and fit["share_never"] == 1.0


def test_a_study_without_any_cell_has_no_curves(tmp_path: Path) -> None:
    failed = {"default-n5-seed0": ("failed", "why")}
    assert analysed(made_study(tmp_path, sizes=(5,), seeds=(0,), outcomes=failed))["curves"] == []
