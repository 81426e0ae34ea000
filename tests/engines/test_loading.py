"""Loading: weights that are not the model's are refused in one line, and what a model is made of is found."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForImageTextToText

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import ModelError
from stic_ray.engines.base import Sampling
from stic_ray.engines.batching import BatchLimits
from stic_ray.engines.loading import choose_dtype, load_model, parts_of
from stic_ray.engines.transformers_engine import TransformersEngine
from tests import tiny_models
from tests.engines.conftest import Checkpoints
from tests.engines.families import mixed_requests
from tests.engines.spoiling import BAD_WEIGHTS, edit_json, read_json, refusal


def load(model: ModelConfig) -> Any:
    return load_model(model, dtype=torch.float32)


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_that_are_not_the_models_are_refused(name: str, spoiled: Path) -> None:
    """Least of all may missing weights be made up: random layers would be trained without a word."""
    BAD_WEIGHTS[name](spoiled)
    refusal(load, spoiled)


def test_what_cannot_be_saved_is_mended_when_it_is_loaded(spoiled: Path, tmp_path: Path) -> None:
    """Vicuna's sampling flags without sampling would end a full fine-tuning at its first checkpoint."""
    edit_json(spoiled, "generation_config.json", temperature=0.9, top_p=0.6, output_scores=True)
    edit_json(spoiled, "config.json", repetition_penalty=1.2)
    model: Any = load(ModelConfig(path=str(spoiled)))
    model.save_pretrained(tmp_path / "saved")
    kept = read_json(tmp_path / "saved", "generation_config.json")
    assert {name: kept[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")} == {
        name: read_json(spoiled, "generation_config.json")[name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    assert "temperature" not in kept


def test_a_generation_config_that_can_be_saved_is_kept(spoiled: Path, tmp_path: Path) -> None:
    edit_json(spoiled, "generation_config.json", temperature=0.9, do_sample=True, repetition_penalty=1.05)
    model: Any = load(ModelConfig(path=str(spoiled)))
    model.save_pretrained(tmp_path / "saved")
    kept = read_json(tmp_path / "saved", "generation_config.json")
    assert (kept["temperature"], kept["repetition_penalty"]) == (0.9, 1.05)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_what_an_old_processor_lacks_is_taken_from_the_model(
    family: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """LLaVA's first conversions have neither field, and none of them counts the class token of CLIP."""
    old = Path(shutil.copytree(checkpoint(family), tmp_path / "old"))
    content = read_json(old, "processor_config.json")
    for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        del content[name]
    (old / "processor_config.json").write_text(json.dumps(content), encoding="utf-8")
    requests = mixed_requests()
    said, expected = (
        TransformersEngine(ModelConfig(path=str(path)), limits=BatchLimits(8, None), on_gpu=False).generate(
            requests, Sampling(4)
        )
        for path in (old, checkpoint(family))
    )
    assert said == expected


@pytest.mark.parametrize(
    ("setting", "on_gpu", "expected"),
    [
        ("auto", False, torch.float32),
        ("auto", True, torch.bfloat16),
        ("float32", True, torch.float32),
        ("bfloat16", False, torch.bfloat16),
    ],
)
def test_the_number_format_follows_device_and_setting(setting: Any, on_gpu: bool, expected: torch.dtype) -> None:
    assert choose_dtype(ModelConfig(dtype=setting), on_gpu=on_gpu) is expected


def test_the_weights_have_the_number_format(checkpoint: Checkpoints) -> None:
    model = load_model(ModelConfig(path=str(checkpoint("llava"))), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def skeleton(directory: Path) -> torch.nn.Module:
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(directory))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
@pytest.mark.parametrize("with_adapter", [False, True], ids=["plain", "adapted"])
def test_the_parts_of_a_model_are_found(family: str, with_adapter: bool, checkpoint: Checkpoints) -> None:
    """Each parameter but the output layer's is in exactly one part."""
    model = skeleton(checkpoint(family))
    if with_adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=r".*(language|text)_model.*q_proj"))  # type: ignore[arg-type]
    parts = parts_of(model)
    owners: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        prefixes = [(part, prefix) for part, found in parts.items() for prefix in found]
        owners[name] = [part for part, prefix in prefixes if name == prefix or name.startswith(f"{prefix}.")]
    homeless = [name for name, found in owners.items() if not found]
    assert all("lm_head" in name for name in homeless)
    assert all(len(found) <= 1 for found in owners.values())
    # Qwen's projector is a layer of its vision tower.
    expected = {"vision_tower", "language_model"} | (set() if family.startswith("qwen") else {"projector"})
    assert {found[0] for found in owners.values() if found} == expected
    assert all(found == ["language_model"] for name, found in owners.items() if "lora_" in name)


def test_a_network_without_a_language_model_is_refused() -> None:
    with pytest.raises(ModelError, match="Linear"):
        parts_of(torch.nn.Linear(2, 2))
