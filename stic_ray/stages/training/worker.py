"""What each training worker runs: build the trainer, train from the last checkpoint, save, report."""

import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed
from transformers import PrinterCallback, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from stic_ray.core.config import RunConfig
from stic_ray.core.rundir import RunDir
from stic_ray.core.storage import Location
from stic_ray.engines.adapters import is_adapter
from stic_ray.engines.weight_names import use_hub_names
from stic_ray.stages.training.arguments import start_deepspeed
from stic_ray.stages.training.checkpoints import CheckpointReporter, last_checkpoint
from stic_ray.stages.training.failures import WorkerFailure
from stic_ray.stages.training.feeding import num_rows_of
from stic_ray.stages.training.saved import check_changed
from stic_ray.stages.training.setup import make_dpo_trainer, make_sft_trainer
from stic_ray.stages.training.trackers import add_trackers, start_trackers
from stic_ray.stages.training.tuning import describe_parts
from stic_ray.stages.training.watching import Progress, summary, write_metrics


def train_worker(settings: dict[str, Any]) -> None:
    """Run one worker of stage `settings["stage"]`; rank 0 leaves checkpoint, metrics and result in the run."""
    config = RunConfig.model_validate(settings["config"])
    stage, output = settings["stage"], RunDir.of(settings["output"])
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    rank = ray.train.get_context().get_world_rank()
    folder = Path(tempfile.mkdtemp(prefix=f"stic_ray_{stage}_"))
    progress = Progress(stage, output)
    try:
        if rank == 0:
            start_trackers(config, output)
        start_deepspeed(config.workers)
        start = Location.of(settings["start"]).local_copy() if settings["start"] else None
        trainer: Trainer
        with last_checkpoint(config.workers) as resume:
            if stage == "dpo":
                trainer = make_dpo_trainer(config, settings["rows"], folder, universal=resume.universal)
            else:
                trainer = make_sft_trainer(config, settings["rows"], folder, start, universal=resume.universal)
            facts = describe_parts(trainer)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(progress)
            trainer.add_callback(CheckpointReporter())
            add_trackers(trainer, config, output)
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
    except Exception as error:
        failure = WorkerFailure.of(error, progress.step)
        if failure.outcome != "unknown":  # its line is enough; Ray Train would print a traceback for each worker
            logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        raise failure from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _leave(
    trainer: Trainer, final: Path, output: RunDir, facts: dict[str, Any], config: RunConfig, start: Path | None
) -> None:
    """Check what was saved, and move it into the run directory."""
    (final / "training_args.bin").unlink(missing_ok=True)  # a pickle; config.yaml says the same in words
    if not is_adapter(final):
        use_hub_names(final)
    facts |= check_changed(final, config.model, start)
    write_metrics(output, trainer.state)
    facts |= summary(trainer.state)
    facts |= {"num_rows": num_rows_of(trainer.train_dataset), "num_held_out": num_rows_of(trainer.eval_dataset)}
    (output.location / "checkpoint").upload_folder(final)
    output.write_json("result.json", facts)
