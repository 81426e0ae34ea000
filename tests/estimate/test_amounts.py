"""How much each step has to do: what its settings leave of the pool, and what a training is given."""

from pathlib import Path
from typing import Any

import pytest

from stic_ray.core.config import RunConfig
from stic_ray.core.overrides import apply_values
from stic_ray.core.rundir import RunDir
from stic_ray.core.steps import Steps
from stic_ray.estimate.steps import estimate_run
from stic_ray.recipes import recipe, stic
from tests.estimate.runs import finished


def configured(name: str, settings: dict[str, Any]) -> RunConfig:
    """A recipe of the toy world, whose pool has 1,000 pictures."""
    return apply_values(recipe(name).config, settings)


def amounts(name: str, settings: dict[str, Any], run: RunDir | None = None) -> dict[str, float | None]:
    config = configured(name, settings)
    steps: Steps = recipe(name).steps(config)
    return {each.stage: each.num_images for each in estimate_run(config, steps, run, [step.name for step in steps])}


def test_every_step_that_draws_counts_its_first_images_and_its_share_of_them() -> None:
    drawn = {"rounds.image_share": 0.5}
    found = amounts("verified", {"candidates.num_images": 200, **drawn})
    per_image = 8 * 2  # candidates and scorers
    assert found["pool"] == 1000
    assert (found["candidates"], found["scores"], found["pairs"]) == (100, 100 * per_image, 100)
    assert amounts("demo", {"preferences.num_images": 200, **drawn})["preferences"] == 100
    assert amounts("self_questions", {"questions.num_images": 200, **drawn})["questions"] == 2 * 100
    assert amounts("vila2", {"captions.num_images": 200, **drawn})["captions_2"] == 100


def test_a_training_counts_the_rows_that_it_is_given() -> None:
    drawn = {"rounds.image_share": 0.5}
    assert amounts("demo", {"preferences.num_images": 200, **drawn})["dpo"] == 100
    assert amounts("demo", {"preferences.num_images": 200, "dpo.num_images": 50})["dpo"] == 50
    assert amounts("demo", {"dpo.num_images": 5000, "dpo.num_epochs": 3})["dpo"] == 3000
    assert amounts("demo", {"dpo.num_pairs": 70})["dpo"] == 70
    assert amounts("verified", {"candidates.num_images": 200, "dpo.num_epochs": 1, **drawn})["dpo"] == 100
    rows = {"rules.makes": "rows", "evaluation.models": ["base", "sft"]}
    assert amounts("verified", {"candidates.num_images": 200, **rows})["sft"] == 200
    assert amounts("self_questions", {"questions.num_images": 200})["sft"] == 2 * 200
    # A corpus has a row for every image, with the captions of the share that was drawn beside the original ones.
    found = amounts("vila2", {"captions.num_images": 200, **drawn})
    assert (found["corpus_2"], found["sft_2"]) == (200, 200)


def test_instruction_data_of_a_mix_is_trained_on_beside_a_corpus() -> None:
    found = amounts("vila2", {"sft.mix": {"corpus": 3, "infusion": 1}, "captions.num_images": 200})
    assert found["infusion"] and found["sft_2"] == 200 + found["infusion"]


def test_a_finished_step_says_what_the_training_behind_it_is_given(tmp_path: Path) -> None:
    config = configured("demo", {})
    run = finished(tmp_path, config, stic(config), preferences={"num_rows_in": 1000, "num_rows_written": 640})
    assert amounts("demo", {}, run)["dpo"] == 640


@pytest.mark.parametrize(
    ("name", "section"), [("verified", "candidates"), ("vila2", "captions"), ("demo", "preferences")]
)
def test_a_pool_of_unknown_size_has_what_is_asked_about(name: str, section: str) -> None:
    unknown = {"pool.source": "/data/images", "model.path": "someone/llava-7b"}
    some = amounts(name, {**unknown, f"{section}.num_images": 200})
    assert some["pool"] == 200
    nothing = amounts(name, unknown)
    assert nothing["pool"] is None and not [each for each in nothing if section in each and nothing[each]]
