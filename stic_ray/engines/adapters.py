"""PEFT adapters: where they are, whether they change anything, and how they become part of the weights."""

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import ModelError, type_and_message
from stic_ray.core.storage import Location
from stic_ray.core.training import Part

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PART_NAMES: dict[Part, tuple[str, ...]] = {
    "vision_tower": ("vision_tower", "vision_model", "visual"),
    "projector": ("multi_modal_projector", "connector", "image_newline"),
    "language_model": ("language_model", "text_model"),
}


def adapter_of(model: ModelConfig) -> Path | None:
    """Return a local copy of the adapter that the run starts from, or None without one."""
    if model.adapter is None:
        return None
    place = Location.of(model.adapter)
    if not place.is_folder():
        raise ModelError(f"model.adapter='{model.adapter}' is no folder.")
    adapter = place.local_copy()
    check_adapter_files(adapter)
    return adapter


def model_at(model: ModelConfig, checkpoint: Path | None) -> ModelConfig:
    """Return the model of the run, or what a training left in `checkpoint`: an adapter, or a full model.

    An adapter of either is a local folder.
    """
    if checkpoint is None:
        adapter = adapter_of(model)
        return model.model_copy(update={"adapter": str(adapter) if adapter else None})
    if is_adapter(checkpoint):  # went on from the adapter that the run starts from, and holds it
        return model.model_copy(update={"adapter": str(checkpoint)})
    return model.model_copy(update={"path": str(checkpoint), "revision": None, "adapter": None})


def check_adapter_files(adapter: Path) -> None:
    """Raise ModelError unless a folder holds an adapter with weights in safetensors, the only kind that is read."""
    missing = [name for name in (CONFIG, WEIGHTS) if not (adapter / name).is_file()]
    if missing:
        raise ModelError(f"The adapter '{adapter}' has no {' and no '.join(missing)}.")


def check_adapter_fits(adapter: Path, skeleton: PreTrainedModel) -> None:
    """Raise ModelError unless the adapter has the names and shapes of one on this model, whose weights are not read."""
    try:
        settings = PeftConfig.from_pretrained(str(adapter))
        settings.base_model_name_or_path = None  # models move
        adapted = get_peft_model(skeleton, settings)
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        found = read_adapter(adapter)
    except Exception as error:  # of PEFT, safetensors or JSON, whatever the files hold
        raise ModelError(f"The adapter '{adapter}' cannot be loaded: {type_and_message(error)}") from error
    names = sorted(found.keys() ^ expected.keys())
    names += [name for name in found.keys() & expected.keys() if found[name].shape != expected[name].shape]
    if names:
        raise ModelError(f"The adapter '{adapter}' does not fit its base model, '{names[0]}' for one.")
    if not any(".lora_B." in name and weight.any() for name, weight in found.items()):
        raise ModelError(f"The adapter '{adapter}' changes nothing: its matrices are zero.")


def check_adapter_active(model: PeftModel, adapter: Path) -> None:
    """Raise ModelError unless every tensor of the adapter's file is loaded, active, and not all are zero."""
    name_of_adapter = str(model.active_adapter)
    loaded = get_peft_model_state_dict(model, adapter_name=name_of_adapter, save_embedding_layers=False)
    num_active = 0
    for key, expected in read_adapter(adapter).items():
        if key not in loaded or not torch.equal(loaded[key].cpu(), expected.to(loaded[key].dtype)):
            raise ModelError(f"The adapter '{adapter}' does not fit its base model: '{key}' was not loaded.")
        num_active += bool(".lora_B." in key and expected.any())
    layers = _lora_layers(model)
    are_active = [not layer.disable_adapters and name_of_adapter in layer.active_adapters for layer in layers]
    if not layers or not all(are_active) or not num_active:
        raise ModelError(f"The adapter '{adapter}' changes nothing: {num_active} of its matrices are not zero.")


def read_adapter(adapter: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a saved adapter."""
    return load_file(adapter / WEIGHTS)


def parts_of_adapter(adapter: Path) -> set[Part]:
    """Return the parts of a model that a saved adapter changes."""
    known: dict[str, Part] = {name: part for part, names in PART_NAMES.items() for name in names}
    with safe_open(adapter / WEIGHTS, "pt") as file:
        words = [name.split(".") for name in file.offset_keys()]
    found: list[list[Part]] = [[known[name] for name in names if name in known] for names in words]
    return {parts[0] for parts in found if parts}


def is_adapter(checkpoint: Path) -> bool:
    """Whether a checkpoint folder holds a PEFT adapter rather than a full model."""
    return (checkpoint / CONFIG).is_file()


def merge_adapter(adapted: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """Add the adapter to the weights, a layer at a time in float32, so that no second model is held."""
    for layer in _lora_layers(adapted):
        base = layer.get_base_layer().to(torch.float32)
        layer.merge()
        base.to(dtype)
    merged = cast(Any, adapted).unload()
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(dtype)  # not the buffers: rotary frequencies stay in float32
    return merged


def _lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]
