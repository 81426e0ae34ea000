"""Batches and objectives inside TRL's trainer, against plain forward passes of the tiny model; no Ray."""

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import set_seed

from stic_ray.core.config import DPOConfig, ModelConfig, RunConfig
from stic_ray.core.overrides import build_config
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import INFUSED, PAIRS, table_of
from stic_ray.engines.loading import load_processor
from stic_ray.engines.sequences import image_token_id
from stic_ray.engines.shared_prefix import CHOSEN, PROMPT, REJECTED
from stic_ray.stages.training.building import make_dpo_trainer, make_sft_trainer
from stic_ray.stages.training.collators import IGNORED, AnswersOnlyCollator, PreferenceCollator, check_image_tokens
from stic_ray.stages.training.models import model_of
from stic_ray.stages.training.scores import score_answers
from stic_ray.stages.training.trainers import means
from stic_ray.toyworld.scenes import draw_scene, sample_scene
from tests import tiny_models
from tests.stages.builders import conversations_in, pairs_in

EMBEDDED = ("llava", "llava_next", "idefics3")


def picture(index: int) -> Image.Image:
    return draw_scene(sample_scene(5, index), side_px=48 + 16 * (index % 3))


def encoded(index: int) -> bytes:
    buffer = io.BytesIO()
    picture(index).save(buffer, "PNG")
    return buffer.getvalue()


def write_pairs(folder: Path, number: int) -> Path:
    """Write a shard of pairs with answers of different lengths."""
    rows = [
        {
            **{name: 0 for name in PAIRS.names if PAIRS.field(name).type == "int64"},
            **{name: "x" for name in PAIRS.names if PAIRS.field(name).type == "string"},
            "image": {"bytes": encoded(index), "path": None},
            "prompt": [{"role": "user", "content": "Describe the picture."}],
            "chosen": [{"role": "assistant", "content": "There is a red circle. " * (1 + index % 3)}],
            "rejected": [{"role": "assistant", "content": "There are four blue squares " * (1 + index % 2)}],
        }
        for index in range(number)
    ]
    run = RunDir.of(str(folder))
    run.write_shard("pairs", 0, table_of(rows, PAIRS), PAIRS)
    return Path(run.shards("pairs")[0].path)


def write_rows(folder: Path, has_image: list[bool]) -> Path:
    """Write a shard of infused rows, with an image or without."""
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A circle."}]
    rows = [
        {
            "id": str(index),
            "image": {"bytes": encoded(index), "path": None} if with_image else None,
            "messages": messages,
            "num_sequence_tokens": 1,
            "model": "m",
        }
        for index, with_image in enumerate(has_image)
    ]
    run = RunDir.of(str(folder))
    run.write_shard("rows", 0, table_of(rows, INFUSED), INFUSED)
    return Path(run.shards("rows")[0].path)


