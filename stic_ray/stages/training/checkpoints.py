"""Checkpoints: of an unfinished training, opened again by any number of workers, and what a finished one leaves."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
import torch
import torch.distributed
from filelock import FileLock
from ray.train import Checkpoint, CheckpointUploadMode
from safetensors import safe_open
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from stic_ray.core.config import WorkersConfig
from stic_ray.core.errors import StageError
from stic_ray.core.storage import Location
from stic_ray.engines.adapters import is_adapter
from stic_ray.engines.weight_names import use_hub_names

_NUM_WORKERS = "num_workers"
"""In the metadata of a checkpoint: how many workers wrote it."""
_OF_RANK = re.compile(r"(?:^|_)(?:zero_pp_rank|rng_state)_(\d+)[._]")
"""Files of a single worker: its part of ZeRO's state, and its random state."""


class CheckpointReporter(TrainerCallback):
    """Hands checkpoints to Ray Train, which uploads them while training goes on.

    Every rank reports what it wrote to its own folder, and Ray merges the folders: model and optimiser state of
    rank 0, and each rank's random state and ZeRO shard. Nothing is uploaded twice; the stock callback has all ranks
    upload all of a shared folder, some of it unwritten. A checkpoint counts when all of it is in the storage.
    """

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Report the checkpoint that was just written; its local folder goes when it is uploaded."""
        assert args.output_dir is not None, "training_arguments gives one"
        last = get_last_checkpoint(args.output_dir)
        assert last is not None, "transformers calls this behind a save"
        checkpoint = Checkpoint.from_directory(last)
        if state.is_world_process_zero:
            checkpoint.set_metadata({_NUM_WORKERS: args.world_size})
        is_behind = len([*Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]) > 1
        # The last one is waited for, as its folder goes with the worker, and so is a storage that is slower than we.
        wait = state.global_step >= state.max_steps or is_behind
        ray.train.report(
            {"step": state.global_step},
            checkpoint=checkpoint,
            checkpoint_upload_mode=CheckpointUploadMode.SYNC if wait else CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )


@dataclass(frozen=True)
class Resume:
    """What training goes on from."""

    folder: Path | None
    """A checkpoint of transformers; none for a training from its beginning."""
    universal: bool
    """Whether DeepSpeed is to read its universal form."""


@contextmanager
def last_checkpoint(workers: WorkersConfig) -> Iterator[Resume]:
    """Open the last checkpoint that was uploaded, on all workers together.

    ZeRO cuts optimiser state by the number of workers; when that has changed, it is put into DeepSpeed's universal
    form first. Raises StageError when DeepSpeed cannot do that.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield Resume(None, universal=False)
        return
    universal = workers.zero_stage > 0 and checkpoint.get_metadata()[_NUM_WORKERS] != workers.num_workers
    context = ray.train.get_context()
    rank, local_rank = context.get_world_rank(), context.get_local_rank()
    is_shared = isinstance(checkpoint.filesystem, pyarrow.fs.LocalFileSystem)
    if is_shared:
        folder = Path(checkpoint.path)
    else:
        ranks = range(rank - local_rank, rank - local_rank + context.get_local_world_size())  # those of this node
        folder = _download(checkpoint, ranks, workers.zero_stage, everything=universal)
    if universal and (rank if is_shared else local_rank) == 0:
        make_universal(folder)
    torch.distributed.barrier()
    try:
        yield Resume(folder, universal)
    finally:
        if not is_shared and local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _download(checkpoint: Checkpoint, ranks: range, zero_stage: int, *, everything: bool) -> Path:
    """Return a local copy of what the workers of a node need, which they share."""
    filesystem = checkpoint.filesystem
    assert filesystem is not None, "Ray Train gives one"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "stic_ray"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = cache / f"resume-{uuid.uuid5(uuid.NAMESPACE_URL, f'{checkpoint.path} {ranks}').hex}"
    with FileLock(f"{target}.lock"):
        if target.exists():
            return target
        partial = target.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a worker that was killed
        selector = pyarrow.fs.FileSelector(checkpoint.path, recursive=True)
        for file in filesystem.get_file_info(selector):
            name = os.path.relpath(file.path, checkpoint.path)
            if file.is_file and (everything or is_needed(name, ranks, zero_stage)):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                pyarrow.fs.copy_files(file.path, str(partial / name), source_filesystem=filesystem)
        partial.rename(target)
    return target


