"""From the configuration, the rows and the model that training starts from to a trainer."""

import logging
import multiprocessing
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from trl.trainer.dpo_config import DPOConfig as TRLDPOConfig
from trl.trainer.sft_config import SFTConfig as TRLSFTConfig

from stic_ray.core.config import RunConfig, WorkersConfig
from stic_ray.core.resources import accumulation_steps
from stic_ray.core.training import OptimisationConfig
from stic_ray.engines.loading import choose_dtype, load_processor
from stic_ray.engines.shared_prefix import reason_against
from stic_ray.stages.training.collators import AnswersOnlyCollator, PreferenceCollator, SharedPrefixCollator
from stic_ray.stages.training.data import ParquetRows, num_steps_of, read_pairs
from stic_ray.stages.training.index import TEXT_LOGPS, Rows
from stic_ray.stages.training.mixing import MixedRows
from stic_ray.stages.training.models import (
    REFERENCE,
    describe_parts,
    prepare_reference_adapter,
    prepare_start,
    set_trainable,
)
from stic_ray.stages.training.scores import views_of
from stic_ray.stages.training.trainers import LikelihoodTrainer, RegularisedDPOTrainer

logger = logging.getLogger(__name__)


def make_dpo_trainer(
    config: RunConfig, rows: Rows, folder: Path, checkpoint: Path | None = None, *, universal: bool = False
) -> RegularisedDPOTrainer | LikelihoodTrainer:
    """Return a trainer on pairs, starting from the model of the run, or from what a training left in `checkpoint`.

    `universal` says that it will go on from a checkpoint of its own in DeepSpeed's universal form.
    """
    pairs = read_pairs(config, rows)
    arguments = training_arguments(config, config.dpo, folder, rows, universal=universal)
    if config.dpo.objective == "sft":
        return _make_likelihood_trainer(config, config.dpo, pairs, arguments, checkpoint)
    start = prepare_start(config, checkpoint, folder)
    args = TRLDPOConfig(**arguments, disable_dropout=False)  # from here on ZeRO-3 cuts every new model into parts
    policy, reference = start.load(), None
    if config.tuning.method == "full":
        of_run = config.dpo.reference == "base" and checkpoint is not None
        reference = (prepare_start(config, None, folder) if of_run else start).load()
    if reference is not None:
        set_trainable(policy, start)
        if config.workers.zero_stage == 0:  # in other number formats than the policy's, it would begin elsewhere
            for name, parameter in reference.named_parameters():
                parameter.data = parameter.data.to(policy.get_parameter(name).dtype)
    views = views_of(config.dpo)
    collator = PreferenceCollator(load_processor(start.model), views)
    trainer = RegularisedDPOTrainer(start, config.dpo, pairs, collator, args=args, model=policy, ref_model=reference)
    trainer.speed.has_reference_pass = bool(views) or not rows.has_reference_logps
    if isinstance(policy, PeftModel):  # an adapter that was there before, of which TRL has made a frozen copy
        if config.dpo.reference == "base":
            policy.delete_adapter(REFERENCE)  # without any, the reference is the model below
        else:
            prepare_reference_adapter(policy)
    if not config.workers.share_prefix:
        reason = "workers.share_prefix=false"
    elif config.dpo.objective != "paper":
        reason = f"dpo.objective={config.dpo.objective} scores the logits of whole sequences"
    else:
        reason = reason_against(cast(Any, policy).config)
    if reason is None:
        trainer.data_collator = SharedPrefixCollator(collator.builder.processor, views)
    else:
        logger.warning("dpo: image and prompt are encoded once for each answer: %s", reason)
    return trainer


def make_sft_trainer(
    config: RunConfig, rows: Rows, folder: Path, checkpoint: Path | None = None, *, universal: bool = False
) -> LikelihoodTrainer:
    """Return a trainer on the answers of conversations, starting as that of `make_dpo_trainer`."""
    settings = config.sft
    columns = ["image", "messages"]
    weighed = [*columns, *([TEXT_LOGPS] if settings.prior_alpha else [])]
    if rows.plan is not None and rows.plan.sources is not None:
        trained = MixedRows(rows, weighed, config.seed, settings.image)
    else:
        trained = ParquetRows(
            rows.trained, weighed, seed=config.seed, global_batch=settings.global_batch, image=settings.image
        )
    held_out = ParquetRows(rows.held_out, columns, image=settings.image)
    arguments = training_arguments(config, settings, folder, rows, universal=universal)
    trainer = _make_likelihood_trainer(config, settings, (trained, held_out), arguments, checkpoint)
    cast(AnswersOnlyCollator, trainer.data_collator).prior_alpha = settings.prior_alpha
    return trainer


