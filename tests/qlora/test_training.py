"""QLoRA trains an adapter on a language model of 4 bits; the adapter is for the model as it was."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Params4bit
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from stic_ray.core.config import RunConfig
from stic_ray.stages.training.building import make_dpo_trainer, make_sft_trainer
from stic_ray.stages.training.models import model_of
from stic_ray.stages.training.worker import check_changed
from tests.stages.builders import check, conversations_in, pairs_in
from tests.stages.groups import run_group
from tests.stages.test_training_batches import config_for, write_pairs, write_rows
from tests.stages.test_training_sharded import train_and_save


def train(config: RunConfig, folder: Path, pairs: list[Path]) -> dict[str, Any]:
    trainer: Any = make_dpo_trainer(config, pairs_in(config, *pairs), folder)
    held = {name for name, p in model_of(trainer).named_parameters() if isinstance(p, Params4bit)}
    train_and_save(trainer, folder)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6), "policy and reference begin as one"
    return {"losses": [entry["loss"] for entry in logs], "held": sorted(held)}


def qlora(base: Path, **workers: Any) -> RunConfig:
    tuning = {"method": "qlora", "projector_learning_rate": 0.01}
    rates = {"learning_rate": 0.01, "num_steps": 3, "global_batch": 4}
    return config_for(base, tuning=tuning, dpo=rates, sft={**rates, "num_steps": 1}, workers=workers)


def test_an_adapter_on_four_bits_learns_and_fits_the_model_as_it_was(tmp_path: Path, tiny_llava: Path) -> None:
    pairs = [write_pairs(tmp_path / "pairs", 8)]
    config = qlora(tiny_llava)
    check(config, "dpo", "sft")
    found = train(config, tmp_path / "one", pairs)
    assert len(found["held"]) == 28 and all("language_model" in name for name in found["held"])
    whole = train(config_for(tiny_llava, dpo=config.dpo.model_dump()), tmp_path / "whole", pairs)
    assert not whole["held"] and found["losses"][0] != whole["losses"][0]
    assert found["losses"][0] == pytest.approx(whole["losses"][0], rel=0.02), "the rounding of 4 bits"
    assert found["losses"][-1] < 0.7 * found["losses"][0]

    final = tmp_path / "one" / "final"
    assert check_changed(final, json.loads((tmp_path / "one" / "start.json").read_text()))["num_nonzero_lora_b"] == 28
    model: Any = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny_llava), final)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}

    sft: Any = make_sft_trainer(
        config, conversations_in(config, write_rows(tmp_path / "rows", [True, False])), tmp_path / "sft", final
    )
    assert any(isinstance(p, Params4bit) for p in model_of(sft).parameters())
    train_and_save(sft, tmp_path / "sft")
    before = json.loads((tmp_path / "sft" / "start.json").read_text())
    assert check_changed(tmp_path / "sft" / "final", before)["num_changed_tensors"] > 28


def test_two_processes_of_zero_2_have_the_losses_of_one(tmp_path: Path, tiny_llava: Path) -> None:
    pairs = [write_pairs(tmp_path / "pairs", 8)]
    alone = train(qlora(tiny_llava), tmp_path / "alone", pairs)
    sharded = qlora(tiny_llava, num_workers=2, micro_batch=2, zero_stage=2)
    found = run_group(partial(train, pairs=pairs), {"two": sharded}, tmp_path / "group")["two"]
    assert found["held"] == alone["held"]
    assert found["losses"] == pytest.approx(alone["losses"], rel=1e-3)
