"""Which weights are trained: adapters, and parts of the model that stay as they are."""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    Trainer,
    set_seed,
)

from stic_ray.core.config import ModelConfig, TuningConfig
from stic_ray.core.errors import ConfigError, ModelError
from stic_ray.core.training import Part
from stic_ray.engines.loading import make_skeleton, parts_of


def check_tuning(model: ModelConfig, tuning: TuningConfig) -> None:
    """Raise UserError when the model has no projector for a rate of its own, or bitsandbytes is missing for qlora."""
    if tuning.method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("tuning.method=qlora needs bitsandbytes: install the extra stic-ray[qlora].")
    if tuning.projector_learning_rate is not None and not parts_of(make_skeleton(model))["projector"]:
        raise ConfigError(
            f"tuning.projector_learning_rate is set, but no part of model.path='{model.path}' is known as a projector."
        )


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


def choose_trained(model: nn.Module, tuning: TuningConfig, dtype: torch.dtype) -> None:
    """Leave frozen parts out of training, where a model is trained whole, and hold what is trained in `dtype`.

    That is float32 without DeepSpeed, which keeps copies in float32 of what it trains: small steps vanish in bfloat16.
    """
    parts = _prefixes(model)
    for name, parameter in model.named_parameters():
        if tuning.method == "full" and _part_of(name, parts) in tuning.frozen:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def hold_alike(reference: nn.Module, policy: nn.Module) -> None:
    """Hold the weights of a reference model in the number formats of the policy's, or they would begin apart."""
    held = dict(policy.named_parameters())
    for name, parameter in reference.named_parameters():
        parameter.data = parameter.data.to(held[name].dtype)


def draw_adapter(model: nn.Module, seed: int) -> None:
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


class PartTrainer(Trainer):
    """Gives the projector a learning rate of its own, and takes no step behind the last."""

    tuning: TuningConfig

    def _run_epoch(self, *arguments: Any, **keywords: Any) -> None:
        # transformers 5.19 goes on for a step when it resumes from the last one, unless an epoch ends there.
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*arguments, **keywords)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return transformers' optimiser with the projector in parameter groups of its own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if self.tuning.projector_learning_rate is not None and is_new:
            trained = model_of(self)
            parts = _prefixes(trained)
            own = {id(p) for name, p in trained.named_parameters() if _part_of(name, parts) == "projector"}
            _separate(optimizer, own, self.tuning.projector_learning_rate)
        return optimizer


def _separate(optimizer: torch.optim.Optimizer, own: set[int], learning_rate: float) -> None:
    """Move the parameters with these ids into groups with another learning rate; the schedule scales each group's."""
    for group in [*optimizer.param_groups]:
        params = group["params"]
        group["params"] = [p for p in params if id(p) not in own]
        optimizer.add_param_group({**group, "params": [p for p in params if id(p) in own], "lr": learning_rate})


def model_of(trainer: Trainer) -> nn.Module:
    """Return the model that a trainer trains."""
    assert isinstance(trainer.model, nn.Module), "the trainer was made with a model"
    return trainer.model


def describe_parts(trainer: Trainer) -> dict[str, Any]:
    """Say which parts of the model are trained, and which are frozen; the head belongs to the language model."""
    model = model_of(trainer)
    parts = _prefixes(model)
    num_trainable = dict.fromkeys([*parts.values(), "language_model"], 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            num_trainable[_part_of(name, parts)] += getattr(parameter, "ds_numel", parameter.numel())
    return {
        "num_trainable_parameters": sum(num_trainable.values()),
        "trained": sorted(part for part, number in num_trainable.items() if number),
        "frozen": sorted(part for part, number in num_trainable.items() if not number),
    }


def _prefixes(model: nn.Module) -> dict[str, Part]:
    """Return the part that each prefix of parameter names stands for."""
    return {prefix: part for part, prefixes in parts_of(model).items() for prefix in prefixes}


def _part_of(name: str, parts: Mapping[str, Part]) -> Part:
    """Return the part that a parameter belongs to; what is in no other belongs to the language model, as its head."""
    found: list[Part] = [part for prefix, part in parts.items() if name.startswith(prefix)]
    return found[0] if found else "language_model"
