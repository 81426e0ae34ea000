"""Settings of a training under the names of transformers, the data loaders and DeepSpeed."""

import multiprocessing
from pathlib import Path
from typing import Any

import torch

from stic_ray.core.config import RunConfig, WorkersConfig
from stic_ray.core.resources import accumulation_steps
from stic_ray.core.training import OptimisationConfig
from stic_ray.engines.loading import choose_dtype
from stic_ray.stages.training.data import ParquetRows
from stic_ray.stages.training.index import Rows

_SCHEDULES = {"constant": "constant_with_warmup"}
"""Names of transformers that are not ours: its plain `constant` has no warm-up."""


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


def num_optimiser_steps(stage: OptimisationConfig, num_rows: int) -> int:
    """Return how many steps a stage takes over so many rows."""
    return stage.num_steps or -(-num_rows // stage.global_batch) * stage.num_epochs


def training_arguments(
    config: RunConfig, stage: OptimisationConfig, folder: Path, num_rows: int, *, universal: bool = False
) -> dict[str, Any]:
    """Return the settings of a stage that trains on so many rows, under the names of transformers.

    `universal` says that training goes on from a checkpoint in DeepSpeed's universal form.
    """
    workers = config.workers
    num_steps = num_optimiser_steps(stage, num_rows)
    on_gpu = workers.num_gpus > 0
    return {
        "output_dir": str(folder),
        "seed": config.seed,
        "num_train_epochs": stage.num_epochs,
        "max_steps": stage.num_steps or -1,
        "learning_rate": stage.learning_rate,
        "lr_scheduler_type": _SCHEDULES.get(stage.schedule, stage.schedule),
        # The first warm-up step has a learning rate of 0, so a run of one step must not be all warm-up.
        "warmup_steps": min(int(stage.warmup_share * num_steps), num_steps - 1),
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "per_device_train_batch_size": workers.micro_batch,
        "gradient_accumulation_steps": accumulation_steps(stage.global_batch, workers),
        "gradient_checkpointing": workers.gradient_checkpointing,
        "activation_offloading": workers.offload_activations,
        "max_length": None,  # TRL would cut through image tokens; lengths were bounded when the rows were written
        "bf16": choose_dtype(config.model, on_gpu=on_gpu) is torch.bfloat16,
        "use_cpu": not on_gpu,
        "save_steps": workers.save_every_steps,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "deepspeed": deepspeed_settings(workers, universal=universal) if workers.zero_stage else None,
    }


def loader_arguments(config: RunConfig, stage: OptimisationConfig, rows: Rows) -> dict[str, Any]:
    """Return the settings of the loaders and of the evaluation, under the names of transformers."""
    workers = config.workers
    num_loaders = (4 if workers.num_gpus else 0) if workers.num_loaders is None else workers.num_loaders
    if num_loaders:
        # A fork would copy the state of object store clients, CUDA and Ray, none of which lives on in a child.
        multiprocessing.set_forkserver_preload([ParquetRows.__module__])
    quarter = -(-num_optimiser_steps(stage, rows.num_trained) // 4)
    return {
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",  # the dataset itself is in a seeded order
        "dataloader_num_workers": num_loaders,
        "dataloader_multiprocessing_context": "forkserver" if num_loaders else None,
        "eval_strategy": "steps" if rows.held_out else "no",
        "eval_steps": workers.evaluate_every_steps or quarter,
        "per_device_eval_batch_size": workers.micro_batch,
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
