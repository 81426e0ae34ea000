"""The steps of a run in rounds."""

from typing import Any

import pytest

from stic_ray.core.errors import ConfigError
from stic_ray.core.overrides import apply_values
from stic_ray.core.steps import Step, check_given, check_steps, identity
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
        assert dict(steps["captions"].inputs) == {"index": "pool"}
        assert [steps[f"captions_{n}"].inputs["model"] for n in (2, 3)] == ["sft", "sft_2"]
        assert [*steps["corpus_3"].inputs.values()] == ["pool", "captions", "captions_2", "captions_3"]
    assert [steps["sft_2"].inputs.get("model") for steps in (again, on)] == [None, "sft"]
    seeds = {again[name].settings.get("seed") for name in ("captions", "captions_2", "captions_3")}
    assert len(seeds) == 3 and again["sft_2"].settings["seed"] == again["captions_2"].settings["seed"]


def test_preference_rounds_score_with_the_model_that_answers() -> None:
    steps = steps_of("verified", num=2, restart="previous")
    assert dict(steps["scores_2"].inputs) == {"index": "pool", "candidates": "candidates_2", "model": "dpo"}
    assert dict(steps["dpo_2"].inputs) == {"pairs": "pairs_2", "model": "dpo"}


def test_the_base_model_is_scored_once_and_each_round_behind_a_verdict_hangs_on_it() -> None:
    steps = steps_of("vila2", num=3, stop_metric=METRIC)
    scored = {name: step for name, step in steps.items() if step.stage is EVALUATION}
    assert [step.settings.get("evaluation.models") for step in scored.values()] == [None, ["sft_2"], ["sft_3"]]
    assert [step.inputs.get("earlier") for step in scored.values()] == [None, "evaluation", "evaluation"]
    verdicts = {name: dict(step.inputs) for name, step in steps.items() if step.stage is VERDICT_STAGE}
    assert verdicts == {
        "verdict": {"base": "evaluation", "sft": "evaluation"},
        "verdict_2": {"sft": "evaluation", "sft_2": "evaluation_2"},
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
    assert hang_on["verdict_2"] == hang_on["sft_2"] == "verdict" and hang_on["verdict"] == ""


def test_a_run_of_one_round_is_the_beginning_of_one_of_several() -> None:
    """Its finished steps are taken as they are, as nothing that they depend on is another."""
    for name in ("vila2", "verified"):
        own = recipe(name)
        one, three = (apply_values(own.config, {"rounds.num": num}) for num in (1, 3))
        more = {step.name: step for step in own.steps(three)}
        for step in own.steps(one):
            assert identity(step, one) == identity(more[step.name], three), step.name
            assert step.inputs == more[step.name].inputs


def test_specialists_come_behind_the_last_round_that_was_made() -> None:
    task = {"source": "toyworld", "questions": ["How many?"]}
    steps = steps_of("vila2", num=2, specialists={"counts": task}, stop_metric=METRIC)
    assert dict(steps["specialist_counts"].inputs) == {"rows": "task_counts", "model": "sft_2|sft"}
    assert steps["answers_counts"].settings["captions.kind"] == "specialist:counts"
    assert {"captions", "captions_2", "answers_counts"} < {*steps["corpus_specialists"].inputs.values()}
    assert not any(step.only_after for name, step in steps.items() if "counts" in name or "specialists" in name)


def test_a_specialist_reads_its_own_source_and_that_is_what_its_identity_names() -> None:
    own = recipe("vila2")
    for source, is_toy in (("toyworld", True), ("/data/x.json", False)):
        settings = {"rounds.specialists": {"counts": {"source": source, "questions": ["How many?"]}}}
        other = "/data/other.json" if is_toy else "toyworld"
        config = apply_values(own.config, {**settings, "infusion.source": other})
        task = next(step for step in own.steps(config) if step.name == "task_counts")
        assert ("toyworld.num_instructions" in identity(task, config)) is is_toy
    config = apply_values(own.config, {**settings, "infusion.source": "???", "model.path": "x"})
    check_given(config, own.steps(config), ["task_counts"])


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in ("verified", "vila2")])
def test_a_recipe_without_rounds_refuses_them(name: str) -> None:
    for rounds in ({"num": 2}, {"restart": "previous"}):
        with pytest.raises(ConfigError, match="has one round"):
            steps_of(name, **rounds)
    with pytest.raises(ConfigError, match="trained by recipe vila2"):
        steps_of(name, specialists={"counts": {"source": "x", "questions": ["How many?"]}})


def test_settings_of_rounds_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="give benchmark and metric"):
        steps_of("vila2", num=2, stop_metric="object_f1")
    with pytest.raises(ConfigError, match="needs rounds.num"):
        steps_of("vila2", num=1, stop_metric=METRIC)


@pytest.mark.parametrize(
    ("name", "settings", "problem"),
    [
        ("vila2", {"rounds.stop_metric": METRIC, "evaluation.models": ["sft"]}, "first round with the base model"),
        ("vila2", {"evaluation.models": ["base", "typo"]}, "names 'typo'"),
        ("vila2", {"sft.mix": {"corpus": 3, "infusion": 1}, "pool.source": "/pictures"}, "set your own"),
        ("verified", {"rounds.num": 2, "dpo.pairs": "/x"}, "the same in every round"),
        (
            "verified",
            {"rounds.num": 2, "scores.scorers": ["implicit_reward"], "rules.scorers": ["implicit_reward"]},
            "name one with scores.model",
        ),
    ],
)
def test_what_rounds_cannot_do_is_refused(name: str, settings: dict[str, Any], problem: str) -> None:
    own = recipe(name)
    with pytest.raises(ConfigError, match=problem):
        own.steps(apply_values(own.config, settings))
