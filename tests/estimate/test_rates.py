"""Rates that were measured: per row of a step's own work, and carried over to steps that ask otherwise."""

import json
from pathlib import Path
from typing import Any

import pytest

from stic_ray.core.rundir import RunDir
from stic_ray.core.steps import Step, Steps
from stic_ray.estimate.known import measure, num_rows_done
from stic_ray.estimate.steps import StageEstimate, estimate_run
from stic_ray.pipeline import run_pipeline
from stic_ray.stages.candidates import CANDIDATES
from stic_ray.stages.captions import CAPTIONS_STAGE
from stic_ray.stages.evaluation import EVALUATION
from stic_ray.stages.pool import POOL
from stic_ray.stages.preferences import PREFERENCES
from tests.estimate.runs import configured, finished
from tests.stages.builders import draw_pictures, fake_config

INDEX = {"index": "pool"}
START_S = 30 + 14e9 / 0.5e9
"""7B parameters in bfloat16 at 0.5 GB/s."""
CONFIG = configured(estimate__num_images=1000, actors__num_actors=1, pool__shard_size=100, preferences__num_images=1000)


def estimated(steps: Steps, run: RunDir) -> dict[str, StageEstimate]:
    return {each.stage: each for each in estimate_run(CONFIG, steps, run, [step.name for step in steps])}


def working_s(each: StageEstimate) -> float:
    assert each.wall_s is not None
    return each.wall_s - START_S


def figures(seconds: float, num_rows: int) -> dict[str, float]:
    return {"seconds": seconds, "num_rows": num_rows, "rows_per_s": num_rows / seconds}


@pytest.mark.parametrize(
    "manifest",
    [
        {"throughput": figures(100, 8000)},
        {"throughput": figures(50, 4000), "num_rows_out": 8000},  # its last attempt did half of it
    ],
)
def test_images_are_counted_and_not_their_candidates(tmp_path: Path, manifest: dict[str, Any]) -> None:
    more = {"candidates.num_candidates": 16}
    steps = (
        Step(POOL),
        Step(CANDIDATES, "candidates_1", INDEX),
        Step(CANDIDATES, "candidates_2", INDEX),
        Step(CANDIDATES, "candidates_3", INDEX, more),
    )
    run = finished(tmp_path, CONFIG, steps, candidates_1={"num_rows_in": 1000, **manifest})
    found = estimated(steps, run)
    assert found["candidates_2"].basis == found["candidates_3"].basis == "measured"
    assert working_s(found["candidates_2"]) == pytest.approx(100)
    assert 150 < working_s(found["candidates_3"]) < 200, "twice the answers, and the prompt once"


def test_more_questions_and_answers_take_longer_than_the_step_that_was_measured(tmp_path: Path) -> None:
    asked = {"captions.kind": "specialist:x", "captions.questions": ["a", "b", "c", "d"]}
    steps = (
        Step(POOL),
        Step(CAPTIONS_STAGE, "captions_1", INDEX),
        Step(CAPTIONS_STAGE, "answers_1", INDEX, asked),
        Step(CAPTIONS_STAGE, "answers_2", INDEX, {**asked, "captions.num_answers": 5}),
    )
    done: dict[str, Any] = {"num_rows_in": 1000, "num_units": 1000, "throughput": figures(100, 1000)}
    found = estimated(steps, finished(tmp_path / "a", CONFIG, steps, captions_1=done))
    assert working_s(found["answers_1"]) == pytest.approx(400)
    assert 800 < working_s(found["answers_2"]) < 2000

    # From a step with four questions to one with a single one, and to its own like.
    done = {"num_rows_in": 4000, "num_units": 1000, "throughput": figures(400, 4000)}
    run = finished(tmp_path / "b", CONFIG, steps, answers_1=done)
    found = estimated(steps, run)
    assert found["answers_1"].num_images == 1000
    assert working_s(found["captions_1"]) == pytest.approx(100)
    assert measure(run).process_s_per_row("answers_1") == pytest.approx(0.4)

    # Of two that were measured the more similar one counts, whichever was first.
    done = {**done, "throughput": figures(800, 4000)}
    one = {"num_rows_in": 1000, "throughput": figures(100, 1000)}
    found = estimated(steps, finished(tmp_path / "c", CONFIG, steps, captions_1=one, answers_1=done))
    more = estimated(steps, finished(tmp_path / "d", CONFIG, steps, answers_1=done))
    assert found["answers_2"].wall_s == more["answers_2"].wall_s