def is_needed(name: str, ranks: range, zero_stage: int) -> bool:
    """Whether workers of these ranks read a file of a checkpoint that as many workers wrote.

    Each reads its own part of ZeRO's state, which has the weights, too: those for other readers are left.
    """
    of_rank = _OF_RANK.search(os.path.basename(name))
    if of_rank is not None:
        return int(of_rank[1]) in ranks
    return zero_stage == 0 or not name.endswith(".safetensors")


def make_universal(checkpoint: Path) -> None:
    """Write DeepSpeed's universal form beside the shards of a checkpoint, unless it is there. Raises StageError."""
    if (checkpoint / "latest_universal").exists():  # written last
        return
    shards = checkpoint / (checkpoint / "latest").read_text(encoding="utf-8").strip()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    folders = ["--input_folder", str(shards), "--output_folder", f"{shards}_universal"]
    done = subprocess.run([*command, *folders], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.strip().splitlines()[-1:])
        raise StageError(
            f"DeepSpeed cannot cut the checkpoint for another number of workers: {reason} Use as many as before."
        )


class FirstSave(TrainerCallback):
    """Saves the model before the first step, and keeps hashes of its tensors in `record`.

    What cannot be saved is found before anything was spent on it, and at the end it can be seen what has changed.
    """

    def __init__(self, trainer: Trainer, folder: Path, record: Location) -> None:
        self._trainer, self._folder, self._record = trainer, folder, record

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save on all workers together, unless training goes on."""
        if state.global_step:
            return
        save(self._trainer, self._folder)
        if state.is_world_process_zero:
            self._record.write(json.dumps(hash_tensors(self._folder)).encode())
        shutil.rmtree(self._folder, ignore_errors=True)


def save(trainer: Trainer, folder: Path) -> None:
    """Save a model as a training leaves it; called by all workers, and rank 0 writes."""
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.yaml says the same in words
    if trainer.args.should_save and not is_adapter(folder):
        use_hub_names(folder)


def check_changed(saved: Path, before: Mapping[str, str]) -> dict[str, Any]:
    """Return how many tensors training changed, given the hashes of those that it started from.

    Raises StageError when that is none, or an adapter is all zero. (LoRA under ZeRO-3 has saved empty adapters:
    github.com/huggingface/trl/issues/4416.)
    """
    after = hash_tensors(saved)
    if before.keys() != after.keys():
        names = sorted(before.keys() ^ after.keys())[:4]
        raise StageError(f"the saved model has other tensors than its start: {names}")
    num_changed = sum(before[name] != found for name, found in after.items())
    facts = {"num_tensors": len(after), "num_changed_tensors": num_changed}
    if is_adapter(saved):
        facts["num_nonzero_lora_b"] = sum(bool(t.any()) for name, t in _tensors(saved) if ".lora_B." in name)
    if not num_changed or not facts.get("num_nonzero_lora_b", 1):
        raise StageError(f"training left the model as it was: {facts}")
    return facts


def hash_tensors(checkpoint: Path) -> dict[str, str]:
    """Return a hash of each tensor by its name; one is in memory at a time."""
    found = {}
    for name, tensor in _tensors(checkpoint):
        content = tensor.contiguous().flatten().view(torch.uint8).numpy()
        found[name] = hashlib.blake2b(content.data, digest_size=16).hexdigest()
    return found


def _tensors(checkpoint: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                yield name, opened.get_tensor(name)
