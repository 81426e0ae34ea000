"""Two processes under every ZeRO stage give the losses of one process at the same global batch; no Ray."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from stic_ray.core.config import RunConfig
from stic_ray.core.storage import Location
from stic_ray.engines.adapters import parts_of_adapter
from stic_ray.engines.weight_names import has_hub_names, use_hub_names
from stic_ray.stages.training.building import make_dpo_trainer, make_sft_trainer
from stic_ray.stages.training.models import describe_parts, model_of
from stic_ray.stages.training.worker import FirstSave, check_changed, make_universal, save
from tests import tiny_models
from tests.stages.builders import conversations_in, pairs_in
from tests.stages.groups import run_group
from tests.stages.test_training_batches import config_for, write_pairs, write_rows

pytestmark = pytest.mark.slow

TOLERANCE = 2e-4
"""Relative: float32 sums in another order, behind two steps of an optimiser with a large learning rate."""
PROJECTOR = {"tuning": {"projector_learning_rate": 0.003}}
MDPO = {"dpo": {"conditional_weight": 0.5, "anchor_weight": 0.5, "rejected_image": "blur"}}
POVID = {"dpo": {"text_weight": 0.5, "own_tokens_weight": 0.5, "rejected_image": "diffusion_noise"}}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "lora-zero1": {"workers": {"offload_optimizer": True}},
    "lora-zero2": {**PROJECTOR, **MDPO},
    "lora-zero3": {"workers": {"gradient_checkpointing": True}, **PROJECTOR, **POVID},
    "full-zero1": {},
    "full-zero2": {"workers": {"gradient_checkpointing": True}, "model": {"dtype": "bfloat16"}},
    "full-zero3": {"workers": {"offload_optimizer": True, "offload_parameters": True}, **PROJECTOR, **MDPO},
}
"""What each combination trains with; of `workers`, nothing changes a loss."""


FREE = {"num_workers": 1, "micro_batch": 4, "zero_stage": 0, "offload_optimizer": False}
"""One process without DeepSpeed."""
MIXED = [True, False, True, False, False, True, False, True]
"""Whether each row of the second training has an image: workers have micro-batches of text beside others with one."""


ADAPTER = Path("lora-zero1-rank0") / "dpo" / "final"
"""Where in the group's folder the first combination leaves its adapter."""


def config_of(base: Path, name: str, **workers: Any) -> RunConfig:
    method, stage = name.split("-zero")
    given = SETTINGS[name]
    sharded = {"num_workers": 2, "micro_batch": 1, "zero_stage": int(stage), "save_every_steps": 2}
    config = config_for(
        base,
        tuning={"method": method, **given.get("tuning", {})},
        dpo={"num_steps": 3, "schedule": "constant", "learning_rate": 0.003, **given.get("dpo", {})},
        sft={"num_steps": 3, "schedule": "constant", "global_batch": 2, "learning_rate": 0.003},
        workers={**sharded, **given.get("workers", {}), **workers},
    )
    return config.model_copy(update={"model": config.model.model_copy(update=given.get("model", {}))})


def train(
    config: RunConfig, folder: Path, files: list[Path], resume: Path | None = None, start: Path | None = None
) -> dict[str, Any]:
    """Train by DPO, save, and return losses and what the settings came to."""
    trainer: Any = make_dpo_trainer(config, pairs_in(config, *files), folder, start, universal=resume is not None)
    facts = describe_parts(trainer)
    train_and_save(trainer, folder, resume)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    engine = getattr(trainer, "deepspeed", None)
    return facts | {
        "losses": [entry["loss"] for entry in logs],
        "first_dpo_part": logs[0]["loss/dpo"],
        "checkpointing": model_of(trainer).is_gradient_checkpointing,
        "offloads": [
            bool(engine and place and place.device == "cpu")
            for place in (engine and engine.zero_offload_optimizer(), engine and engine.zero_offload_param())
        ],
        "num_shards": engine.dp_world_size if engine else 1,
        "dtype": str(next(p for p in model_of(trainer).parameters() if p.requires_grad).dtype),
    }


def train_and_save(trainer: Any, folder: Path, resume: Path | None = None) -> None:
    """Train as a worker does; leaves `final`, and the hashes of the start's tensors."""
    trainer.add_callback(FirstSave(trainer, folder / "first", Location.of(str(folder / "start.json"))))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    save(trainer, folder / "final")


