"""The model of a training: what it starts from, which of its weights are trained, and its reference."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import save_model
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel, Trainer, set_seed

from stic_ray.core.config import ModelConfig, RunConfig, TuningConfig
from stic_ray.core.training import Part
from stic_ray.engines.adapters import model_at
from stic_ray.engines.loading import choose_dtype, load_model, load_processor, make_skeleton, parts_of

REFERENCE = "ref"
"""TRL's name of the frozen copy of an adapter that a policy starts from."""


@dataclass(frozen=True)
class Start:
    """The model that a training starts from."""

    config: RunConfig
    model: ModelConfig
    dtype: torch.dtype
    new_adapter: LoraConfig | None
    """None for a model that is trained itself, or goes on from an adapter."""
    load: Callable[[], PreTrainedModel | PeftModel]
    """Loads the weights; an adapter that is there can be trained on. Raises ModelError."""


def prepare_start(config: RunConfig, checkpoint: Path | None, folder: Path) -> Start:
    """Look at the model that training starts from: base, adapter, or full model.

    Called before TRL's arguments are made, which have ZeRO-3 cut every new model into parts. A model that is trained
    whole from an adapter is merged first, into `folder`.
    """
    model, tuning = model_at(config.model, checkpoint), config.tuning
    dtype = choose_dtype(model, on_gpu=config.workers.num_gpus > 0)
    if model.adapter and tuning.method == "full":
        merged = cast(PreTrainedModel, load_model(model, dtype=dtype, merge=True))
        load_processor(model).save_pretrained(folder / "merged")
        merged.config.save_pretrained(folder / "merged")
        # transformers' own would write on a single worker, and each may be on a machine of its own.
        save_model(merged, str(folder / "merged" / "model.safetensors"), metadata={"format": "pt"})
        model = model_at(model, folder / "merged")
    new_adapter = make_adapter(model, tuning) if tuning.method != "full" and model.adapter is None else None
    quantization = make_quantization(model, dtype) if tuning.method == "qlora" else None
    load = partial(load_model, model, dtype=dtype, quantization=quantization, trainable=True)
    return Start(config, model, dtype, new_adapter, load)


def make_adapter(model: ModelConfig, tuning: TuningConfig) -> LoraConfig:
    """Return LoRA on all linear layers of the trained parts; a projector with a rate of its own is trained whole."""
    skeleton = make_skeleton(model)
    parts, modules = parts_of(skeleton), dict(skeleton.named_modules())
    whole = parts["projector"] if tuning.projector_learning_rate is not None else []
    prefixes = [prefix for part in sorted(tuning.trained) for prefix in parts[part] if prefix not in whole]
    layers = {
        name.rsplit(".", 1)[-1]
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and name.startswith(tuple(f"{prefix}." for prefix in prefixes))
    }
    inside = "|".join(prefix.replace(".", r"\.") for prefix in prefixes)
    return LoraConfig(
        r=tuning.lora_rank,
        lora_alpha=tuning.lora_alpha,
        lora_dropout=tuning.lora_dropout,
        target_modules=rf"({inside})\.(.*\.)?({'|'.join(sorted(layers))})",
        modules_to_save=[name for name in whole if name in modules] or None,
        task_type="CAUSAL_LM",
    )


def make_quantization(model: ModelConfig, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return QLoRA's 4 bits (arXiv:2305.14314) for the language model; what sees the image stays as it is."""
    parts = parts_of(make_skeleton(model))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*parts["vision_tower"], *parts["projector"], "lm_head"],
    )


def set_trainable(model: nn.Module, start: Start) -> None:
    """Leave frozen parts out of training, where a model is trained whole, and hold what is trained in its format.

    Without DeepSpeed, which keeps copies in float32 of what it trains, in float32: small steps vanish in bfloat16.
    """
    tuning, dtype = start.config.tuning, start.dtype if start.config.workers.zero_stage else torch.float32
    for part, parameter in parameters_of(model):
        if tuning.method == "full" and part in tuning.frozen:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def prepare_reference_adapter(policy: PeftModel) -> None:
    """Give the reference's adapter the weights and number formats of the policy's, those that ZeRO-3 has cut, too.

    It is left out of what is saved: it is that of the start, and would be taken for the policy's.
    """
    cast(Any, policy).save_pretrained = partial(policy.save_pretrained, selected_adapters=["default"])
    for name, parameter in policy.named_parameters():
        if f".{REFERENCE}." not in name:
            continue
        own = policy.get_parameter(name.replace(f".{REFERENCE}.", ".default."))
        if hasattr(parameter, "ds_id"):
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter, own], modifier_rank=0):
                parameter.data.copy_(own.data)
        else:
            parameter.data = own.data.clone()


def initialise_adapter(model: nn.Module, seed: int) -> None:
    """Draw a new adapter from the seed alone: loading a model takes random numbers, too, under ZeRO-3 others."""
    set_seed(seed)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.reset_lora_parameters("default", init_lora_weights=True)
        elif isinstance(layer, ModulesToSaveWrapper):
            for name, copy in layer.modules_to_save["default"].named_parameters():
                original = layer.original_module.get_parameter(name)
                if copy.dtype != original.dtype:  # TRL rounds what is trained beside weights of 4 bits
                    copy.data = original.data.clone()


def model_of(trainer: Trainer) -> nn.Module:
    """Return the model that a trainer trains."""
    assert isinstance(trainer.model, nn.Module), "the trainer was made with a model"
    return trainer.model


def describe_parts(trainer: Trainer) -> dict[str, Any]:
    """Return which parts of the model are trained, and which are frozen; the head belongs to the language model."""
    num_trainable: Counter[Part] = Counter()
    for part, parameter in parameters_of(model_of(trainer)):
        num_trainable[part] += num_weights(parameter) if parameter.requires_grad else 0
    return {
        "num_trainable_parameters": num_trainable.total(),
        "trained": sorted(part for part, number in num_trainable.items() if number),
        "frozen": sorted(part for part, number in num_trainable.items() if not number),
    }


def num_weights(parameter: nn.Parameter) -> int:
    """Return the number of weights, of which this process may hold a part (ZeRO-3), or packed (4 bits)."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else getattr(parameter, "ds_numel", parameter.numel())


def parameters_of(model: nn.Module) -> Iterator[tuple[Part, nn.Parameter]]:
    """Return all parameters with their parts; what is in no other belongs to the language model, as its head."""
    parts: dict[str, Part] = {prefix: part for part, prefixes in parts_of(model).items() for prefix in prefixes}
    for name, parameter in model.named_parameters():
        found: list[Part] = [part for prefix, part in parts.items() if name.startswith(prefix)]
        yield found[0] if found else "language_model", parameter
