"""Estimates of a whole run: from a model, from what was measured, and what they need to be told."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stic_ray.core.config import MAY_CHANGE, RunConfig
from stic_ray.core.errors import ConfigError, RunError
from stic_ray.core.rundir import ESTIMATE, RunDir
from stic_ray.core.steps import identity
from stic_ray.estimate.known import measure, model_size
from stic_ray.estimate.steps import StageEstimate, estimate_run, record_estimate, table
from stic_ray.recipes import recipe, stic
from tests.estimate.runs import configured, finished

STEPS = stic(recipe("demo").config)
NAMES = [step.name for step in STEPS]


def estimated(config: RunConfig, run: RunDir | None = None) -> dict[str, StageEstimate]:
    return {each.stage: each for each in estimate_run(config, stic(config), run, NAMES)}


def test_a_run_of_the_published_size_costs_hours_not_days() -> None:
    config = configured(estimate__price_per_gpu_hour=3.0, estimate__num_questions=1000)
    found = estimated(config)
    assert list(found) == NAMES
    assert {each.basis for each in found.values()} == {"model"}
    assert (found["pool"].num_gpus, found["preferences"].num_gpus, found["dpo"].num_gpus) == (0, 8, 4)
    # 6,000 images, two requests of 2,340 + 60 tokens in and 175 out
    assert found["preferences"].num_images == 6000
    assert found["preferences"].num_tokens == pytest.approx(6000 * 2 * (2400 + 175))
    assert found["dpo"].num_tokens == pytest.approx(6000 * (2400 + 2 * 175))
    hours = sum(each.gpu_hours or 0 for each in found.values())
    assert 1 < hours < 20
    assert sum(each.money or 0 for each in found.values()) == pytest.approx(3 * hours)


def test_more_of_what_costs_costs_more() -> None:
    def wall_s(stage: str, **settings: Any) -> float:
        found = estimated(configured(estimate__num_questions=1000, **settings))[stage].wall_s
        assert found is not None
        return found

    usual = wall_s("preferences")
    assert wall_s("preferences", preferences__num_images=60_000) > 5 * usual
    assert wall_s("preferences", actors__num_actors=2) > 2 * usual
    assert wall_s("preferences", estimate__device="A10G") > 3 * usual
    assert wall_s("preferences", model__engine="vllm") < usual  # the shared image, and no floor under a step
    assert wall_s("preferences", preferences__reference_logps=True) > usual
    assert wall_s("preferences", preferences__negatives="text_swap") < 0.6 * usual  # one request in place of two
    assert wall_s("dpo", preferences__reference_logps=True) < wall_s("dpo")
    assert wall_s("dpo", workers__share_prefix=False) > 1.3 * wall_s("dpo")
    terms = ("own_tokens", "conditional", "symmetric")
    costs = [wall_s("dpo"), *(wall_s("dpo", **{f"dpo__{name}_weight": 1}) for name in terms)]
    assert costs == sorted(costs) and 1.5 < costs[2] / costs[0] < 2
    assert wall_s("sft", tuning__method="full") > wall_s("sft")
    assert wall_s("sft", sft__num_steps=1) < wall_s("sft")


def test_training_can_have_a_price_of_its_own() -> None:
    found = estimated(configured(estimate__price_per_gpu_hour=2, estimate__training_price_per_gpu_hour=5))
    assert (found["preferences"].price_per_gpu_hour, found["dpo"].price_per_gpu_hour) == (2, 5)


def test_what_nobody_said_is_asked_for() -> None:
    config = configured(preferences__num_images="null", model__path="someone/a-model", estimate__device="L4")
    assert {each.basis for each in estimated(config).values()} == {"set estimate.num_parameters"}
    config = configured(preferences__num_images="null", infusion__num_rows="null")
    found = {name: each.basis for name, each in estimated(config).items()}
    assert found["preferences"] == found["dpo"] == "set estimate.num_images"
    assert found["sft"] == "set estimate.num_instructions"
    assert found["evaluation"] == "set estimate.num_questions"
    with pytest.raises(ConfigError, match="H100"):
        configured(estimate__device="H1000")


def test_measured_rates_come_before_the_model(tmp_path: Path) -> None:
    config = configured(estimate__num_questions=1000)
    steady = {"seconds": 20.0, "rows_per_s": 4.0}
    finished(tmp_path, config, preferences={"throughput": {"rows_per_s": 2.0, "steady": steady}})
    found = estimated(configured(estimate__num_questions=1000, estimate__rates_of=tmp_path, actors__num_actors=16))
    # 8 actors made 4 rows a second, so one takes 2 s; the busiest of 16 has two of 24 shards of 256
    assert found["preferences"].basis == "measured"
    assert found["preferences"].wall_s == pytest.approx(30 + 14e9 / 0.5e9 + 2 * 512)
    assert (found["infusion"].basis, found["dpo"].basis) == ("as preferences was", "model")
    modelled = estimated(configured(estimate__num_questions=1000, actors__num_actors=16))
    assert found["infusion"].wall_s != modelled["infusion"].wall_s
    assert found["dpo"].wall_s == modelled["dpo"].wall_s


def test_rows_without_descriptions_hold_no_gpu_and_tell_nothing_of_generation(tmp_path: Path) -> None:
    config = configured(estimate__num_questions=1000, infusion__describe=False)
    finished(tmp_path, config, infusion={"throughput": {"rows_per_s": 500.0}})
    found = estimated(
        config.model_copy(update={"estimate": config.estimate.model_copy(update={"rates_of": str(tmp_path)})})
    )
    assert (found["infusion"].num_gpus, found["infusion"].basis) == (0, "measured")
    assert found["preferences"].basis == found["evaluation"].basis == "model"


def test_a_finished_stage_tells_what_it_took_and_the_other_training_follows_it(tmp_path: Path) -> None:
    config = configured(estimate__num_questions=1000)
    run = finished(tmp_path, config, dpo={"seconds": 900.0, "num_steps": 100})
    (run / "dpo").write_json("result.json", {"seconds": 800.0})
    found = estimated(config, run)
    assert (found["dpo"].basis, found["dpo"].wall_s) == ("done", 900.0)
    assert found["dpo"].gpu_hours == pytest.approx(4 * 900 / 3600)
    assert found["sft"].basis == "as dpo was"


def test_rates_are_those_of_what_was_done_with_the_processes_that_did_it(tmp_path: Path) -> None:
    """A training that was resumed has the rows of the steps since then; actors may be others in a later call."""
    config = configured()
    for number, (resumed, seconds) in enumerate(((0, 7500.0), (700, 500.0))):  # 750 steps of 10 s
        run = finished(tmp_path / str(number), config, dpo={"num_steps": 750, "num_rows_in": 6000})
        (run / "dpo").write_json("result.json", {"seconds": seconds, "resumed_from_step": resumed})
        assert measure(run).process_s_per_row("dpo") == pytest.approx(4 * 10 / 8)
    run = finished(tmp_path / "resized", config, preferences={"throughput": {"rows_per_s": 8.0}})
    record = yaml.safe_load((run.location / "config.yaml").read())
    record["config"]["actors"]["num_actors"] = 64
    run.write_text("config.yaml", yaml.safe_dump(record))
    assert measure(run).process_s_per_row("preferences") == 1.0


def test_a_pilot_without_a_finished_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no finished stage"):
        estimate_run(configured(estimate__rates_of=tmp_path), STEPS, None, NAMES)


def test_the_model_is_measured_by_its_files_or_its_name() -> None:
    toy, published = model_size(configured("demo")), model_size(configured())
    assert toy is not None and published is not None
    assert 1e6 < toy.num_parameters < 3e6  # 6.7 MB in float32
    assert toy.num_image_tokens == 9  # 48 px in patches of 16
    assert toy.cache_bytes_per_token == 4 * 4 * 32 * 2 * 2
    assert (published.num_parameters, published.num_image_tokens) == (7e9, 2340)
    assert model_size(configured(model__path="someone/a-model")) is None


def test_no_stage_is_another_for_its_estimate() -> None:
    assert "estimate" in MAY_CHANGE
    changed = configured(estimate__price_per_gpu_hour=9)
    assert all(identity(step, configured()) == identity(step, changed) for step in STEPS)


def test_what_was_expected_is_kept_for_the_report(tmp_path: Path) -> None:
    run = RunDir.of(str(tmp_path / "run"))
    record_estimate(configured("demo"), STEPS, run, ["pool", "preferences"])
    first = run.read_json(ESTIMATE)
    assert set(first) == {"pool", "preferences"} and first["pool"]["wall_s"] > 0
    record_estimate(configured("demo"), STEPS, run, ["dpo"])
    assert run.read_json(ESTIMATE) == {**first, "dpo": run.read_json(ESTIMATE)["dpo"]}
    assert json.dumps(run.read_json(ESTIMATE))


def test_the_table_says_what_is_known_and_what_does_not_fit() -> None:
    config = configured(estimate__device="T4", model__path="x/llava-70b", estimate__price_per_gpu_hour=1)
    lines = table(estimate_run(config, STEPS, None, NAMES), config)
    assert lines[1].split()[:4] == ["stage", "images", "tokens", "GPU-hours"]
    assert any(line.startswith("evaluation") and line.endswith("set estimate.num_questions") for line in lines)
    assert any(line.startswith("sum of known") for line in lines)
    assert [line for line in lines if "do not fit the 14 GiB of actors.num_gpus=1 x T4" in line]
    unpriced = table(estimate_run(configured(), STEPS, None, ["dpo"]), configured())
    assert "set estimate.price_per_gpu_hour" in unpriced[0] and " – " in unpriced[2]
