"""From the configuration to a TRL trainer."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from torch import nn
from transformers import BitsAndBytesConfig
from trl.trainer.dpo_config import DPOConfig as TRLDPOConfig
from trl.trainer.sft_config import SFTConfig as TRLSFTConfig

from stic_ray.core.config import RunConfig
from stic_ray.core.training import OptimisationConfig
from stic_ray.engines.adapters import is_adapter
from stic_ray.engines.loading import choose_dtype, load_model, load_processor, make_savable
from stic_ray.engines.shared_prefix import reason_against
from stic_ray.stages.training.arguments import training_arguments
from stic_ray.stages.training.batches import AnswersOnlyCollator, PreferenceCollator, SharedPrefixCollator
from stic_ray.stages.training.data import Conversations, VisionInEveryBatch, read_conversations, read_pairs
from stic_ray.stages.training.feeding import PLACEHOLDER, feed, loader_arguments
from stic_ray.stages.training.index import Rows
from stic_ray.stages.training.trainers import LikelihoodTrainer, RegularisedDPOTrainer
from stic_ray.stages.training.tuning import (
    choose_trained,
    describe_parts,
    draw_adapter,
    hold_alike,
    make_adapter,
    make_quantization,
    model_of,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Weights:
    """How the weights of a stage are loaded and trained."""

    dtype: torch.dtype
    adapter: LoraConfig | None
    """A new adapter; none for a model that is trained itself, or goes on from an adapter."""
    quantization: BitsAndBytesConfig | None


def _choose_weights(config: RunConfig, *, new_adapter: bool) -> _Weights:
    """Look at the model. Called before TRL's arguments are made, which have ZeRO-3 cut every new model into parts."""
    model, tuning = config.model, config.tuning
    dtype = choose_dtype(model, on_gpu=config.workers.num_gpus > 0)
    return _Weights(
        dtype,
        adapter=make_adapter(model, tuning) if new_adapter and tuning.method != "full" else None,
        quantization=make_quantization(model, dtype) if tuning.method == "qlora" else None,
    )


def make_dpo_trainer(
    config: RunConfig, rows: Rows, folder: Path, *, universal: bool = False
) -> RegularisedDPOTrainer | LikelihoodTrainer:
    """Return the trainer of stage `dpo`, the policy starting from the run's base model."""
    model = config.model
    trained, held_out = read_pairs(config, rows)
    if config.dpo.objective == "sft":
        likelihood = _make_likelihood_trainer(config, config.dpo, rows, folder, start=None, universal=universal)
        feed(likelihood, Conversations(trained), Conversations(held_out))
        return likelihood
    processor = load_processor(model)
    weights = _choose_weights(config, new_adapter=True)
    arguments = TRLDPOConfig(
        **training_arguments(config, config.dpo, folder, rows.num_trained, universal=universal),
        **loader_arguments(config, config.dpo, rows),
        disable_dropout=False,
        trust_remote_code=model.trust_remote_code,
        model_init_kwargs={"dtype": str(weights.dtype).removeprefix("torch."), "revision": model.revision},
    )
    trainer = RegularisedDPOTrainer(
        model=model.path,
        args=arguments,
        settings=config.dpo,
        train_dataset=PLACEHOLDER,
        eval_dataset=PLACEHOLDER,
        processing_class=processor,
        data_collator=PreferenceCollator(processor=processor),
        peft_config=weights.adapter,
        quantization_config=weights.quantization,
    )
    feed(trainer, trained, held_out)
    trainer.has_reference_pass = not rows.has_reference_logps
    _choose_trained(trainer, config, weights)
    if isinstance(trainer.ref_model, nn.Module) and config.workers.zero_stage == 0:
        hold_alike(cast(nn.Module, trainer.accelerator.unwrap_model(trainer.ref_model)), model_of(trainer))
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
    return reason_against(cast(Any, model_of(trainer)).config)


def make_sft_trainer(
    config: RunConfig, rows: Rows, folder: Path, start: Path | None, *, universal: bool = False
) -> LikelihoodTrainer:
    """Return the trainer of stage `sft`, going on from what `dpo` left in `start`, or from the run's base model."""
    trainer = _make_likelihood_trainer(config, config.sft, rows, folder, start=start, universal=universal)
    feed(trainer, *read_conversations(config, rows))
    return trainer


def _make_likelihood_trainer(
    config: RunConfig,
    settings: OptimisationConfig,
    rows: Rows,
    folder: Path,
    *,
    start: Path | None,
    universal: bool,
) -> LikelihoodTrainer:
    """Return a trainer on the answers of `messages`, going on from an adapter, a full model, or the base model."""
    model = config.model
    processor = load_processor(model)
    weights = _choose_weights(config, new_adapter=start is None)
    arguments = TRLSFTConfig(
        **training_arguments(config, settings, folder, rows.num_trained, universal=universal),
        **loader_arguments(config, settings, rows),
    )
    how: dict[str, Any] = {"dtype": weights.dtype, "quantization": weights.quantization}
    if start is not None and is_adapter(start):
        loaded = load_model(model, adapter=start, trainable=True, **how)
    else:
        origin = model if start is None else model.model_copy(update={"path": str(start), "revision": None})
        loaded = load_model(origin, **how)
    trainer = LikelihoodTrainer(
        model=loaded,
        args=arguments,
        train_dataset=PLACEHOLDER,
        eval_dataset=PLACEHOLDER,
        processing_class=processor,
        data_collator=AnswersOnlyCollator(processor=processor),
        peft_config=weights.adapter,
    )
    _choose_trained(trainer, config, weights)
    trains_vision = bool({"vision_tower", "projector"} & set(describe_parts(trainer)["trained"]))
    if trains_vision or config.workers.zero_stage == 3:
        trainer.data_collator = VisionInEveryBatch(trainer.data_collator)
    return trainer


def _choose_trained(trainer: RegularisedDPOTrainer | LikelihoodTrainer, config: RunConfig, weights: _Weights) -> None:
    trainer.tuning = config.tuning
    if config.tuning.method == "full":
        make_savable(cast(Any, model_of(trainer)))  # TRL has loaded the policy of `dpo` itself
    if weights.adapter is not None:
        draw_adapter(model_of(trainer), config.seed)
    choose_trained(model_of(trainer), config.tuning, weights.dtype if config.workers.zero_stage else torch.float32)
