"""Adapters: active when they are loaded, refused when they change nothing or belong elsewhere."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from stic_ray.core.config import ActorsConfig, ModelConfig
from stic_ray.core.errors import ModelError
from stic_ray.engines.adapters import check_adapter_active, is_adapter, read_adapter
from stic_ray.engines.base import Answer, Request, Sampling
from stic_ray.engines.loading import load_model
from stic_ray.engines.opening import open_engine
from tests.engines.conftest import Checkpoints
from tests.engines.families import scene

pytestmark = pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # PEFT's; our refusal is stronger

ADAPTER_WEIGHTS = "adapter_model.safetensors"
REQUESTS = [Request("Describe this picture.", scene(index)) for index in range(3)]


@pytest.fixture(scope="session")
def adapter(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained-looking adapter of the toy world's model, on the language model as the stages make it."""
    return make_adapter(checkpoint("toyworld"), tmp_path_factory.mktemp("adapters") / "trained")


def make_adapter(base: Path, target: Path) -> Path:
    torch.manual_seed(0)
    layers = r".*(language_model|text_model)\..*\.(q_proj|v_proj|up_proj)"
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=layers, task_type="CAUSAL_LM")
    model: Any = get_peft_model(load_model(ModelConfig(path=str(base)), dtype=torch.float32), settings)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(target)
    return target


def answers(base: Path, checkpoint: Path | None, *, merge: bool = False) -> list[Answer]:
    engine = open_engine(ModelConfig(path=str(base)), ActorsConfig(merge_adapter=merge), checkpoint)
    return engine.generate(REQUESTS, Sampling(12))


def adapted(base: Path, adapter: Path, *, trainable: bool = False) -> PeftModel:
    config = ModelConfig(path=str(base), adapter=str(adapter))
    model = load_model(config, dtype=torch.float32, trainable=trainable)
    assert isinstance(model, PeftModel)
    return model


def test_an_adapter_changes_what_is_said_as_its_merged_model_does(
    checkpoint: Checkpoints, adapter: Path, tmp_path: Path
) -> None:
    base = checkpoint("toyworld")
    merged = Path(shutil.copytree(base, tmp_path / "merged"))
    adapted(base, adapter).merge_and_unload().save_pretrained(merged)
    with_adapter = answers(base, adapter)
    assert [answer.text for answer in with_adapter] != [answer.text for answer in answers(base, None)]
    assert [answer.text for answer in with_adapter] == [answer.text for answer in answers(base, merged)]
    assert with_adapter == answers(base, adapter, merge=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_is_rounded_once(dtype: torch.dtype, checkpoint: Checkpoints, adapter: Path) -> None:
    model = ModelConfig(path=str(checkpoint("toyworld")), adapter=str(adapter))
    expected: Any = adapted(checkpoint("toyworld"), adapter).merge_and_unload().to(dtype)
    merged: Any = load_model(model, dtype=dtype, merge=True)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    for name, value in expected.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value)


def test_the_engine_is_named_after_what_was_loaded(checkpoint: Checkpoints, adapter: Path) -> None:
    base = checkpoint("toyworld")
    assert open_engine(ModelConfig(path=str(base)), ActorsConfig()).name == str(base)
    assert open_engine(ModelConfig(path=str(base)), ActorsConfig(), adapter).name == str(adapter)


def test_a_run_can_start_from_an_adapter(checkpoint: Checkpoints, adapter: Path, tmp_path: Path) -> None:
    """What a training leaves takes its place: an adapter that went on from it, or a whole model that holds it."""
    base = checkpoint("toyworld")
    model = ModelConfig(path=str(base), adapter=str(adapter))
    started = open_engine(model, ActorsConfig())
    assert started.generate(REQUESTS, Sampling(12)) == answers(base, adapter)
    assert started.revision == open_engine(ModelConfig(path=str(base)), ActorsConfig(), adapter).revision
    assert started.revision != open_engine(ModelConfig(path=str(base)), ActorsConfig()).revision
    other = with_weights(adapter, tmp_path / "other", lambda name, weight: -weight)
    merged = Path(shutil.copytree(base, tmp_path / "merged"))
    adapted(base, other).merge_and_unload().save_pretrained(merged)
    for left in (other, merged):
        assert open_engine(model, ActorsConfig(), left).generate(REQUESTS, Sampling(12)) == answers(base, other)


