"""From the configuration to a TRL trainer: arguments, DeepSpeed, model parts."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, Trainer
from trl.trainer.dpo_config import DPOConfig as TRLDPOConfig
from trl.trainer.sft_config import SFTConfig as TRLSFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from stic_ray.core.config import (
    ModelConfig,
    OptimisationConfig,
    RunConfig,
    TuningConfig,
    WorkersConfig,
)
from stic_ray.core.resources import accumulation_steps
from stic_ray.engines.loading import choose_dtype, is_adapter, load_model, load_processor, parts_of
from stic_ray.engines.shared_prefix import why_not
from stic_ray.stages.training.batches import AnswersOnlyCollator, PreferenceCollator, SharedPrefixCollator
from stic_ray.stages.training.data import as_conversations, read_pairs, read_rows
from stic_ray.stages.training.trainers import RegularisedDPOTrainer

logger = logging.getLogger(__name__)


def start_deepspeed(workers: WorkersConfig) -> None:
    """Bring up DeepSpeed's own communication, which ZeRO-3 needs before a model is built."""
    if workers.zero_stage == 0:
        return
    import deepspeed
    import deepspeed.ops

    if workers.num_gpus == 0:
        # The shared-memory operator would be compiled on first use (39 s); plain gloo gives the same results.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if workers.num_gpus else "gloo", verbose=False)


def make_dpo_trainer(config: RunConfig, files: Sequence[Path], folder: Path) -> RegularisedDPOTrainer | SFTTrainer:
    """Return the trainer of stage `dpo`, the policy starting from the run's base model."""
    model = config.model
    dataset = read_pairs(config, files, folder)
    if config.dpo.objective == "sft":
        return _make_likelihood_trainer(config, config.dpo, as_conversations(dataset), folder, None)
    dtype = choose_dtype(model, on_gpu=config.workers.num_gpus > 0)
    processor = load_processor(model)
    # Made before TRL's arguments, which turn ZeRO-3's partitioning of every new model on.
    adapter = _lora(model, config.tuning) if config.tuning.method == "lora" else None
    arguments = TRLDPOConfig(
        **_arguments(config, config.dpo, folder, dataset.num_rows),
        disable_dropout=False,
        trust_remote_code=model.trust_remote_code,
        model_init_kwargs={"dtype": str(dtype).removeprefix("torch."), "revision": model.revision},
    )
    trainer = RegularisedDPOTrainer(
        model=model.path,
        args=arguments,
        settings=config.dpo,
        train_dataset=dataset,
        processing_class=processor,
        data_collator=PreferenceCollator(processor=processor),
        peft_config=adapter,
    )
    if config.tuning.method == "full":
        _freeze(model_of(trainer), config.tuning)
    reason = _why_no_shared_prefix(config, trainer)
    if reason is None:
        trainer.data_collator = SharedPrefixCollator(processor)
    else:
        logger.warning("dpo: image and prompt are encoded once for each answer: %s", reason)
    return trainer


def _why_no_shared_prefix(config: RunConfig, trainer: RegularisedDPOTrainer) -> str | None:
    if not config.workers.share_prefix:
        return "workers.share_prefix=false"
    if config.dpo.objective != "paper":
        return f"dpo.objective={config.dpo.objective} scores the logits of whole sequences"
    return why_not(cast(Any, model_of(trainer)).config)


def make_sft_trainer(config: RunConfig, files: Sequence[Path], folder: Path, start: Path | None) -> SFTTrainer:
    """Return the trainer of stage `sft`, going on from what `dpo` left in `start`, or from the run's base model."""
    dataset = read_rows(files, ["image", "messages"], folder)
    return _make_likelihood_trainer(config, config.sft, dataset, folder, start)


def _make_likelihood_trainer(
    config: RunConfig, settings: OptimisationConfig, dataset: Dataset, folder: Path, start: Path | None
) -> SFTTrainer:
    """Return a trainer on the answers of `messages`, going on from an adapter, a full model, or the base model."""
    model = config.model
    dtype = choose_dtype(model, on_gpu=config.workers.num_gpus > 0)
    processor = load_processor(model)
    # Made before TRL's arguments, as in make_dpo_trainer.
    adapter = _lora(model, config.tuning) if start is None and config.tuning.method == "lora" else None
    # Made before the model: ZeRO-3 partitions weights while they are loaded.
    arguments = TRLSFTConfig(**_arguments(config, settings, folder, dataset.num_rows))
    if start is not None and is_adapter(start):
        weights = load_model(model, dtype=dtype, adapter=start, trainable=True)
    else:
        origin = model if start is None else model.model_copy(update={"path": str(start), "revision": None})
        weights = load_model(origin, dtype=dtype)
        if adapter is None:
            _freeze(weights, config.tuning)
    return SFTTrainer(
        model=weights,
        args=arguments,
        train_dataset=dataset,
        processing_class=processor,
        data_collator=AnswersOnlyCollator(processor=processor),
        peft_config=adapter,
    )


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


def _arguments(config: RunConfig, stage: OptimisationConfig, folder: Path, num_rows: int) -> dict[str, Any]:
    workers = config.workers
    num_steps = stage.num_steps or -(-num_rows // stage.global_batch) * stage.num_epochs
    on_gpu = workers.num_gpus > 0
    return {
        "output_dir": str(folder),
        "seed": config.seed,
        "num_train_epochs": stage.num_epochs,
        "max_steps": stage.num_steps or -1,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": "cosine",
        # The first warm-up step has a learning rate of 0, so a run of one step must not be all warm-up.
        "warmup_steps": min(int(stage.warmup_share * num_steps), num_steps - 1),
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "per_device_train_batch_size": workers.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(stage.global_batch, workers),
        "gradient_checkpointing": workers.gradient_checkpointing,
        "max_length": None,  # TRL would cut through image tokens; lengths were bounded when the rows were written
        "bf16": on_gpu and choose_dtype(config.model, on_gpu=True) is torch.bfloat16,
        "use_cpu": not on_gpu,
        "dataloader_num_workers": 4 if on_gpu else 0,
        "save_steps": workers.save_every_steps,
        "save_total_limit": 1,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "deepspeed": _deepspeed(workers) if workers.zero_stage else None,
    }


def _deepspeed(workers: WorkersConfig) -> dict[str, Any]:
    return {
        "zero_optimization": {
            "stage": workers.zero_stage,
            "overlap_comm": workers.num_gpus > 0,
            "contiguous_gradients": True,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "bf16": {"enabled": "auto"},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
    }


def _lora(model: ModelConfig, tuning: TuningConfig) -> LoraConfig:
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


def _freeze(model: nn.Module, tuning: TuningConfig) -> None:
    parts = parts_of(model)
    frozen = tuple(prefix for part in tuning.freeze for prefix in parts[part])
    for name, parameter in model.named_parameters():
        if frozen and name.startswith(frozen):
            parameter.requires_grad_(False)