def config_for(model: Path, **sections: dict[str, Any]) -> RunConfig:
    data: dict[str, dict[str, Any]] = {
        "model": {"path": str(model)},
        "tuning": {"lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0},
        "dpo": {"learning_rate": 0.01, "global_batch": 4},
        "workers": {"zero_stage": 0, "micro_batch": 4},
    }
    for name, fields in sections.items():
        data[name] = {**data.get(name, {}), **fields}
    return build_config({"name": "test", **data})


def figures_of(trainer: Any) -> dict[str, float]:
    """What a trainer would log of the batches that it went through in evaluation."""
    return means(*trainer.sums.pop("eval"))


def plain_logps(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and per-position log-probabilities of the labels, by one ordinary forward pass."""
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    logits = model(**inputs).logits[:, :-1].float()
    labels = batch["input_ids"][:, 1:]
    return logits, torch.log_softmax(logits, -1).gather(-1, labels[..., None]).squeeze(-1)


@pytest.mark.parametrize(("objective", "share_prefix"), [("paper", True), ("paper", False), ("released_code", True)])
def test_the_loss_in_trl_is_the_formula(objective: str, share_prefix: bool, tmp_path: Path, tiny_llava: Path) -> None:
    """Loss = mean of log(1 + exp(-beta * margin)) minus alpha times the summed log p(chosen), before and after a step.

    At first the policy equals the reference and the DPO part is ln 2. Then the adapter's weights are moved, and the
    loss is worked out from two plain forward passes, one with and one without the adapter.
    """
    config = config_for(
        tiny_llava,
        dpo={"objective": objective, "alpha": 0.01, "beta": 0.3},
        workers={"share_prefix": share_prefix},
    )
    trainer: Any = make_dpo_trainer(config, pairs_in(config, write_pairs(tmp_path / "pairs", 4)), tmp_path / "out")
    model: Any = model_of(trainer).eval()
    rows = [dict(trainer.train_dataset[i]) for i in range(4)]
    trained_on = trainer.data_collator([dict(row) for row in rows])
    assert ("segments" in trained_on) == (share_prefix and objective == "paper")
    batch = PreferenceCollator(processor=trainer.processing_class)(rows)

    with torch.no_grad():
        trainer.compute_loss(model, dict(trained_on))
    assert figures_of(trainer)["loss/dpo"] == pytest.approx(0.6931472, abs=1e-6)

    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
        found = trainer.compute_loss(model, dict(trained_on)).item()
        _, policy_BT = plain_logps(model, batch)
        policy_logits, _ = plain_logps(model, batch)
        with model.disable_adapter():
            reference_logits, reference_BT = plain_logps(model, batch)
    mask = batch["completion_mask"][:, 1:]
    chosen, rejected = slice(0, 4), slice(4, 8)

    def summed(logps: torch.Tensor, rows: slice) -> torch.Tensor:
        return (logps[rows] * mask[rows]).sum(1)

    def strongest_other(logits: torch.Tensor) -> torch.Tensor:
        best = torch.log_softmax(logits, -1).topk(2, -1)
        labels = batch["input_ids"][:, 1:]
        return torch.where(best.indices[..., 0] == labels, best.values[..., 1], best.values[..., 0])

    if objective == "released_code":
        policy_rejected = summed(strongest_other(policy_logits), rejected)
        reference_rejected = summed(strongest_other(reference_logits), rejected)
    else:
        policy_rejected, reference_rejected = summed(policy_BT, rejected), summed(reference_BT, rejected)
    margin = summed(policy_BT, chosen) - summed(reference_BT, chosen) - policy_rejected + reference_rejected
    expected = torch.log1p(torch.exp(-0.3 * margin)).mean() - 0.01 * summed(policy_BT, chosen).mean()
    assert margin.abs().max() > 0.1
    assert found == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("family", EMBEDDED)
def test_sharing_the_prefix_trains_on_the_same_tokens_with_the_same_losses(family: str, tmp_path: Path) -> None:
    model = tiny_models.build(family, tmp_path / family)
    files, losses, tokens = [write_pairs(tmp_path / "pairs", 8)], [], []
    for share_prefix in (True, False):
        config = config_for(model, workers={"share_prefix": share_prefix}, dpo={"num_epochs": 2})
        set_seed(0)
        trainer: Any = make_dpo_trainer(config, pairs_in(config, *files), tmp_path / f"out-{share_prefix}")
        batch = trainer.data_collator([dict(trainer.train_dataset[i]) for i in range(4)])
        if share_prefix:
            halves = [sequences(batch, segment) for segment in (CHOSEN, REJECTED)]
            tokens.append([*halves[0], *halves[1]])
        else:
            kept = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
            tokens.append([ids[mask].tolist() for ids, mask in kept])
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert tokens[0] == tokens[1]
    assert len(losses[0]) == 4 and losses[0][0] != losses[0][-1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def sequences(batch: dict[str, torch.Tensor], segment: int) -> list[list[int]]:
    """The tokens of the prompt and one of the answers, as a sequence of its own, for each pair."""
    wanted = (batch["segments"] == PROMPT) | (batch["segments"] == segment)
    return [ids[mask].tolist() for ids, mask in zip(batch["input_ids"], wanted, strict=True)]


def test_stored_log_probabilities_take_the_place_of_the_reference(tmp_path: Path, tiny_llava: Path) -> None:
    config = config_for(tiny_llava, dpo={"alpha": 0.0, "beta": 1.0})
    trainer: Any = make_dpo_trainer(config, pairs_in(config, write_pairs(tmp_path / "pairs", 4)), tmp_path / "out")
    model: Any = model_of(trainer).eval()
    batch = trainer.data_collator([dict(trainer.train_dataset[i]) for i in range(4)])
    with torch.no_grad():
        chosen, rejected = score_answers(model, trainer.network, batch).answers.unbind(1)
        stored = {"reference_chosen_logp": chosen - 2.0, "reference_rejected_logp": rejected - 0.5}
        found = trainer.compute_loss(model, {**batch, **stored})
    assert found.item() == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-5)


def test_full_fine_tuning_freezes_what_it_is_told_and_keeps_a_reference(tmp_path: Path, tiny_llava: Path) -> None:
    config = config_for(tiny_llava, tuning={"method": "full", "freeze": ["vision_tower", "projector"]})
    trainer = make_dpo_trainer(config, pairs_in(config, write_pairs(tmp_path / "pairs", 8)), tmp_path / "out")
    before = {name: p.detach().clone() for name, p in model_of(trainer).named_parameters()}
    trainer.train()
    changed = {name for name, p in model_of(trainer).named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("language_model" in name or "lm_head" in name for name in changed)
    first, second = [entry["loss/dpo"] for entry in trainer.state.log_history if "loss/dpo" in entry]
    assert first == pytest.approx(0.6931472, abs=1e-6)
    assert second != pytest.approx(0.6931472, abs=1e-4), "the reference stayed behind when the policy moved"


def test_settings_of_generation_that_cannot_be_saved_end_no_training(tmp_path: Path, tiny_llava: Path) -> None:
    """Vicuna's temperature without sampling: transformers refuses it when all steps are done."""
    model = Path(shutil.copytree(tiny_llava, tmp_path / "vicuna"))
    settings = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.9, "top_p": 0.6}))
    config = config_for(model, tuning={"method": "full"}, sft={"global_batch": 4})
    pairs = write_pairs(tmp_path / "pairs", 4)
    dpo: Any = make_dpo_trainer(config, pairs_in(config, pairs), tmp_path / "dpo")
    dpo.train()
    dpo.save_model(str(tmp_path / "tuned"))
    rows = write_rows(tmp_path / "rows", [True] * 4)
    sft: Any = make_sft_trainer(config, conversations_in(config, rows), tmp_path / "sft", tmp_path / "tuned")
    sft.save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "generation_config.json").is_file()


