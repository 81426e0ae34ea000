"""Loading: what is no usable model is refused in one line, and what it is made of is found."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import ModelError
from stic_ray.engines.loading import check_model, choose_dtype, fingerprint, load_model, load_processor, parts_of
from stic_ray.engines.opening import check_engine
from tests import tiny_models
from tests.engines.conftest import Checkpoints
from tests.engines.families import EMBEDDED, NEED_TORCHVISION

WEIGHTS = "model.safetensors"
TORCHVISION = importlib.util.find_spec("torchvision") is not None


@pytest.fixture
def spoiled(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint("llava"), tmp_path / "model"))


def refusal(action: Callable[[ModelConfig], Any], path: Path, **settings: Any) -> str:
    """The message of a refusal: one line that names the path."""
    with pytest.raises(ModelError) as caught:
        action(ModelConfig(path=str(path), **settings))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", EMBEDDED)
def test_a_good_model_passes(family: str, checkpoint: Checkpoints) -> None:
    check_model(ModelConfig(path=str(checkpoint(family))))


def test_a_directory_that_is_not_there_is_called_that(tmp_path: Path) -> None:
    """Not told in terms of the hub: the user mistyped a path."""
    message = refusal(check_model, tmp_path / "missing")
    assert "Repo id" not in message
    assert "repo_type" not in message


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_the_extra_that_an_engine_needs_is_named(checkpoint: Checkpoints) -> None:
    with pytest.raises(ModelError, match=r"stic-ray\[vllm\]") as caught:
        check_engine(ModelConfig(path=str(checkpoint("llava")), engine="vllm"))
    assert "\n" not in str(caught.value)


def test_an_empty_directory_is_no_model(tmp_path: Path) -> None:
    assert "config.json" in refusal(check_model, tmp_path)


def write_text_only(directory: Path) -> None:
    shutil.rmtree(directory)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).save_pretrained(directory)


def read_json(directory: Path, name: str) -> dict[str, Any]:
    return json.loads((directory / name).read_text(encoding="utf-8"))


def edit_json(directory: Path, name: str, **changes: Any) -> None:
    (directory / name).write_text(json.dumps({**read_json(directory, name), **changes}), encoding="utf-8")


SPOILERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "text only": (write_text_only, "llama"),
    "pickled weights only": (lambda model: (model / WEIGHTS).rename(model / "pytorch_model.bin"), "safetensors"),
    "no chat template": (lambda model: (model / "chat_template.json").unlink(), "model.chat_template"),
    "no configuration": (lambda model: (model / "config.json").unlink(), ""),
    "broken configuration": (lambda model: (model / "config.json").write_text("{", encoding="utf-8"), "config.json"),
    "unknown type": (lambda model: edit_json(model, "config.json", model_type="lava"), "lava"),
    "no tokenizer": (lambda model: [file.unlink() for file in model.glob("tokenizer*")], ""),
    "no image processor": (
        lambda model: [(model / f"{name}_config.json").unlink() for name in ("preprocessor", "processor")],
        "",
    ),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_a_directory_that_is_no_usable_model_is_refused(name: str, spoiled: Path) -> None:
    spoil, told = SPOILERS[name]
    spoil(spoiled)
    assert told in refusal(check_model, spoiled)


def test_a_missing_chat_template_can_be_given(spoiled: Path) -> None:
    (spoiled / "chat_template.json").unlink()
    model = ModelConfig(path=str(spoiled), chat_template=tiny_models.LLAVA_TEMPLATE)
    check_model(model)
    question = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    assert load_processor(model).apply_chat_template([question], tokenize=False) == "<s>USER: Hi "


@pytest.mark.skipif(TORCHVISION, reason="torchvision is installed")
@pytest.mark.parametrize("family", NEED_TORCHVISION)
def test_a_family_that_needs_torchvision_names_the_extra(family: str, checkpoint: Checkpoints) -> None:
    assert "stic-ray[torchvision]" in refusal(check_model, checkpoint(family))


@pytest.mark.skipif(not TORCHVISION, reason="torchvision is not installed")
@pytest.mark.parametrize("family", NEED_TORCHVISION)
def test_a_family_that_needs_torchvision_passes_with_it(family: str, checkpoint: Checkpoints) -> None:
    check_model(ModelConfig(path=str(checkpoint(family))))


def load(model: ModelConfig) -> Any:
    return load_model(model, dtype=torch.float32)


def drop_a_layer(model: Path) -> None:
    weights = load_file(model / WEIGHTS)
    save_file({name: weight for name, weight in weights.items() if ".layers.1." not in name}, model / WEIGHTS)


def cut_off(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[: len(content) // 2])


BAD_WEIGHTS: dict[str, Callable[[Path], Any]] = {
    "pickled only": lambda model: (model / WEIGHTS).rename(model / "pytorch_model.bin"),
    "a pointer of git-lfs": lambda model: (model / WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 4242\n", encoding="utf-8"
    ),
    "half a download": cut_off,
    "of other sizes": lambda model: edit_json(
        model, "config.json", text_config={**read_json(model, "config.json")["text_config"], "hidden_size": 64}
    ),
    "a layer missing": drop_a_layer,
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_that_are_not_the_models_are_refused(name: str, spoiled: Path) -> None:
    """Least of all may missing weights be made up: random layers would be trained without a word."""
    BAD_WEIGHTS[name](spoiled)
    refusal(load, spoiled)


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


def test_the_fingerprint_is_that_of_the_weights(checkpoint: Checkpoints, spoiled: Path) -> None:
    before = fingerprint(ModelConfig(path=str(spoiled)))
    assert before == fingerprint(ModelConfig(path=str(checkpoint("llava")))), "the place does not matter"
    drop_a_layer(spoiled)
    assert fingerprint(ModelConfig(path=str(spoiled))) != before
    assert fingerprint(ModelConfig(path="owner/name", revision="abc")) == "abc"


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
