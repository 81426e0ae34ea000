"""The experiments of docs/results: runs whose steps fit together, and tables that say what was compared."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments import toyworld_systems, toyworld_systems_results, verified, vila2, vila2_results
from experiments.comparison import compared
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import PREDICTIONS, table_of
from stic_ray.core.steps import Recipe, check_steps
from stic_ray.method.statistics import Question

NUM = 40


@pytest.mark.parametrize("own", [verified.OWN, vila2.OWN, toyworld_systems.OWN], ids=lambda own: own.config.name)
def test_every_system_of_an_experiment_is_scored(own: Recipe) -> None:
    steps = own.steps(own.config)
    check_steps(steps)
    scored = {name for step in steps if step.stage.name == "evaluation" for name in step.inputs}
    trained = {step.name for step in steps if step.stage.name in ("dpo", "sft")}
    assert trained == scored and {*own.config.evaluation.models} == {"base", *scored}


def test_differences_are_paired_by_question_and_seed() -> None:
    def seed(shift: float) -> dict[str, dict[Question, float]]:
        return {"f1": {Question(str(n)): 0.5 + 0.01 * (n % 10) + shift for n in range(NUM)}}

    by_seed = {"ours": [seed(0.1), seed(0.14)], "theirs": [seed(0.0), seed(0.04)]}
    found = compared(by_seed, [("ours", "theirs")])
    assert found["systems"]["ours"]["f1"] == pytest.approx(0.665)
    row = found["differences"]["ours - theirs"]
    assert row["f1"] == pytest.approx(0.1), "every question and seed is 0.1 apart"
    low, high = found["systems"]["ours"]["f1_low"], found["systems"]["ours"]["f1_high"]
    assert low is not None and high is not None and high - low > 0.04, "two seeds that differ say little of others"


def evaluation(place: RunDir, models: Sequence[str], mode: str = "direct") -> None:
    """Write predictions in which model n is right about the first n + 1 tenths of the questions."""
    measures = [("toy_describe", "object_f1"), ("toy_questions", "exact_match")]
    for better, model in enumerate(models):
        rows: list[dict[str, Any]] = [
            dict.fromkeys(PREDICTIONS.names, "")
            | {"benchmark": benchmark, "metric": metric, "model": model, "mode": mode, "id": f"q{n}", "answers": ["x"]}
            | {"image": f"{n}.jpg", "score": float(n % 10 <= better), "prompt": "How many?" if n % 2 else "Where?"}
            for benchmark, metric in measures
            for n in range(NUM)
        ]
        place.write_shard(f"predictions-{model}", 0, table_of(rows, PREDICTIONS), PREDICTIONS)


def test_the_tables_of_vila2_have_rounds_controls_and_words(tmp_path: Path) -> None:
    run = RunDir.of(str(tmp_path))
    evaluation(run / "evaluation", ["base", *vila2.SYSTEMS])
    corpora = ("corpus", "corpus_2", "corpus_3", *(f"corpus_{name}" for name in ("specialists", *vila2.CONTROLS)))
    for words, name in enumerate(corpora, start=1):
        (run / name).write_manifest({"num_words_per_text": words})
    found = vila2_results.results([run])
    assert found["systems"]["base"]["f1"] == pytest.approx(0.1) and found["num_words_per_text"]["sft"] == 1
    assert found["differences"]["sft_2 - sft"]["f1"] == pytest.approx(0.1)
    assert found["systems"]["sft"]["questions_counts"] == pytest.approx(0.2)  # 1 of 0 and 1, the odd ones
    assert found["systems"]["base"]["questions_counts"] == 0.0


def test_the_nine_systems_have_their_mode(tmp_path: Path) -> None:
    run = RunDir.of(str(tmp_path))
    models = {step: [m for s, m in toyworld_systems.SYSTEMS.values() if s == step] for step in ("evaluation",)}
    evaluation(run / "evaluation", models["evaluation"])
    evaluation(run / toyworld_systems.DAR, ["base", "sft"], "describe_and_respond")
    found = toyworld_systems_results.results([run])
    assert [*found["systems"]] == [*toyworld_systems.SYSTEMS]
    assert (
        found["systems"]["stic_dar"]["f1"] == pytest.approx(0.2) and "stic_stage1 - sft_chosen" in found["differences"]
    )
