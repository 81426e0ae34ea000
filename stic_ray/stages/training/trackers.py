"""Where the metrics of a training go beside metrics.jsonl: TensorBoard, Weights & Biases, MLflow, by transformers' own.

Only rank 0 logs. A training that goes on from a checkpoint goes on in the same run of each tracker: their ids are in
`trackers.json` of the stage.
"""

import os
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from stic_ray.core.config import RunConfig
from stic_ray.core.rundir import RunDir
from stic_ray.core.storage import Location

FOLDER = "tensorboard"
IDS = "trackers.json"


def start_trackers(config: RunConfig, output: RunDir) -> None:
    """Set the trackers' environment variables to this run; what the user has set there stays."""
    ids, trackers = output.read_json(IDS) or {}, config.workers.trackers
    variables: dict[str, str] = {}
    if "wandb" in trackers:
        ids.setdefault("wandb", uuid.uuid4().hex[:8])
        output.write_json(IDS, ids)
        folder = output.location.path if output.location.is_local else tempfile.gettempdir()
        variables |= {"WANDB_PROJECT": "stic-ray", "WANDB_DIR": folder}
        variables |= {"WANDB_RUN_ID": ids["wandb"], "WANDB_RESUME": "allow", "WANDB_SILENT": "true"}
    if "mlflow" in trackers:
        variables |= {"MLFLOW_EXPERIMENT_NAME": "stic-ray"}
        if "mlflow" in ids:  # what it was started with is there, and must not be given again in other words
            variables |= {"MLFLOW_RUN_ID": ids["mlflow"], "MLFLOW_MAX_LOG_PARAMS": "0"}
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def add_trackers(trainer: Trainer, config: RunConfig, output: RunDir) -> None:
    """Have a trainer log to the trackers of the configuration."""
    trackers = config.workers.trackers
    trainer.args.run_name = f"{config.name} {output.location.name}"
    if "tensorboard" in trackers:
        trainer.add_callback(RunTensorBoard(output.location / FOLDER))
    if "wandb" in trackers:
        from transformers.integrations.integration_utils import WandbCallback

        trainer.add_callback(WandbCallback)
        trainer.add_callback(_EndOfWandb)
    if "mlflow" in trackers:
        from transformers.integrations.integration_utils import MLflowCallback

        trainer.add_callback(MLflowCallback)
        trainer.add_callback(_IdOfMLflow(output))


class RunTensorBoard(TensorBoardCallback):
    """TensorBoard's event files in the run: written there on a local disk, else put there with every checkpoint.

    Each start of a training writes a file of its own, which has TensorBoard forget what earlier ones logged
    after the checkpoint that it goes on from.
    """

    def __init__(self, place: Location) -> None:
        super().__init__()
        self._place = place
        self._folder = Path(place.path)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Open the event file."""
        if state.is_world_process_zero:
            if not self._place.is_local:
                self._folder = Path(tempfile.mkdtemp(prefix="stic_ray_tensorboard_"))
            self.tb_writer = SummaryWriter(str(self._folder), purge_step=state.global_step + 1)
            super().on_train_begin(args, state, control, **keywords)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the event file into the run."""
        self._put(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the event file into the run."""
        self._put(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Close the event file and put it into the run."""
        super().on_train_end(args, state, control, **keywords)
        self._put(state)
        if state.is_world_process_zero and not self._place.is_local:
            shutil.rmtree(self._folder)

    def _put(self, state: TrainerState) -> None:
        if state.is_world_process_zero and not self._place.is_local:
            for file in self._folder.iterdir():
                (self._place / file.name).write(file.read_bytes())


class _EndOfWandb(TrainerCallback):
    """Ends the run; transformers leaves that to the end of the process, which Ray kills."""

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            import wandb  # pyright: ignore[reportMissingImports]  # an extra

            wandb.finish()


class _IdOfMLflow(TrainerCallback):
    """Notes the run that MLflow has begun."""

    def __init__(self, output: RunDir) -> None:
        self._output = output

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            import mlflow  # pyright: ignore[reportMissingImports]  # an extra

            active = mlflow.active_run()
            assert active is not None, "MLflowCallback has begun a run"
            ids = self._output.read_json(IDS) or {}
            self._output.write_json(IDS, {**ids, "mlflow": active.info.run_id})
