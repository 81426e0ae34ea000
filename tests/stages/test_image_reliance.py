"""How much of an answer's likelihood comes from the picture, before a training and after it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from experiments.image_reliance import figures, measure
from stic_ray.core.config import EvaluationConfig
from stic_ray.core.rundir import RunDir
from stic_ray.method.images import GREY
from stic_ray.stages.training.building import make_dpo_trainer
from stic_ray.stages.training.index import is_held_out
from stic_ray.stages.training.models import model_of
from tests.stages.builders import pairs_in
from tests.stages.test_training_batches import config_for, picture
from tests.stages.test_training_images import Plain, row_of, write


def test_figures_are_means_over_pairs() -> None:
    """Own minus blank is 2 and 4 before, 5 and 9 after: 3, 7 and a change of 4."""
    before = {"own": [(-8.0, -9.0), (-6.0, -9.0)], "blank": [(-10.0, -9.0), (-10.0, -9.0)]}
    after = {"own": [(-7.0, -9.0), (-4.0, -9.0)], "blank": [(-12.0, -9.0), (-13.0, -19.0)]}
    found = figures(before, after, EvaluationConfig())
    assert [found["own_minus_blank"][name]["mean"] for name in ("before", "after", "change")] == [3.0, 7.0, 4.0]
    assert 3.0 <= found["own_minus_blank"]["change"]["low"] <= 4.0 <= found["own_minus_blank"]["change"]["high"] <= 5.0
    assert found["told_apart"]["own"]["mean"] == 1.0 and found["told_apart"]["blank"]["mean"] == 0.5


def reliance(plain: Plain, number: int) -> float:
    """Return log p of a row's chosen answer with its picture minus that with a blank one, by plain forward passes."""
    row, own = row_of(number), picture(number)
    found = []
    for shown in (own, Image.new("RGB", own.size, GREY)):
        with torch.no_grad():
            logps, tokens = plain.run(row["prompt"], row["chosen"], shown)
        found.append(logps.gather(1, tokens[:, None]).sum().item())
    return found[0] - found[1]


def test_a_run_is_measured_on_the_pairs_that_it_held_out(tmp_path: Path, tiny_llava: Path) -> None:
    held_out = [number for number in range(60) if is_held_out(f"image {number}")][:2]
    run = RunDir.of(str(tmp_path))
    file = write(Path((run / "preferences").location.path), *map(row_of, (*held_out, 0, 1)))
    settings = {"conditional_weight": 1.0, "rejected_image": "blur", "num_steps": 1, "num_held_out": 2}
    config = config_for(tiny_llava, dpo=settings)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"config": config.model_dump(mode="json")}))
    trainer: Any = make_dpo_trainer(config, pairs_in(config, file), tmp_path / "out")
    trainer.train()
    trainer.save_model(str(tmp_path / "dpo" / "checkpoint"))

    found = measure(run, "dpo")
    model_of(trainer).eval()
    gaps = [reliance(Plain(trainer), number) for number in held_out]
    assert found["num_pairs"] == 2
    assert found["own_minus_blank"]["after"]["mean"] == pytest.approx(sum(gaps) / 2, abs=1e-3)
    assert math.isfinite(found["own_minus_blank"]["before"]["mean"])
    everything = measure(run, "dpo", str(tmp_path / "preferences"))
    assert everything["num_pairs"] == 4
