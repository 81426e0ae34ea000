"""The steps of a run in rounds."""

from typing import Any

import pytest

from stic_ray.core.errors import ConfigError
from stic_ray.core.overrides import apply_values
from stic_ray.core.steps import Step, check_steps
from stic_ray.recipes import RECIPES, recipe
from stic_ray.stages.evaluation import EVALUATION
from stic_ray.stages.verdict import VERDICT_STAGE

METRIC = "toy_describe object_f1"


def steps_of(name: str, **rounds: Any) -> dict[str, Step]:
    own = recipe(name)
    steps = own.steps(apply_values(own.config, {f"rounds.{key}": value for key, value in rounds.items()}))
    check_steps(steps)
    return {step.name: step for step in steps}


def test_a_run_of_one_round_has_the_names_and_the_seed_of_a_run_without_rounds() -> None:
    assert [*steps_of("vila2", num=1)] == ["pool", "captions", "corpus", "sft", "evaluation"]
    assert [*steps_of("verified", num=1)] == ["pool", "candidates", "scores", "pairs", "dpo", "evaluation"]
    assert not any("seed" in step.settings for name in ("vila2", "verified") for step in steps_of(name, num=1).values())


def test_each_round_asks_the_model_of_the_round_before_and_trains_the_base_or_that_model() -> None:
    again, on = (steps_of("vila2", num=3, restart=start) for start in ("base", "previous"))
    for steps in (again, on):
        assert dict(steps["captions_1"].inputs) == {"index": "pool"}
        assert [steps[f"captions_{n}"].inputs["model"] for n in (2, 3)] == ["sft_1", "sft_2"]
        assert [*steps["corpus_3"].inputs.values()] == ["pool", "captions_1", "captions_2", "captions_3"]
    assert [steps["sft_2"].inputs.get("model") for steps in (again, on)] == [None, "sft_1"]
    seeds = {again[f"captions_{n}"].settings.get("seed") for n in (1, 2, 3)}
    assert len(seeds) == 3 and again["sft_2"].settings["seed"] == again["captions_2"].settings["seed"]


def test_preference_rounds_score_with_the_model_that_answers() -> None:
    steps = steps_of("verified", num=2, restart="previous")
    assert dict(steps["scores_2"].inputs) == {"index": "pool", "candidates": "candidates_2", "model": "dpo_1"}
    assert dict(steps["dpo_2"].inputs) == {"pairs": "pairs_2", "model": "dpo_1"}


def test_the_base_model_is_scored_once_and_each_round_behind_a_verdict_hangs_on_it() -> None:
    steps = steps_of("vila2", num=3, stop_metric=METRIC)
    scored = {name: step for name, step in steps.items() if step.stage is EVALUATION}
    assert [step.settings["evaluation.models"] for step in scored.values()] == [["base", "sft_1"], ["sft_2"], ["sft_3"]]
    assert [step.inputs.get("earlier") for step in scored.values()] == [None, "evaluation_1", "evaluation_1"]
    verdicts = {name: dict(step.inputs) for name, step in steps.items() if step.stage is VERDICT_STAGE}
    assert verdicts == {
        "verdict_1": {"base": "evaluation_1", "sft_1": "evaluation_1"},
        "verdict_2": {"sft_1": "evaluation_1", "sft_2": "evaluation_2"},
        "verdict_3": {"sft_2": "evaluation_2", "sft_3": "evaluation_3"},
    }, "that of the last round is for the reader"
    hang_on = {name: step.only_after for name, step in steps.items()}
    assert {name for name, verdict in hang_on.items() if verdict == "verdict_2"} == {
        "captions_3",
        "corpus_3",
        "sft_3",
        "evaluation_3",
        "verdict_3",
    }
    assert hang_on["verdict_2"] == hang_on["sft_2"] == "verdict_1" and hang_on["verdict_1"] == ""


def test_without_scores_of_the_base_model_the_first_verdict_is_of_the_second_round() -> None:
    own = recipe("vila2")
    config = apply_values(own.config, {"evaluation.models": ["sft"], "rounds.num": 3, "rounds.stop_metric": METRIC})
    names = [step.name for step in own.steps(config)]
    assert "verdict_1" not in names and "verdict_2" in names


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("verified", "vila2")])
def test_a_recipe_without_rounds_refuses_them(name: str) -> None:
    with pytest.raises(ConfigError, match="verified and vila2 have several"):
        steps_of(name, num=2)


def test_settings_of_rounds_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="give benchmark and metric"):
        steps_of("vila2", num=2, stop_metric="object_f1")
    with pytest.raises(ConfigError, match="needs rounds.num"):
        steps_of("vila2", num=1, stop_metric=METRIC)
