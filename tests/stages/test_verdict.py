"""Stage `verdict`, and the steps that are left out where it says that a round brought nothing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stic_ray.core.errors import ConfigError, SourceError
from stic_ray.core.overrides import build_config
from stic_ray.core.placement import tasks_need
from stic_ray.core.rundir import RunDir, row_counts
from stic_ray.core.schemas import PREDICTIONS, table_of
from stic_ray.core.steps import GOES_ON, Stage, Step, StepRun
from stic_ray.pipeline import run_pipeline
from stic_ray.stages.verdict import VERDICT_STAGE
from stic_ray.status import run_status

NUM = 60


def evaluation(folder: Path, name: str, scores: Sequence[float]) -> str:
    """Write an evaluation of a model `name`, and return its folder."""
    rows = [
        dict.fromkeys(PREDICTIONS.names, "")
        | {"benchmark": "drawn", "metric": metric, "model": name, "mode": "direct", "id": f"q{n}", "image": f"{n}.jpg"}
        | {"answers": ["x"], "score": score, "description": None, "finish_reason": "stop"}
        for metric in ("object_f1", "hallucinated_share")
        for n, score in enumerate(scores)
    ]
    place = RunDir.of(str(folder / f"of_{name}"))
    place.write_shard(f"predictions-{name}", 0, table_of(rows, PREDICTIONS), PREDICTIONS)
    place.write_manifest({"stage": "evaluation", "num_rows_written": len(rows)})
    return place.uri


def leave_name(step: StepRun) -> dict[str, Any]:
    step.output.write_json("name.json", [step.name, *(place.location.name for place in step.inputs.values())])
    return row_counts(1, 1, {})


NAMED = Stage(
    name="named",
    run=leave_name,
    settings=("seed",),
    need=tasks_need,
    writes="name.json",
    reads=("before",),
    loads_model=lambda config: False,
    is_result=True,
)


def ran(
    folder: Path, before: Sequence[float], after: Sequence[float], metric: str = "object_f1", asked: str = ""
) -> RunDir:
    """Run a verdict over two models, two steps that hang on it, and one that reads the last of those that were made."""
    models = {name: evaluation(folder, name, scores) for name, scores in (("one", before), ("two", after))}
    steps = (
        Step(NAMED, "first"),
        Step(VERDICT_STAGE, inputs=models),
        Step(NAMED, "second", {"before": "first"}, only_after="verdict"),
        Step(VERDICT_STAGE, "verdict_2", models, only_after="verdict"),
        Step(NAMED, "third", {"before": "second"}, only_after="verdict_2"),
        Step(NAMED, "last", {"before": "third|second|first"}),
    )
    run = RunDir.of(str(folder / "run"))
    question = {"image": None, "question": "What?", "answers": ["x"], "vocabulary": ["x"], "metric": [metric]}
    (folder / "drawn.jsonl").write_text(json.dumps(question) + "\n")
    benchmarks = {"benchmarks": [str(folder / "drawn.jsonl")]}
    rounds = {"num": 2, "stop_metric": f"drawn {asked or metric}"}
    config = build_config({"name": "test", "rounds": rounds, "evaluation": benchmarks})
    names = [step.name for step in steps]
    run_pipeline(config, steps, run, names, {"recipe": "test", "overrides": []})
    run_pipeline(config, steps, run, names, {"recipe": "test", "overrides": []})
    return run


@pytest.mark.parametrize(
    ("gain", "metric", "goes_on"),
    [
        (0.3, "object_f1", True),
        (-0.3, "object_f1", False),
        (0.0, "object_f1", False),
        (-0.3, "hallucinated_share", True),
        (0.3, "hallucinated_share", False),
    ],
)
def test_rounds_go_on_where_the_interval_of_the_gain_is_above_nothing(
    ray_session: None, tmp_path: Path, gain: float, metric: str, goes_on: bool
) -> None:
    before = [0.4 + 0.2 * (n % 2) for n in range(NUM)]
    run = ran(tmp_path, before, [score + gain + 0.05 * (-1) ** (n // 2) for n, score in enumerate(before)], metric)
    verdict = (run / "verdict").read_json("verdict.json")
    assert verdict and verdict[GOES_ON] is goes_on and verdict["difference"] == pytest.approx(gain)
    assert verdict["difference_low"] < gain < verdict["difference_high"]
    made = {name for name in ("second", "verdict_2", "third", "last") if (run / name).manifest}
    assert made == ({"second", "verdict_2", "third", "last"} if goes_on else {"last"})
    assert (run / "last").read_json("name.json") == ["last", "third" if goes_on else "first"]
    lines = {line.split()[0]: line for line in run_status(run)}
    assert ("left out    verdict_2" in lines["third"]) is not goes_on


def test_without_questions_in_common_there_is_no_verdict(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="two and one have no question of it in common"):
        ran(tmp_path, [0.5] * NUM, [])


def test_a_metric_that_is_none_is_named_before_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is scored by no benchmark. Did you mean 'drawn object_f1'"):
        ran(tmp_path, [0.5], [0.5], asked="object_f2")