def train_both(config: RunConfig, folder: Path, pairs: list[Path], rows: list[Path]) -> dict[str, Any]:
    """Train by DPO, then go on with likelihood from what it left, as the stages do."""
    found = train(config, folder / "dpo", pairs)
    # Every process saves to a folder of its own, and rank 0 alone has the weights.
    start = folder.with_name(folder.name.replace("rank1", "rank0")) / "dpo" / "final"
    torch.distributed.barrier()
    found["sft_losses"] = go_on(config, folder / "sft", start, rows)
    found["second"] = train(config, folder / "second", pairs, start=start)
    if config.tuning.method == "full":
        unset_hf_deepspeed_config()  # of the trainers before, which a process of its own would not have
        found["merged"] = train(config, folder / "merged", pairs, start=folder.parent / ADAPTER)
    return found


def go_on(config: RunConfig, folder: Path, start: Path, rows: list[Path]) -> list[float]:
    """Train by likelihood from `start`, save, and return the losses, that of the held-out rows last."""
    trainer = make_sft_trainer(config, conversations_in(config, *rows), folder, start)
    train_and_save(trainer, folder)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return [*losses, *(entry["eval_loss"] for entry in trainer.state.log_history[-2:] if "eval_loss" in entry)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.build("llava", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return [write_pairs(tmp_path_factory.mktemp("pairs"), 8)]


@pytest.fixture(scope="module")
def group(base: Path, pairs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What two processes found with all settings, and the folder that they wrote to."""
    folder = tmp_path_factory.mktemp("group")
    rows = [write_rows(folder / "rows", MIXED)]
    look = partial(train_both, pairs=pairs, rows=rows)
    return run_group(look, {name: config_of(base, name) for name in SETTINGS}, folder / "runs"), folder / "runs"


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_have_the_losses_of_one(
    name: str, base: Path, pairs: list[Path], group: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """One process without DeepSpeed, and none of the settings that trade time for memory."""
    found, settings = group[0][name], SETTINGS[name].get("workers", {})
    plain = dict.fromkeys(settings, False)
    alone = train(config_of(base, name, num_workers=1, micro_batch=4, zero_stage=0, **plain), tmp_path, pairs)
    assert len(set(alone["losses"])) == 3
    is_rounded = "model" in SETTINGS[name]
    assert found["losses"] == pytest.approx(alone["losses"], rel=0.02 if is_rounded else TOLERANCE)

    asked = [settings.get(f"offload_{what}", False) for what in ("optimizer", "parameters")]
    assert (found["num_shards"], found["offloads"]) == (2, asked)
    assert found["checkpointing"] == settings.get("gradient_checkpointing", False) and not alone["checkpointing"]
    has_projector = name.startswith("full") or "tuning" in SETTINGS[name]
    assert found["trained"] == ["language_model", *(["projector"] if has_projector else [])] == alone["trained"]
    assert alone["dtype"] == "torch.float32", "what is trained without DeepSpeed is held in float32"
    assert found["dtype"] == ("torch.bfloat16" if is_rounded else "torch.float32")


@pytest.mark.parametrize("name", SETTINGS)
def test_rows_with_and_without_an_image_train_together(
    name: str, base: Path, group: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """One worker has text alone, the other an image: nobody waits for its vision tower or projector."""
    plain = dict.fromkeys(SETTINGS[name].get("workers", {}), False)
    config = config_of(base, name, num_workers=1, micro_batch=2, zero_stage=0, **plain)
    start = group[1] / f"{name}-rank0" / "dpo" / "final"
    alone = go_on(config, tmp_path / "sft", start, [write_rows(tmp_path / "rows", MIXED)])
    assert len(set(alone)) >= 3
    is_rounded = "model" in SETTINGS[name]
    assert group[0][name]["sft_losses"] == pytest.approx(alone, rel=0.02 if is_rounded else TOLERANCE)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_second_round_begins_at_its_own_reference(
    name: str, base: Path, pairs: list[Path], group: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """From an adapter or a full model that a training left: the reference is that very model, whatever is sharded."""
    plain = dict.fromkeys(SETTINGS[name].get("workers", {}), False)
    config = config_of(base, name, num_workers=1, micro_batch=4, zero_stage=0, **plain)
    start = group[1] / f"{name}-rank0" / "dpo" / "final"
    alone = train(config, tmp_path, pairs, start=start)
    is_rounded = "model" in SETTINGS[name]
    second = group[0][name]["second"]
    for found in (alone, second):
        assert found["first_dpo_part"] == pytest.approx(math.log(2), abs=1e-6)
    assert second["losses"] == pytest.approx(alone["losses"], rel=0.02 if is_rounded else TOLERANCE)
    assert second["losses"][0] < group[0][name]["losses"][0] - 0.01, "it goes on from what was learned"


@pytest.mark.parametrize("name", [name for name in SETTINGS if name.startswith("full")])
def test_a_whole_model_is_trained_from_an_adapter_that_is_merged_first(
    name: str, base: Path, pairs: list[Path], group: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    plain = dict.fromkeys(SETTINGS[name].get("workers", {}), False)
    config = config_of(base, name, num_workers=1, micro_batch=4, zero_stage=0, **plain)
    alone = train(config, tmp_path / "one", pairs, start=group[1] / ADAPTER)
    is_rounded = "model" in SETTINGS[name]
    merged = group[0][name]["merged"]
    assert merged["first_dpo_part"] == pytest.approx(math.log(2), abs=1e-6)
    assert merged["losses"] == pytest.approx(alone["losses"], rel=0.02 if is_rounded else TOLERANCE)
    free = config_of(base, "lora-zero1", **FREE).model_copy(update={"dpo": config.dpo})
    adapter = train(free, tmp_path / "two", pairs, start=group[1] / ADAPTER)
    assert merged["losses"][0] == pytest.approx(adapter["losses"][0], rel=0.02 if is_rounded else TOLERANCE)
    assert not (tmp_path / "one" / "final" / "adapter_config.json").exists()


def test_a_new_adapter_is_trained_on_a_whole_model(
    base: Path, pairs: list[Path], group: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    start = group[1] / "full-zero1-rank0" / "dpo" / "final"
    found = train(config_of(base, "lora-zero1", **FREE), tmp_path, pairs, start=start)
    assert found["first_dpo_part"] == pytest.approx(math.log(2), abs=1e-6)
    assert found["losses"][0] == pytest.approx(group[0]["full-zero1"]["second"]["losses"][0], rel=TOLERANCE)
    assert found["trained"] == ["language_model"] and (tmp_path / "final" / "adapter_config.json").exists()


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_saved_loads_with_the_plain_libraries(
    name: str, base: Path, group: tuple[dict[str, Any], Path]
) -> None:
    for stage in ("dpo", "sft", "second"):
        final = group[1] / f"{name}-rank0" / stage / "final"
        facts = check_changed(final, json.loads((final.parent / "start.json").read_text()))
        assert not list(final.glob("*/")), "the reference's adapter is not saved"
        if name.startswith("lora"):
            assert facts["num_nonzero_lora_b"] > 0
            model: Any = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), final)
            parts = {"language_model", "projector"} if "tuning" in SETTINGS[name] else {"language_model"}
            assert parts_of_adapter(final) == parts
            whole = {n: p for n, p in model.named_parameters() if ".modules_to_save." in n}
            assert bool(whole) == ("projector" in parts)
            assert not any(
                p.equal(model.get_parameter(n.replace("modules_to_save.default", "original_module")))
                for n, p in whole.items()
            )
        else:
            use_hub_names(final)
            assert has_hub_names(final)
            _, report = AutoModelForImageTextToText.from_pretrained(final, output_loading_info=True)
            assert not report["missing_keys"] and not report["unexpected_keys"]


def test_one_process_goes_on_from_the_checkpoint_of_two(
    base: Path, pairs: list[Path], group: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    """The last of three steps is done by a single process, which the state of the optimiser was not cut for.

    One training had its last step behind it, in the middle of an epoch: all that is left to do is to save.
    """
    configs = {}
    for name, step in (("lora-zero3", 2), ("full-zero1", 2), ("lora-zero2", 3)):
        for rank in (0, 1):  # Ray Train puts the parts together so
            shutil.copytree(
                group[1] / f"{name}-rank{rank}" / "dpo" / f"checkpoint-{step}", tmp_path / name, dirs_exist_ok=True
            )
        make_universal(tmp_path / name)
        configs[name] = config_of(base, name, num_workers=1)
    found = run_group(partial(resume, checkpoints=tmp_path, pairs=pairs), configs, tmp_path / "one", num_processes=1)
    for name in configs:
        assert found[name]["num_shards"] == 1
        assert len(found[name]["losses"]) == 3
        assert found[name]["losses"] == pytest.approx(group[0][name]["losses"], rel=TOLERANCE)


def resume(config: RunConfig, folder: Path, checkpoints: Path, pairs: list[Path]) -> dict[str, Any]:
    name = folder.name.removesuffix("-rank0")
    return train(config, folder, pairs, resume=checkpoints / name)