def _make_likelihood_trainer(
    config: RunConfig,
    stage: OptimisationConfig,
    rows: tuple[ParquetRows | MixedRows, ParquetRows],
    arguments: dict[str, Any],
    checkpoint: Path | None,
) -> LikelihoodTrainer:
    start = prepare_start(config, checkpoint, Path(arguments["output_dir"]))
    args = TRLSFTConfig(**arguments)  # before the model is loaded, as above
    collator = AnswersOnlyCollator(load_processor(start.model))
    trainer = LikelihoodTrainer(start, stage, rows, collator, args=args, model=start.load())
    trains_vision = bool({"vision_tower", "projector"} & set(describe_parts(trainer)["trained"]))
    collator.needs_image = trains_vision or config.workers.zero_stage == 3
    return trainer


def training_arguments(
    config: RunConfig, stage: OptimisationConfig, folder: Path, rows: Rows, *, universal: bool = False
) -> dict[str, Any]:
    """Return the settings of a stage that trains on these rows, under the names of transformers.

    `universal` says that training goes on from a checkpoint in DeepSpeed's universal form.
    """
    workers = config.workers
    num_steps = num_steps_of(stage, rows)
    on_gpu = workers.num_gpus > 0
    num_loaders = (4 if on_gpu else 0) if workers.num_loaders is None else workers.num_loaders
    if num_loaders:
        # A fork would copy the state of object store clients, CUDA and Ray, none of which lives on in a child.
        multiprocessing.set_forkserver_preload([PreferenceCollator.__module__])
    return {
        "output_dir": str(folder),
        "seed": config.seed,
        "num_train_epochs": stage.num_epochs,
        "max_steps": stage.num_steps or (rows.plan.num_steps if rows.plan else -1),
        "learning_rate": stage.learning_rate,
        # The plain `constant` of transformers has no warm-up.
        "lr_scheduler_type": "constant_with_warmup" if stage.schedule == "constant" else stage.schedule,
        # The first warm-up step has a learning rate of 0, so a run of one step must not be all warm-up.
        "warmup_steps": min(int(stage.warmup_share * num_steps), num_steps - 1),
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "per_device_train_batch_size": workers.micro_batch,
        "per_device_eval_batch_size": workers.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(stage.global_batch, workers),
        "gradient_checkpointing": workers.gradient_checkpointing,
        "activation_offloading": workers.offload_activations,
        "max_length": None,  # TRL would cut through image tokens; lengths were bounded when the rows were written
        "bf16": choose_dtype(config.model, on_gpu=on_gpu) is torch.bfloat16,
        "use_cpu": not on_gpu,
        "save_steps": workers.save_every_steps,
        "eval_strategy": "steps" if rows.held_out else "no",
        "eval_steps": workers.evaluate_every_steps or -(-num_steps // 4),
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",  # the dataset itself is in a seeded order
        "dataloader_num_workers": num_loaders,
        "dataloader_multiprocessing_context": "forkserver" if num_loaders else None,
        "deepspeed": deepspeed_settings(workers, universal=universal) if workers.zero_stage else None,
    }


def deepspeed_settings(workers: WorkersConfig, *, universal: bool = False) -> dict[str, Any]:
    """Return DeepSpeed's configuration; transformers fills in what is "auto"."""
    zero: dict[str, Any] = {
        "stage": workers.zero_stage,
        "overlap_comm": workers.num_gpus > 0,
        "contiguous_gradients": True,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    in_memory = {"device": "cpu", "pin_memory": workers.num_gpus > 0}
    if workers.offload_optimizer:
        zero["offload_optimizer"] = in_memory
    if workers.offload_parameters:
        zero["offload_param"] = in_memory
    return {
        "zero_optimization": zero,
        # torch's fused AdamW works on CPUs, too; DeepSpeed's own would be compiled on first use, with the CUDA toolkit.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": "auto"},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "checkpoint": {"load_universal": universal},
    }


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
