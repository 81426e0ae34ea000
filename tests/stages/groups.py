"""A training group without Ray: two gloo processes that build and run many trainers, one after another."""

import json
import os
import pickle
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
from accelerate.state import AcceleratorState
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from stic_ray.core.config import RunConfig
from stic_ray.stages.cluster import process_environment
from stic_ray.stages.training.building import start_deepspeed

Look = Callable[[RunConfig, Path], dict[str, Any]]
"""Builds a trainer, trains, and says what was found; runs in every process of the group."""


def run_group(look: Look, configs: Mapping[str, RunConfig], folder: Path, num_processes: int = 2) -> dict[str, Any]:
    """Return what `look` found with each configuration, of rank 0. Starting the group is most of the time."""
    folder.mkdir(parents=True)
    (folder / "work").write_bytes(pickle.dumps((look, dict(configs))))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_run, (num_processes, port, str(folder)), nprocs=num_processes)
    return json.loads((folder / "found.json").read_text())


def _run(rank: int, num_processes: int, port: int, name: str) -> None:
    folder = Path(name)
    look, configs = pickle.loads((folder / "work").read_bytes())
    os.environ |= process_environment(next(iter(configs.values()))) | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_TORCH_DEVICE": "cpu",
    }
    torch.distributed.init_process_group("gloo")
    found = {}
    for name, config in configs.items():
        AcceleratorState._reset_state(True)
        start_deepspeed(config.workers)
        found[name] = look(config, folder / f"{name}-rank{rank}")
        unset_hf_deepspeed_config()
    if rank == 0:
        (folder / "found.json").write_text(json.dumps(found))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
