"""From the configuration to a TRL trainer."""

import logging
from pathlib import Path
from typing import Any, cast

from trl.trainer.dpo_config import DPOConfig as TRLDPOConfig
from trl.trainer.sft_config import SFTConfig as TRLSFTConfig

from stic_ray.core.config import OptimisationConfig, RunConfig
from stic_ray.engines.loading import choose_dtype, is_adapter, load_model, load_processor
from stic_ray.engines.shared_prefix import why_not
from stic_ray.stages.training.arguments import training_arguments
from stic_ray.stages.training.batches import AnswersOnlyCollator, PreferenceCollator, SharedPrefixCollator
from stic_ray.stages.training.data import Conversations, read_conversations, read_pairs
from stic_ray.stages.training.feeding import PLACEHOLDER, feed, loader_arguments
from stic_ray.stages.training.index import Rows
from stic_ray.stages.training.trainers import LikelihoodTrainer, RegularisedDPOTrainer
from stic_ray.stages.training.tuning import freeze, make_adapter, model_of

logger = logging.getLogger(__name__)


def make_dpo_trainer(config: RunConfig, rows: Rows, folder: Path) -> RegularisedDPOTrainer | LikelihoodTrainer:
    """Return the trainer of stage `dpo`, the policy starting from the run's base model."""
    model = config.model
    trained, held_out = read_pairs(config, rows)
    if config.dpo.objective == "sft":
        trainer = _make_likelihood_trainer(config, config.dpo, rows, folder, None)
        feed(trainer, Conversations(trained), Conversations(held_out))
        return trainer
    dtype = choose_dtype(model, on_gpu=config.workers.num_gpus > 0)
    processor = load_processor(model)
    # Made before TRL's arguments, which turn ZeRO-3's partitioning of every new model on.
    adapter = make_adapter(model, config.tuning) if config.tuning.method == "lora" else None
    arguments = TRLDPOConfig(
        **training_arguments(config, config.dpo, folder, rows.num_trained),
        **loader_arguments(config, config.dpo, rows),
        disable_dropout=False,
        trust_remote_code=model.trust_remote_code,
        model_init_kwargs={"dtype": str(dtype).removeprefix("torch."), "revision": model.revision},
    )
    trainer = RegularisedDPOTrainer(
        model=model.path,
        args=arguments,
        settings=config.dpo,
        train_dataset=PLACEHOLDER,
        eval_dataset=PLACEHOLDER,
        processing_class=processor,
        data_collator=PreferenceCollator(processor=processor),
        peft_config=adapter,
    )
    feed(trainer, trained, held_out)
    trainer.has_reference_pass = not rows.has_reference_logps
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


def make_sft_trainer(config: RunConfig, rows: Rows, folder: Path, start: Path | None) -> LikelihoodTrainer:
    """Return the trainer of stage `sft`, going on from what `dpo` left in `start`, or from the run's base model."""
    trainer = _make_likelihood_trainer(config, config.sft, rows, folder, start)
    feed(trainer, *read_conversations(config, rows))
    return trainer


def _make_likelihood_trainer(
    config: RunConfig, settings: OptimisationConfig, rows: Rows, folder: Path, start: Path | None
) -> LikelihoodTrainer:
    """Return a trainer on the answers of `messages`, going on from an adapter, a full model, or the base model."""
    model = config.model
    dtype = choose_dtype(model, on_gpu=config.workers.num_gpus > 0)
    processor = load_processor(model)
    # Made before TRL's arguments, as in make_dpo_trainer.
    adapter = make_adapter(model, config.tuning) if start is None and config.tuning.method == "lora" else None
    # Made before the model: ZeRO-3 partitions weights while they are loaded.
    arguments = TRLSFTConfig(
        **training_arguments(config, settings, folder, rows.num_trained), **loader_arguments(config, settings, rows)
    )
    if start is not None and is_adapter(start):
        weights = load_model(model, dtype=dtype, adapter=start, trainable=True)
    else:
        origin = model if start is None else model.model_copy(update={"path": str(start), "revision": None})
        weights = load_model(origin, dtype=dtype)
        if adapter is None:
            freeze(weights, config.tuning)
    return LikelihoodTrainer(
        model=weights,
        args=arguments,
        train_dataset=PLACEHOLDER,
        eval_dataset=PLACEHOLDER,
        processing_class=processor,
        data_collator=AnswersOnlyCollator(processor=processor),
        peft_config=adapter,
    )
