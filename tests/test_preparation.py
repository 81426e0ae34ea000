"""Where `toyworld` in a configuration leads, and what is made there."""

from pathlib import Path

import pytest

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError, SourceError
from stic_ray.core.overrides import apply_values
from stic_ray.core.rundir import RunDir
from stic_ray.preparation import resolve
from stic_ray.recipes import demo
from stic_ray.toyworld import WEIGHTS
from stic_ray.toyworld.assets import BENCHMARKS, make_toyworld
from stic_ray.toyworld.language import PROMPTS_FILE

SMALL = {"toyworld.num_pictures": 3, "toyworld.num_instructions": 2, "toyworld.num_scenes": 2}


def config(**settings: object) -> RunConfig:
    return apply_values(demo().config, {**SMALL, **{key.replace("__", "."): value for key, value in settings.items()}})


def test_toyworld_is_a_place_for_each_stage_and_the_shipped_model(tmp_path: Path) -> None:
    resolved = resolve(config(seed=7), RunDir.of(str(tmp_path)))
    assert resolved.pool.source == f"{tmp_path}/toyworld/pictures-seed7-3"
    assert resolved.infusion.source == f"{tmp_path}/toyworld/instructions-seed7-2/instructions.json"
    folder = f"{tmp_path}/toyworld/benchmarks-test-2"
    assert resolved.evaluation.benchmarks == tuple(f"{folder}/{name}.jsonl" for name in BENCHMARKS)
    assert resolved.model.path == str(WEIGHTS)


def test_the_toy_prompts_come_with_the_toy_model_unless_others_are_given(tmp_path: Path) -> None:
    run = RunDir.of(str(tmp_path))
    assert resolve(config(), run).prompts == str(PROMPTS_FILE)
    assert resolve(config(model__path="some/model"), run).prompts is None
    assert resolve(config(prompts="mine.yaml"), run).prompts == "mine.yaml"


def test_one_benchmark_can_be_named_beside_files(tmp_path: Path) -> None:
    asked = config(evaluation__benchmarks=["toyworld:toy_questions", "mine.jsonl"])
    found = resolve(asked, RunDir.of(str(tmp_path))).evaluation.benchmarks
    assert found == (f"{tmp_path}/toyworld/benchmarks-test-2/toy_questions.jsonl", "mine.jsonl")
    with pytest.raises(ConfigError, match="no 'toyworld:toy_describ'. Did you mean 'toy_describe'?"):
        resolve(config(evaluation__benchmarks=["toyworld:toy_describ"]), RunDir.of(str(tmp_path)))


def test_only_what_the_stages_read_is_made(tmp_path: Path) -> None:
    run = RunDir.of(str(tmp_path))
    make_toyworld([], config(), run)
    assert not list(tmp_path.iterdir())
    make_toyworld(["evaluation.benchmarks"], config(evaluation__benchmarks=["toyworld:toy_questions"]), run)
    assert [path.name for path in (tmp_path / "toyworld").iterdir()] == ["benchmarks-test-2"]
    make_toyworld(["pool.source", "infusion.source"], config(pool__source="photos"), run)
    assert sorted(path.name for path in (tmp_path / "toyworld").iterdir()) == [
        "benchmarks-test-2",
        "instructions-seed0-2",
    ]
    make_toyworld(["pool.source"], config(), run)
    assert len(list((tmp_path / "toyworld" / "pictures-seed0-3").rglob("*.jpg"))) == 3


def test_a_run_in_an_object_store_cannot_hold_the_toy_world() -> None:
    with pytest.raises(SourceError, match="local --run"):
        make_toyworld(["pool.source"], config(), RunDir.of("s3://bucket/run?region=us-east-1"))
