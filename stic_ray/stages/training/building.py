"""From the configuration, the rows and the model that training starts from to a trainer."""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from trl.trainer.dpo_config import DPOConfig as TRLDPOConfig
from trl.trainer.sft_config import SFTConfig as TRLSFTConfig

from stic_ray.core.config import RunConfig
from stic_ray.core.training import OptimisationConfig
from stic_ray.engines.loading import load_processor
from stic_ray.engines.shared_prefix import reason_against
from stic_ray.stages.training.batches import AnswersOnlyCollator, PreferenceCollator, SharedPrefixCollator
from stic_ray.stages.training.data import Conversations, VisionInEveryBatch, read_conversations, read_pairs
from stic_ray.stages.training.index import Rows
from stic_ray.stages.training.models import (
    Start,
    describe_parts,
    initialise_adapter,
    match_dtypes,
    model_of,
    prepare_reference_adapter,
    prepare_start,
    set_trainable,
)
from stic_ray.stages.training.settings import loader_arguments, training_arguments
from stic_ray.stages.training.trainers import LikelihoodTrainer, RegularisedDPOTrainer, StepTrainer

logger = logging.getLogger(__name__)


def make_dpo_trainer(
    config: RunConfig, rows: Rows, folder: Path, checkpoint: Path | None = None, *, universal: bool = False
) -> RegularisedDPOTrainer | LikelihoodTrainer:
    """Return a trainer on pairs, starting from the model of the run, or from what a training left in `checkpoint`.

    `universal` says that it will go on from a checkpoint of its own in DeepSpeed's universal form.
    """
    trained, held_out = read_pairs(config, rows)
    if config.dpo.objective == "sft":
        datasets = Conversations(trained), Conversations(held_out)
        return _likelihood(config, config.dpo, rows, datasets, folder, checkpoint, universal=universal)
    start = prepare_start(config, checkpoint, folder)
    processor = load_processor(start.model)
    arguments = TRLDPOConfig(**_arguments(config, config.dpo, rows, folder, universal=universal), disable_dropout=False)
    policy, reference = start.load(), start.load() if config.tuning.method == "full" else None
    if reference is not None:
        _set_trainable(policy, config, start)
        if config.workers.zero_stage == 0:
            match_dtypes(reference, policy)
    trainer = RegularisedDPOTrainer(
        config=config,
        model=policy,
        ref_model=reference,
        args=arguments,
        train_dataset=trained,
        eval_dataset=held_out,
        processing_class=processor,
        data_collator=PreferenceCollator(processor),
        peft_config=start.new_adapter,
    )
    trainer.speed.has_reference_pass = not rows.has_reference_logps
    _finish(trainer, start)
    if isinstance(policy, PeftModel):  # an adapter that was there before, of which TRL has made a frozen copy
        prepare_reference_adapter(policy)
    reason = _reason_against_shared_prefix(config, policy)
    if reason is None:
        trainer.data_collator = SharedPrefixCollator(processor)
    else:
        logger.warning("dpo: image and prompt are encoded once for each answer: %s", reason)
    return trainer


def make_sft_trainer(
    config: RunConfig, rows: Rows, folder: Path, checkpoint: Path | None = None, *, universal: bool = False
) -> LikelihoodTrainer:
    """Return a trainer on the answers of conversations, starting as that of `make_dpo_trainer`."""
    datasets = read_conversations(config, rows)
    return _likelihood(config, config.sft, rows, datasets, folder, checkpoint, universal=universal)


def _likelihood(
    config: RunConfig,
    settings: OptimisationConfig,
    rows: Rows,
    datasets: tuple[Any, Any],
    folder: Path,
    checkpoint: Path | None,
    *,
    universal: bool,
) -> LikelihoodTrainer:
    start = prepare_start(config, checkpoint, folder)
    processor = load_processor(start.model)
    arguments = TRLSFTConfig(**_arguments(config, settings, rows, folder, universal=universal))
    trainer = LikelihoodTrainer(
        config=config,
        model=start.load(),
        args=arguments,
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        processing_class=processor,
        data_collator=AnswersOnlyCollator(processor),
        peft_config=start.new_adapter,
    )
    _finish(trainer, start)
    trains_vision = bool({"vision_tower", "projector"} & set(describe_parts(trainer)["trained"]))
    if trains_vision or config.workers.zero_stage == 3:
        trainer.data_collator = VisionInEveryBatch(trainer.data_collator)
    return trainer


def _arguments(
    config: RunConfig, settings: OptimisationConfig, rows: Rows, folder: Path, *, universal: bool
) -> dict[str, Any]:
    arguments = training_arguments(config, settings, folder, rows.num_trained, universal=universal)
    return {**arguments, **loader_arguments(config, settings, rows)}


def _finish(trainer: StepTrainer, start: Start) -> None:
    """Draw a new adapter from the seed, and choose what is trained, once TRL has built around the model."""
    if start.new_adapter is not None:
        initialise_adapter(model_of(trainer), trainer.config.seed)
    _set_trainable(model_of(trainer), trainer.config, start)


def _set_trainable(model: nn.Module, config: RunConfig, start: Start) -> None:
    set_trainable(model, config.tuning, start.dtype if config.workers.zero_stage else torch.float32)


def _reason_against_shared_prefix(config: RunConfig, policy: Any) -> str | None:
    if not config.workers.share_prefix:
        return "workers.share_prefix=false"
    if config.dpo.objective != "paper":
        return f"dpo.objective={config.dpo.objective} scores the logits of whole sequences"
    return reason_against(cast(Any, policy).config)
