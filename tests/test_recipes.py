"""Recipe `verified`: its steps follow from the settings; and the settings files of papers."""

from pathlib import Path

import pytest

from stic_ray.cli import parser, read_config
from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError
from stic_ray.core.overrides import apply_overrides
from stic_ray.core.steps import Step, check_steps
from stic_ray.pipeline import names_of
from stic_ray.recipes import verified

SETTINGS = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
TRAINS_FIRST = ("scores.scorers=implicit_reward", "rules.scorers=implicit_reward", "evaluation.models=[base,dpo_2]")


def planned(*overrides: str) -> dict[str, Step]:
    """The steps that a run makes, by name."""
    recipe = verified()
    config = apply_overrides(recipe.config, overrides)
    steps = recipe.steps(config)
    check_steps(steps)
    return {step.name: step for step in steps if step.name in names_of(steps)}


def test_candidates_are_scored_ruled_over_and_learnt_from() -> None:
    steps = planned()
    assert list(steps) == ["pool", "candidates", "scores", "pairs", "dpo", "evaluation"]
    assert steps["pairs"].inputs == {"index": "pool", "candidates": "candidates", "scores": "scores"}
    assert steps["dpo"].inputs == {"pairs": "pairs"}


def test_rows_are_learnt_by_sft() -> None:
    steps = planned("rules.makes=rows", "evaluation.models=[base,sft]")
    assert list(steps) == ["pool", "candidates", "scores", "pairs", "sft", "evaluation"]
    assert steps["sft"].inputs == {"rows": "pairs"} and steps["pairs"].stage.writes == "rows-*.parquet"


def test_a_reward_needs_a_training_before_it() -> None:
    steps = planned(*TRAINS_FIRST)
    names = ["pool", "preferences", "dpo", "candidates", "scores", "pairs", "dpo_2", "evaluation"]
    assert list(steps) == names
    assert (
        steps["candidates"].inputs["model"]
        == steps["scores"].inputs["model"]
        == steps["dpo_2"].inputs["model"]
        == "dpo"
    )
    assert "reference" not in steps["scores"].inputs, "which is the base then"
    named = planned(*TRAINS_FIRST[:2], "scores.model=runs/a/dpo/checkpoint")
    assert list(named) == ["pool", "candidates", "scores", "pairs", "dpo", "evaluation"]


def test_without_scorers_there_is_no_step_for_them() -> None:
    random = ("rules.scorers={}", "rules.pairing=random")
    assert list(planned(*random)) == ["pool", "candidates", "pairs", "dpo", "evaluation"]


def test_pairs_of_another_run_take_the_place_of_all_before() -> None:
    steps = planned("dpo.pairs=/runs/a/pairs")
    assert list(steps) == ["dpo", "evaluation"] and steps["dpo"].inputs == {"pairs": "/runs/a/pairs"}


def test_a_rule_about_a_score_that_nothing_gives_is_refused() -> None:
    with pytest.raises(ConfigError, match="rules.scorers names claims, and scores.scorers gives length"):
        planned("scores.scorers=length", "rules.scorers=claims")
    own = ("scores.scorers=my_package.module:neat", "rules.scorers=neat")
    assert "scores" in planned(*own)


def settings_of(file: Path) -> tuple[RunConfig, tuple[Step, ...]]:
    config, recipe, *_ = read_config(parser(None).parse_args(["--config", str(file)]))
    return config, recipe.steps(config)


@pytest.mark.parametrize("file", SETTINGS, ids=lambda file: file.stem)
def test_settings_of_a_paper_say_which_and_what_differs(file: Path) -> None:
    lines = file.read_text().splitlines()
    assert len(lines) <= 20 and "(arXiv 2" in lines[0]
    assert lines[0].startswith("# ") and lines[1].startswith("# Differs: ") and not lines[2].startswith("#")
    config, steps = settings_of(file)
    check_steps(steps)
    assert config.name == file.stem
    made = [step for step in steps if step.name in names_of(steps)]
    assert made[-1].name == "evaluation" and len(made) >= 4
    assert set(config.evaluation.models) <= {"base", *(step.name for step in made)}
