"""What the settings of training come to: parts, rates, schedules, DeepSpeed and Ray Train; no Ray."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError, ModelError
from stic_ray.stages.training.building import make_dpo_trainer, make_sft_trainer, training_arguments
from stic_ray.stages.training.index import RowGroup, Rows
from stic_ray.stages.training.launch import scaling_of
from stic_ray.stages.training.models import describe_parts, model_of
from tests import tiny_models
from tests.stages.builders import check, conversations_in, pairs_in
from tests.stages.test_training_batches import config_for, write_pairs, write_rows

PARTS = ("language_model", "projector", "vision_tower")


def trainer_for(config: RunConfig, folder: Path) -> Any:
    return make_dpo_trainer(config, pairs_in(config, write_pairs(folder / "pairs", 4)), folder / "out")


@pytest.mark.parametrize(
    ("tuning", "trained"),
    [
        ({"method": "lora"}, "language_model"),
        ({"method": "lora", "freeze": ["vision_tower"]}, "language_model projector"),
        ({"method": "lora", "freeze": ["vision_tower", "language_model"]}, "projector"),
        ({"method": "lora", "freeze": []}, "language_model projector vision_tower"),
        ({"method": "full"}, "language_model projector"),
        ({"method": "full", "freeze": ["vision_tower", "language_model"]}, "projector"),
    ],
)
def test_the_parts_that_are_named_stay_as_they_are(
    tuning: dict[str, Any], trained: str, tmp_path: Path, tiny_llava: Path
) -> None:
    trainer = trainer_for(config_for(tiny_llava, tuning=tuning), tmp_path)
    facts = describe_parts(trainer)
    assert facts["trained"] == trained.split() and facts["frozen"] == [p for p in PARTS if p not in trained]
    trainable = [name for name, parameter in model_of(trainer).named_parameters() if parameter.requires_grad]
    assert all((".lora_" in name) == (tuning["method"] == "lora") for name in trainable)
    assert not any("lm_head" in name for name in trainable) or trained == "language_model projector"


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("stage", ["dpo", "sft"])
def test_the_projector_has_a_rate_of_its_own(method: str, stage: str, tmp_path: Path, tiny_llava: Path) -> None:
    tuning = {"method": method, "projector_learning_rate": 0.5}
    rates = {"learning_rate": 0.01, "warmup_share": 0.5, "num_steps": 4, "weight_decay": 0.1}
    config = config_for(tiny_llava, tuning=tuning, **{stage: rates}, workers={"micro_batch": 1})
    if stage == "dpo":
        trainer = trainer_for(config, tmp_path)
    else:
        trainer = make_sft_trainer(
            config, conversations_in(config, write_rows(tmp_path / "rows", [True])), tmp_path / "out", None
        )
    trainer.create_optimizer_and_scheduler(4)
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    names = {id(parameter): name for name, parameter in model_of(trainer).named_parameters() if parameter.requires_grad}
    found = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(id(parameter))
            found["multi_modal_projector" in name, parameter.ndim > 1] = (group["lr"], group["weight_decay"])
    assert not names, "every trained weight is in one group"
    assert found[True, True] == (0.25, 0.1) and found[True, False] == (0.25, 0.0), "half of the warm-up"
    assert found[False, True] == (0.005, 0.1)
    assert describe_parts(trainer)["trained"] == ["language_model", "projector"]


def test_a_model_without_a_known_projector_has_no_rate_for_it(tmp_path: Path) -> None:
    base = tiny_models.build("qwen2_5_vl", tmp_path / "model")
    config = config_for(base, tuning={"projector_learning_rate": 0.1})
    with pytest.raises(ConfigError, match=r"tuning\.projector_learning_rate .* known as a projector"):
        check(config, "dpo")


def test_the_driver_of_a_training_does_without_trl() -> None:
    code = "import sys, stic_ray.stages.training.launch; print([m for m in ('trl', 'deepspeed') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is there")
def test_qlora_without_bitsandbytes_names_the_extra(tiny_llava: Path) -> None:
    with pytest.raises(ModelError, match=r"tuning\.method=qlora needs bitsandbytes: .*stic-ray\[qlora\]"):
        check(config_for(tiny_llava, tuning={"method": "qlora"}), "dpo")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [0.0, 0.5, 1.0, 0.853553, 0.5, 0.146447, 0.0]),
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("inverse_sqrt", [0.0, 0.5, 1.0, 0.816497, 0.707107, 0.632456, 0.577350]),
    ],
)
def test_a_schedule_begins_behind_the_warm_up(
    schedule: str, expected: list[float], tmp_path: Path, tiny_llava: Path
) -> None:
    settings = {"schedule": schedule, "num_steps": 6, "warmup_share": 1 / 3, "learning_rate": 1.0}
    config = config_for(tiny_llava, dpo=settings)
    arguments = training_arguments(config, config.dpo, tmp_path, Rows([RowGroup("", 0, range(4))], []))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments["learning_rate"])
    scheduler = get_scheduler(
        arguments["lr_scheduler_type"], optimizer, arguments["warmup_steps"], num_training_steps=6
    )
    found = []
    for _ in expected:
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("stage", ["dpo", "sft"])
def test_a_decay_goes_on_where_another_training_stopped(
    schedule: str, stage: str, tmp_path: Path, tiny_llava: Path
) -> None:
    """The last four of eight steps, as a training of their own, have the rates that they would have had."""

    def rates(num_steps: int, **settings: Any) -> list[float]:
        named = {"learning_rate": 0.5, "schedule": schedule, "num_steps": num_steps, "warmup_share": 0.25, **settings}
        config = config_for(tiny_llava, **{stage: named}, workers={"micro_batch": 1})
        if stage == "dpo":
            trainer = trainer_for(config, tmp_path)
        else:
            rows = conversations_in(config, write_rows(tmp_path / "rows", [True]))
            trainer = make_sft_trainer(config, rows, tmp_path / "out")
        trainer.create_optimizer_and_scheduler(num_steps)
        found = []
        for _ in range(num_steps):
            found.append(trainer.optimizer.param_groups[0]["lr"])
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12), "both end at 0"
        return found

    whole = rates(8)
    assert whole[:3] == [0.0, 0.25, 0.5], "two steps of warm-up"
    assert rates(4, start_learning_rate=whole[4]) == pytest.approx(whole[4:])
    assert rates(4, start_learning_rate=0.5)[0] == 0.5


def test_gradients_are_clipped(tmp_path: Path, tiny_llava: Path) -> None:
    """With plain steps the weights move by the learning rate times the norm that is left."""
    config = config_for(tiny_llava, dpo={"max_grad_norm": 0.001, "num_steps": 1, "warmup_share": 0.0})
    trainer = trainer_for(config, tmp_path)
    assert trainer.args.max_grad_norm == 0.001
    trainer.args.set_optimizer("sgd", learning_rate=1.0)
    trainer.args.lr_scheduler_type = "constant"
    before = [parameter.detach().clone() for parameter in model_of(trainer).parameters()]
    trainer.train()
    moved = zip(model_of(trainer).parameters(), before, strict=True)
    assert sum(float((now.detach() - then).square().sum()) for now, then in moved) ** 0.5 == pytest.approx(
        0.001, rel=1e-3
    )


def test_what_is_for_gpus_reaches_trl_and_deepspeed(tmp_path: Path, tiny_llava: Path) -> None:
    workers = {"num_gpus": 1, "zero_stage": 3, "offload_activations": True, "offload_parameters": True}
    config = config_for(tiny_llava, workers=workers)
    found = training_arguments(config, config.dpo, tmp_path, Rows([RowGroup("", 0, range(4))], []))
    assert found["activation_offloading"] and found["bf16"] and not found["use_cpu"]
    zero = found["deepspeed"]["zero_optimization"]
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": True} and "offload_optimizer" not in zero


def test_workers_are_placed_as_asked(tiny_llava: Path) -> None:
    asked = {"num_workers": 8, "num_gpus": 1, "num_cpus": 3, "accelerator_type": "H100", "placement_strategy": "SPREAD"}
    scaling = scaling_of(config_for(tiny_llava, workers=asked).workers)
    assert (scaling.num_workers, scaling.use_gpu, scaling.resources_per_worker) == (8, True, {"CPU": 3.0, "GPU": 1.0})
    assert (scaling.accelerator_type, scaling.placement_strategy) == ("H100", "SPREAD")
