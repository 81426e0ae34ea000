"""What each training worker runs: build the trainer, train from the last checkpoint, save, and leave the result."""

import json
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Literal

import ray.train
from transformers import PrinterCallback

from stic_ray.core.config import RunConfig
from stic_ray.core.rundir import RunDir
from stic_ray.core.steps import CHECKPOINT
from stic_ray.core.storage import Location
from stic_ray.stages.tasks import end_with_parent
from stic_ray.stages.training.building import make_dpo_trainer, make_sft_trainer
from stic_ray.stages.training.checkpoints import CheckpointReporter, FirstSave, check_changed, last_checkpoint, save
from stic_ray.stages.training.failures import WorkerFailure
from stic_ray.stages.training.index import Rows
from stic_ray.stages.training.models import describe_parts
from stic_ray.stages.training.progress import MetricsFile, Progress, summarise
from stic_ray.stages.training.settings import start_deepspeed
from stic_ray.stages.training.trackers import add_trackers, start_trackers


def train_worker(
    *,
    name: str,
    kind: Literal["dpo", "sft"],
    config: RunConfig,
    output: str,
    rows: Rows,
    start: str | None,
    record: str,
) -> None:
    """Train as one of the workers of a step; rank 0 leaves checkpoint, metrics and result in the folder `output`.

    `kind` is the section of the configuration with the settings, `start` the URI of a checkpoint or None for the model
    of the run, and `record` the file in which hashes of the weights at the start wait for the end.

    Raises WorkerFailure.
    """
    end_with_parent()
    run = RunDir.of(output)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    folder = Path(tempfile.mkdtemp(prefix=f"stic_ray_{name}_"))
    metrics = MetricsFile(run, folder)
    progress = Progress(name, kind, metrics)
    is_first = ray.train.get_context().get_world_rank() == 0
    try:
        if is_first:
            start_trackers(config, run)
        start_deepspeed(config.workers)
        checkpoint = Location.of(start).local_copy() if start else None
        make_trainer = {"dpo": make_dpo_trainer, "sft": make_sft_trainer}[kind]
        with last_checkpoint(config.workers) as resume:
            trainer = make_trainer(config, rows, folder, checkpoint, universal=resume.universal)
            facts = describe_parts(trainer)
            trainer.remove_callback(PrinterCallback)
            trainer.add_callback(FirstSave(trainer, folder / "first", Location.of(record)))
            trainer.add_callback(progress)  # has the metrics in the run before a checkpoint is reported
            trainer.add_callback(CheckpointReporter())
            add_trackers(trainer, config, run)
            began_s = time.monotonic()
            trainer.train(resume_from_checkpoint=str(resume.folder) if resume.folder else None)
            facts |= {"seconds": time.monotonic() - began_s, "resumed_from_step": progress.first_step}
        save(trainer, folder / "final")
        if is_first:  # the others are done, and wait for nothing
            facts |= check_changed(folder / "final", json.loads(Location.of(record).read()))
            facts |= summarise(metrics, trainer.state)
            facts |= {"num_rows": rows.num_trained, "num_held_out": rows.num_held_out}
            (run.location / CHECKPOINT).upload_folder(folder / "final")
            run.write_json("result.json", facts)
    except Exception as error:
        failure = WorkerFailure.of(error, progress.step)
        if failure.outcome != "unknown":  # its line is enough; Ray Train would print a traceback for each worker
            logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        raise failure from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
