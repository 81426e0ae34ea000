"""Checkpoints of an unfinished training: handed to Ray Train, and opened again by any number of workers."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray.train
import torch.distributed
from pyarrow.fs import LocalFileSystem
from ray.train import Checkpoint, CheckpointUploadMode
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from stic_ray.core.config import WorkersConfig
from stic_ray.core.errors import StageError

_NUM_WORKERS = "num_workers"
"""In the metadata of a checkpoint: how many workers wrote it."""


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
    with checkpoint.as_directory() as path:  # a download for each node, which its workers share
        folder, context = Path(path), ray.train.get_context()
        is_shared = isinstance(checkpoint.filesystem, LocalFileSystem)
        if universal and (context.get_world_rank() if is_shared else context.get_local_rank()) == 0:
            make_universal(folder)
        torch.distributed.barrier()
        yield Resume(folder, universal)


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