def test_an_adapter_and_a_model_are_told_apart(checkpoint: Checkpoints, adapter: Path) -> None:
    assert is_adapter(adapter)
    assert not is_adapter(checkpoint("toyworld"))


def test_only_an_adapter_that_goes_on_training_has_gradients(checkpoint: Checkpoints, adapter: Path) -> None:
    base = checkpoint("toyworld")
    trained = [name for name, p in adapted(base, adapter, trainable=True).named_parameters() if p.requires_grad]
    assert len(trained) == len(read_adapter(adapter))
    assert all(".lora_" in name for name in trained)
    frozen = adapted(base, adapter).named_parameters()
    assert not any(parameter.requires_grad for name, parameter in frozen if ".lora_" in name)


def with_weights(adapter: Path, target: Path, change: Any) -> Path:
    copy = Path(shutil.copytree(adapter, target))
    weights = {name: change(name, weight) for name, weight in load_file(copy / ADAPTER_WEIGHTS).items()}
    save_file({name: weight for name, weight in weights.items() if weight is not None}, copy / ADAPTER_WEIGHTS)
    return copy


def refusal(base: Path, adapter: Path) -> str:
    with pytest.raises(ModelError) as caught:
        adapted(base, adapter)
    assert str(adapter) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_adapter_of_zeros_is_refused(checkpoint: Checkpoints, adapter: Path, tmp_path: Path) -> None:
    """As LoRA begins: A random, B zero. It loads without a complaint and changes nothing."""
    zeros = with_weights(adapter, tmp_path / "zeros", lambda name, w: torch.zeros_like(w) if ".lora_B." in name else w)
    assert "changes nothing" in refusal(checkpoint("toyworld"), zeros)


def test_an_empty_adapter_is_refused(checkpoint: Checkpoints, adapter: Path, tmp_path: Path) -> None:
    """As LoRA under ZeRO-3 has been saved (github.com/huggingface/trl/issues/4416)."""
    refusal(checkpoint("toyworld"), with_weights(adapter, tmp_path / "empty", lambda name, weight: None))


def test_an_adapter_whose_names_are_not_the_models_is_refused(
    checkpoint: Checkpoints, adapter: Path, tmp_path: Path
) -> None:
    """PEFT passes over weights that it has no place for."""
    renamed = Path(shutil.copytree(adapter, tmp_path / "renamed"))
    weights = load_file(renamed / ADAPTER_WEIGHTS)
    save_file({name.replace("layers.0", "layers.7"): w for name, w in weights.items()}, renamed / ADAPTER_WEIGHTS)
    refusal(checkpoint("toyworld"), renamed)


@pytest.mark.parametrize("other", ["llava", "llava_next", "idefics3"])
def test_an_adapter_of_another_base_is_refused(other: str, checkpoint: Checkpoints, adapter: Path) -> None:
    refusal(checkpoint(other), adapter)


def test_a_checkpoint_that_is_not_there_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="missing"):
        answers(checkpoint("toyworld"), tmp_path / "missing")


def test_an_adapter_that_was_switched_off_is_noticed(checkpoint: Checkpoints, adapter: Path) -> None:
    model = adapted(checkpoint("toyworld"), adapter)
    check_adapter_active(model, adapter)
    with model.disable_adapter(), pytest.raises(ModelError, match="changes nothing"):
        check_adapter_active(model, adapter)


def test_an_adapter_that_was_changed_after_loading_is_noticed(checkpoint: Checkpoints, adapter: Path) -> None:
    model = adapted(checkpoint("toyworld"), adapter)
    weight = next(parameter for name, parameter in model.named_parameters() if ".lora_B." in name)
    with torch.no_grad():
        weight.zero_()
    with pytest.raises(ModelError):
        check_adapter_active(model, adapter)
