"""A run in rounds: what the page says of them, and of the steps that were left out."""

from pathlib import Path

import yaml

from stic_ray.core.overrides import apply_values
from stic_ray.core.rundir import RunDir
from stic_ray.recipes import recipe
from stic_ray.report.collect import collect
from stic_ray.report.write import render
from tests.report.builders import Page, manifest

VERDICT = {"metric": "toy_describe object_f1", "before": "sft", "after": "sft_2", "goes_on": False}


def test_the_page_has_each_rounds_difference_and_says_what_was_left_out(tmp_path: Path) -> None:
    own = recipe("vila2")
    config = apply_values(own.config, {"rounds.num": 3, "rounds.stop_metric": VERDICT["metric"]})
    run = RunDir.of(str(tmp_path))
    steps = [step.record(config) for step in own.steps(config)]
    run.write_text("config.yaml", yaml.safe_dump({"steps": steps, "config": config.model_dump(mode="json")}))
    figures = {"difference": -0.004, "difference_low": -0.012, "difference_high": 0.005}
    (run / "verdict_2").write_json("verdict.json", {**VERDICT, **figures})
    (run / "verdict_2").write_manifest({**manifest("evaluation", 60, {}), "goes_on": False})
    report = collect(run)
    statuses = {stage["stage"]: stage["status"] for stage in report["stages"]}
    assert {name for name, status in statuses.items() if status == "left out"} == {
        "captions_3",
        "corpus_3",
        "sft_3",
        "evaluation_3",
        "verdict_3",
    }
    assert statuses["sft_2"] == "not run" and statuses["verdict_2"] == "finished"
    text = Page(render(report)).text
    assert "From round to round" in text and "sft_2 sft toy_describe object_f1 −0.4 points −1.2 to +0.5" in text
