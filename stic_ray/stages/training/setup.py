"""From the configuration to a TRL trainer."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from trl.trainer.dpo_config import DPOConfig as TRLDPOConfig
from trl.trainer.sft_config import SFTConfig as TRLSFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from stic_ray.core.config import OptimisationConfig, RunConfig
from stic_ray.engines.loading import choose_dtype, is_adapter, load_model, load_processor
from stic_ray.engines.shared_prefix import why_not
from stic_ray.stages.training.arguments import training_arguments
from stic_ray.stages.training.batches import AnswersOnlyCollator, PreferenceCollator, SharedPrefixCollator
from stic_ray.stages.training.data import as_conversations, read_pairs, read_rows
from stic_ray.stages.training.trainers import RegularisedDPOTrainer
from stic_ray.stages.training.tuning import freeze, make_adapter, model_of

logger = logging.getLogger(__name__)


def make_dpo_trainer(config: RunConfig, files: Sequence[Path], folder: Path) -> RegularisedDPOTrainer | SFTTrainer:
    """Return the trainer of stage `dpo`, the policy starting from the run's base model."""
    model = config.model
    dataset = read_pairs(config, files, folder)
    if config.dpo.objective == "sft":
        return _make_likelihood_trainer(config, config.dpo, as_conversations(dataset), folder, None)
    dtype = choose_dtype(model, on_gpu=config.workers.num_gpus > 0)
    processor = load_processor(model)
    # Made before TRL's arguments, which turn ZeRO-3's partitioning of every new model on.
    adapter = make_adapter(model, config.tuning) if config.tuning.method == "lora" else None
    arguments = TRLDPOConfig(
        **training_arguments(config, config.dpo, folder, dataset.num_rows),
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
        freeze(model_of(trainer), config.tuning)
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
    adapter = make_adapter(model, config.tuning) if start is None and config.tuning.method == "lora" else None
    # Made before the model: ZeRO-3 partitions weights while they are loaded.
    arguments = TRLSFTConfig(**training_arguments(config, settings, folder, dataset.num_rows))
    if start is not None and is_adapter(start):
        weights = load_model(model, dtype=dtype, adapter=start, trainable=True)
    else:
        origin = model if start is None else model.model_copy(update={"path": str(start), "revision": None})
        weights = load_model(origin, dtype=dtype)
        if adapter is None:
            freeze(weights, config.tuning)
    return SFTTrainer(
        model=weights,
        args=arguments,
        train_dataset=dataset,
        processing_class=processor,
        data_collator=AnswersOnlyCollator(processor=processor),
        peft_config=adapter,
    )
