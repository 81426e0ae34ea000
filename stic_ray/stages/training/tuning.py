"""Which weights are trained: adapters, and parts of the model that stay as they are."""

from typing import Any

from accelerate import init_empty_weights
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, Trainer

from stic_ray.core.config import ModelConfig, TuningConfig
from stic_ray.engines.loading import parts_of


def make_adapter(model: ModelConfig, tuning: TuningConfig) -> LoraConfig:
    """LoRA on all linear layers of the language model."""
    with init_empty_weights():
        settings = AutoConfig.from_pretrained(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        skeleton = AutoModelForImageTextToText.from_config(settings, trust_remote_code=model.trust_remote_code)
    prefixes = parts_of(skeleton)["language_model"]
    layers = {
        name.rsplit(".", 1)[-1]
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and any(name.startswith(f"{prefix}.") for prefix in prefixes)
    }
    inside = "|".join(prefix.replace(".", r"\.") for prefix in prefixes)
    return LoraConfig(
        r=tuning.lora_rank,
        lora_alpha=tuning.lora_alpha,
        lora_dropout=tuning.lora_dropout,
        target_modules=rf"({inside})\..*\.({'|'.join(sorted(layers))})",
        task_type="CAUSAL_LM",
    )


def freeze(model: nn.Module, tuning: TuningConfig) -> None:
    """Leave the parts that `tuning.freeze` names out of training."""
    parts = parts_of(model)
    frozen = tuple(prefix for part in tuning.freeze for prefix in parts[part])
    for name, parameter in model.named_parameters():
        if frozen and name.startswith(frozen):
            parameter.requires_grad_(False)


def model_of(trainer: Trainer) -> nn.Module:
    """Return the model that a trainer trains."""
    assert isinstance(trainer.model, nn.Module), "the trainer was made with a model"
    return trainer.model


def describe_parts(trainer: Trainer) -> dict[str, Any]:
    """Say which parts of the model are trained, and which are frozen."""
    model = model_of(trainer)
    num_trainable: dict[str, int] = {}
    parts = {prefix: part for part, prefixes in parts_of(model).items() for prefix in prefixes}
    for name, parameter in model.named_parameters():
        part = next((part for prefix, part in parts.items() if name.startswith(prefix)), "lm_head")
        size = getattr(parameter, "ds_numel", parameter.numel())
        num_trainable[part] = num_trainable.get(part, 0) + (size if parameter.requires_grad else 0)
    return {
        "num_trainable_parameters": sum(num_trainable.values()),
        "trained": sorted(part for part, number in num_trainable.items() if number),
        "frozen": sorted(part for part, number in num_trainable.items() if not number),
    }
