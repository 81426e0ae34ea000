"""What each training worker runs: build the trainer, train from the last checkpoint, save, report."""

import json
import logging
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed
from datasets import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from stic_ray.core.config import RunConfig
from stic_ray.core.rundir import RunDir
from stic_ray.core.storage import Location
from stic_ray.core.weight_names import use_hub_names
from stic_ray.engines.loading import is_adapter
from stic_ray.stages.training.arguments import start_deepspeed
from stic_ray.stages.training.checkpoints import CheckpointReporter, last_checkpoint
from stic_ray.stages.training.saved import check_changed
from stic_ray.stages.training.setup import make_dpo_trainer, make_sft_trainer
from stic_ray.stages.training.tuning import describe_parts


def train_worker(settings: dict[str, Any]) -> None:
    """Run one worker of stage `settings["stage"]`; rank 0 leaves checkpoint, metrics and result in the run."""
    config = RunConfig.model_validate(settings["config"])
    stage, output = settings["stage"], RunDir.of(settings["output"])
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    rank = ray.train.get_context().get_world_rank()
    folder = Path(tempfile.mkdtemp(prefix=f"stic_ray_{stage}_"))
    try:
        start_deepspeed(config.workers)
        files = [Location.of(uri).local_copy() for uri in settings["files"]]
        start = Location.of(settings["start"]).local_copy() if settings["start"] else None
        trainer: Trainer
        with last_checkpoint(config.workers) as resume:
            if stage == "dpo":
                trainer = make_dpo_trainer(config, files, folder, universal=resume.universal)
            else:
                trainer = make_sft_trainer(config, files, folder, start, universal=resume.universal)
            facts = describe_parts(trainer)
            trainer.remove_callback(PrinterCallback)
            progress = _Progress(stage)
            trainer.add_callback(progress)
            trainer.add_callback(CheckpointReporter())
            began_s = time.monotonic()
            trainer.train(resume_from_checkpoint=str(resume.folder) if resume.folder else None)
            seconds = time.monotonic() - began_s
        trainer.save_model(str(folder / "final"))
        unset_hf_deepspeed_config()  # rank 0 loads models alone below, which ZeRO-3 would partition over all ranks
        torch.distributed.barrier()
        if rank == 0:
            facts |= {"seconds": seconds, "resumed_from_step": progress.first_step}
            _leave(trainer, folder / "final", output, facts, config, start)
        torch.distributed.barrier()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Progress(TrainerCallback):
    """Says how far training is, and stops it when the loss is no number."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.began_s = time.monotonic()
        self.first_step = 0
        """Steps that were done before, by workers that are gone."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.first_step, self.began_s = state.global_step, time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"{self.stage}: the loss is {loss} at step {state.global_step}; lower {self.stage}.learning_rate"
            )
        due = state.global_step == state.max_steps or state.global_step % max(1, state.max_steps // 20) == 0
        if state.is_world_process_zero and due:
            num_steps = state.global_step - self.first_step
            seconds_per_step = (time.monotonic() - self.began_s) / max(1, num_steps)
            rows = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
            print(
                f"{self.stage}: step {state.global_step}/{state.max_steps}, loss {loss:.4f}, "
                f"{rows / seconds_per_step:.2f} rows/s, "
                f"{(state.max_steps - state.global_step) * seconds_per_step:.0f} s left",
                flush=True,
            )


def _leave(
    trainer: Trainer, final: Path, output: RunDir, facts: dict[str, Any], config: RunConfig, start: Path | None
) -> None:
    """Check what was saved, and move it into the run directory."""
    (final / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.yaml says the same in words
    if not is_adapter(final):
        use_hub_names(final)
    dataset = trainer.train_dataset
    assert isinstance(dataset, Dataset), "training reads a map-style dataset"
    facts |= check_changed(final, config.model, start)
    lines = [json.dumps(entry) for entry in trainer.state.log_history if "loss" in entry]
    output.write_text("metrics.jsonl", "\n".join(lines) + "\n")
    state = trainer.state
    facts |= {"num_steps": state.global_step, "num_rows": dataset.num_rows, "last_loss": _last_loss(state)}
    (output.location / "checkpoint").upload_folder(final)
    output.write_json("result.json", facts)


def _last_loss(state: TrainerState) -> float | None:
    return next((entry["loss"] for entry in reversed(state.log_history) if "loss" in entry), None)