@pytest.mark.parametrize("family", EMBEDDED)
def test_sft_labels_are_the_answers_and_nothing_else(family: str, tmp_path: Path) -> None:
    tiny_models.build(family, tmp_path / family)
    processor: Any = load_processor(ModelConfig(path=str(tmp_path / family)))
    talk = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A red circle."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    rows = [
        {"image": picture(0), "messages": talk},
        {"image": None, "messages": talk[:2]},
        {"image": picture(2), "messages": talk[:2]},
    ]
    batch = AnswersOnlyCollator(processor)(rows)
    said = [
        processor.tokenizer.decode([t for t in labels.tolist() if t != IGNORED], skip_special_tokens=True)
        for labels in batch["labels"]
    ]
    assert ["".join(text.split()) for text in said] == ["Aredcircle.Yes.", "Aredcircle.", "Aredcircle."]
    ends = [labels[labels != IGNORED][-1].item() for labels in batch["labels"]]
    special = set(processor.tokenizer.all_special_ids)
    assert set(ends) <= special, "every answer ends with the token that ends a turn"
    has_image = (batch["input_ids"] == image_token_id(processor)).any(1).tolist()
    assert has_image == [True, False, True]
    bos = processor.tokenizer.bos_token_id
    if bos is not None and family != "idefics3":
        assert [(row == bos).sum().item() for row in batch["input_ids"]] == [1, 1, 1]


@pytest.mark.parametrize("family", EMBEDDED)
def test_a_family_trains_in_both_stages_on_mixed_rows(family: str, tmp_path: Path) -> None:
    """A step of DPO, then SFT that continues the adapter, with text-only rows among the others."""
    model = tiny_models.build(family, tmp_path / family)
    config = config_for(model, sft={"learning_rate": 0.01, "global_batch": 4})
    trainer: Any = make_dpo_trainer(config, pairs_in(config, write_pairs(tmp_path / "pairs", 4)), tmp_path / "dpo")
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    rows = write_rows(tmp_path / "rows", [False, True, False, True])

    sft: Any = make_sft_trainer(config, conversations_in(config, rows), tmp_path / "sft", tmp_path / "adapter")
    before = {name: p.detach().clone() for name, p in model_of(sft).named_parameters() if "lora_" in name}
    sft.train()
    after = dict(model_of(sft).named_parameters())
    assert any(before[name].any() for name in before if "lora_B" in name), "SFT starts from the adapter of DPO"
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_a_batch_that_lost_its_image_tokens_is_refused(tiny_llava: Path) -> None:
    """STIC's released trainer would go on silently with such rows: text-only DPO."""
    processor: Any = load_processor(ModelConfig(path=str(tiny_llava)))
    row = {
        "image": picture(0),
        "prompt": [{"role": "user", "content": "Describe."}],
        "chosen": [{"role": "assistant", "content": "Red."}],
        "rejected": [{"role": "assistant", "content": "Blue."}],
    }
    batch = PreferenceCollator(processor=processor)([dict(row), dict(row)])
    token = image_token_id(processor)
    check_image_tokens(batch["input_ids"], token, [True] * 4)
    lost = batch["input_ids"].clone()
    lost[1][lost[1] == token] = processor.tokenizer.pad_token_id
    with pytest.raises(AssertionError, match="rows with image tokens"):
        check_image_tokens(lost, token, [True] * 4)


def test_defaults_are_the_published_settings() -> None:
    settings = DPOConfig()
    assert (settings.beta, settings.alpha, settings.learning_rate, settings.global_batch) == (0.1, 1 / 1024, 1e-7, 8)
