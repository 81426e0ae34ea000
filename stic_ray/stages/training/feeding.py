"""How rows reach a trainer: TRL is made with a placeholder, as it takes datasets of `datasets` only."""

import multiprocessing
from typing import Any

import datasets
from torch.utils.data import Dataset
from transformers import Trainer

from stic_ray.core.config import RunConfig
from stic_ray.core.training import OptimisationConfig
from stic_ray.stages.training.arguments import num_optimiser_steps
from stic_ray.stages.training.data import ParquetRows
from stic_ray.stages.training.index import Rows

PLACEHOLDER = datasets.Dataset.from_list(
    [{"image": None, "prompt": None, "chosen": None, "rejected": None, "messages": None}]
)
"""Stands for the rows while a trainer is made, which looks at the names of the columns only."""


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


def feed(trainer: Trainer, trained: Dataset[Any], held_out: Dataset[Any]) -> None:
    """Give a trainer the rows that it was made without."""
    trainer.train_dataset, trainer.eval_dataset = trained, held_out


def num_rows_of(dataset: Any) -> int:
    """Return how many rows there are, without those that fill up an epoch."""
    return dataset.num_rows
