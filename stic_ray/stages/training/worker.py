"""What each training worker runs: build the trainer, go on from the last checkpoint, train, and save what changed."""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import ray.train
import torch
import torch.distributed
from ray.train import Checkpoint, CheckpointUploadMode
from safetensors import safe_open
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from stic_ray.core.config import WorkersConfig
from stic_ray.core.errors import StageError
from stic_ray.core.steps import CHECKPOINT, StepRun
from stic_ray.core.storage import Location
from stic_ray.engines.adapters import is_adapter
from stic_ray.engines.weight_names import use_hub_names
from stic_ray.stages.tasks import end_with_parent
from stic_ray.stages.training.building import make_dpo_trainer, make_sft_trainer, start_deepspeed
from stic_ray.stages.training.index import Rows
from stic_ray.stages.training.launch import WorkerFailure
from stic_ray.stages.training.models import describe_parts
from stic_ray.stages.training.reporting import MetricsFile, Progress, add_trackers, start_trackers, summarise

_NUM_WORKERS = "num_workers"
"""In the metadata of a checkpoint: how many workers wrote it."""
_OF_RANK = re.compile(r"(?:^|_)(?:zero_pp_rank|rng_state)_(\d+)[._]")
"""Files of a single worker: its part of ZeRO's state, and its random state."""


def train_worker(section: Literal["dpo", "sft"], step: StepRun, rows: Rows, record: Location) -> None:
    """Train as one of the workers of a step; rank 0 leaves checkpoint, metrics and result in the step's folder.

    `section` of the configuration has the settings, and `record` is the file in which hashes of the weights at the
    start wait for the end. Raises WorkerFailure.
    """
    end_with_parent()
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    config, run = step.config, step.output
    folder = Path(tempfile.mkdtemp(prefix=f"stic_ray_{step.name}_"))
    metrics = MetricsFile(run, folder)
    progress = Progress(step.name, section, metrics)
    is_first = ray.train.get_context().get_world_rank() == 0
    try:
        if is_first:
            start_trackers(config, run)
        start_deepspeed(config.workers)
        start = step.model()
        make_trainer = {"dpo": make_dpo_trainer, "sft": make_sft_trainer}[section]
        with last_checkpoint(config.workers, record.folder) as (resume, universal):
            trainer = make_trainer(config, rows, folder, start.local_copy() if start else None, universal=universal)
            facts = describe_parts(trainer)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(FirstSave(trainer, folder / "first", record))
            trainer.add_callback(progress)  # has the metrics in the run before a checkpoint is reported
            trainer.add_callback(CheckpointReporter())
            add_trackers(trainer, config, run, metrics.folder)
            began_s = time.monotonic()
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            facts |= {"seconds": time.monotonic() - began_s, "resumed_from_step": progress.first_step}
        save(trainer, folder / "final")
        if is_first:  # the others are done, and wait for nothing
            facts |= check_changed(folder / "final", json.loads(record.read()))
            facts |= summarise(metrics, trainer.state)
            facts |= {"num_rows": rows.num_trained, "num_held_out": rows.num_held_out}
            facts |= rows.plan.facts if rows.plan else {}
            (run.location / CHECKPOINT).upload_folder(folder / "final")
            run.write_json("result.json", facts)
    except Exception as error:
        failure = WorkerFailure.of(error, progress.step)
        if failure.outcome != "unknown":  # its line is enough; Ray Train would print a traceback for each worker
            logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        raise failure from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


@contextmanager
def last_checkpoint(workers: WorkersConfig, attempts: Location) -> Iterator[tuple[Path | None, bool]]:
    """Open the last checkpoint that was uploaded below `attempts`, on all workers together.

    Yields its folder, None for a training from its beginning, and whether DeepSpeed is to read its universal form:
    ZeRO cuts optimiser state by the number of workers; when that has changed, it is put into that form first.
    Raises StageError when DeepSpeed cannot do that.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None, False
        return
    universal = workers.zero_stage > 0 and checkpoint.get_metadata()[_NUM_WORKERS] != workers.num_workers
    context = ray.train.get_context()
    rank, local_rank = context.get_world_rank(), context.get_local_rank()
    ranks = range(rank - local_rank, rank - local_rank + context.get_local_world_size())  # those of this node
    place = attempts.at(checkpoint.path)
    folder = place.local_copy(lambda name: universal or is_needed(name, ranks, workers.zero_stage))
    if universal and (rank if place.is_local else local_rank) == 0:
        make_universal(folder)
    torch.distributed.barrier()
    try:
        yield folder, universal
    finally:
        if not place.is_local and local_rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


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
            for name in opened.offset_keys():
                yield name, opened.get_tensor(name)