def test_questions_are_counted_and_not_their_predictions(tmp_path: Path) -> None:
    """Two models, two modes, three metrics: 100 questions leave 1,200 predictions."""
    modes = {"evaluation.modes": ["direct", "describe_and_respond"], "evaluation.models": ["base", "dpo"]}
    steps = (Step(POOL), Step(EVALUATION, "before", {}, modes), Step(EVALUATION, "after", {}, modes))
    by_model = {"base": figures(100, 600), "dpo": figures(200, 600)}
    made: dict[str, Any] = {"num_rows_in": 1200, "throughput": by_model}
    run = finished(tmp_path / "a", CONFIG, steps, before={**made, "num_units": 200})
    assert measure(run).process_s_per_row("before") == pytest.approx(300 / 200)
    config = CONFIG.model_copy(update={"estimate": CONFIG.estimate.model_copy(update={"num_questions": 1000})})
    _, after = estimate_run(config, steps, run, ["before", "after"])
    assert after.basis == "measured" and working_s(after) == pytest.approx(2000 * 1.5)
    # What an earlier version left does not say how many questions there were.
    assert measure(finished(tmp_path / "b", CONFIG, steps, before=made)).process_s_per_row("before") is None


def test_another_stage_is_corrected_by_what_the_model_says_of_the_measured_steps_own_settings(tmp_path: Path) -> None:
    def basis_and_s(folder: Path, num_candidates: int, seconds: float) -> tuple[str, float]:
        settings = {"candidates.num_candidates": num_candidates}
        steps = (Step(POOL), Step(CANDIDATES, "asked", INDEX, settings), Step(PREFERENCES, inputs=INDEX))
        done = {"num_rows_in": 1000, "throughput": figures(seconds, 1000 * num_candidates)}
        found = estimated(steps, finished(folder, CONFIG, steps, asked=done))["preferences"]
        return found.basis, working_s(found)

    few, many = basis_and_s(tmp_path / "a", 4, 100), basis_and_s(tmp_path / "b", 16, 100)
    assert few[0] == many[0] == "as asked was"
    assert few[1] > 2.5 * many[1], "an image with few candidates in the same time is a slower machine"


@pytest.mark.usefixtures("ray_session")
def test_steps_leave_what_their_rates_are_read_from(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 4)
    question = {"image": "000.jpg", "question": "What is there?", "metric": ["object_f1", "hallucinated_share"]}
    rows = [{**question, "id": str(number), "vocabulary": ["dog", "cat"], "answers": ["dog"]} for number in range(3)]
    (pictures / "objects.jsonl").write_text("\n".join(map(json.dumps, rows)))
    script = "rules: [{prompt: Which, answer: ''}]\ndefault: 'dog {seed}'"
    evaluation = {"benchmarks": [str(pictures / "objects.jsonl")], "models": ["base"]}
    config = fake_config(tmp_path, pictures, script, candidates={"num_candidates": 3}, evaluation=evaluation)
    asked = {"captions.kind": "specialist:x", "captions.questions": ["How many?", "Which?"]}
    steps = (
        Step(POOL),
        Step(CANDIDATES, inputs=INDEX),
        Step(CAPTIONS_STAGE, inputs=INDEX, settings=asked),
        Step(EVALUATION),
    )
    names = ["candidates", "captions", "evaluation"]
    run = RunDir.of(str(tmp_path / "run"))
    run_pipeline(config, steps, run, ["pool", *names], {"recipe": "test", "overrides": []})

    found = measure(run)
    made = found.manifests
    assert [num_rows_done(made[name]) for name in names] == [4, 4, 3]
    assert [made["candidates"]["num_rows_out"], made["captions"]["num_rows_in"]] == [12, 8]
    assert made["evaluation"]["num_rows_in"] == 3 * 2 * 2
    for name, num_done in zip(names, (4, 4, 3), strict=True):
        throughput = made[name]["throughput"]
        figures = throughput.get("base", throughput)
        num_processes = made[name]["made_with"]["processes"]["num"]
        expected = num_processes * figures["num_rows"] / figures["rows_per_s"] / num_done
        assert found.process_s_per_row(name) == pytest.approx(expected)
