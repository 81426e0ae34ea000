"""What is reported while training goes on: log lines, metrics.jsonl, trackers, and the warning of easy pairs.

Rank 0 alone reports. Trackers are TensorBoard, Weights & Biases and MLflow, by transformers' own callbacks. A training
that goes on from a checkpoint goes on in the same run of each tracker: their ids are in `trackers.json` of the step.
"""

import json
import logging
import math
import os
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from tensorboardX import SummaryWriter
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback, get_reporting_integration_callbacks

from stic_ray.core.config import RunConfig
from stic_ray.core.rundir import RunDir
from stic_ray.stages.training.metrics import totals

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
TRACKER_IDS = "trackers.json"

EASY_ACCURACY = 0.95
"""Share of pairs that are told apart from which on they count as easy."""
_LOG_EVERY_S = 10.0
_EASY_WINDOW = 5
"""Logged steps that the warning looks at together."""
_KEPT_ENTRIES = 4 * _EASY_WINDOW
"""Entries of its log that transformers keeps, and writes into every checkpoint; all of them are in metrics.jsonl."""

logger = logging.getLogger(__name__)


class MetricsFile:
    """metrics.jsonl: a line for each optimiser step, with the figures of an evaluation behind it.

    A line is appended when the next one begins. An object store cannot append: there all files of `folder`,
    TensorBoard's too, are put into the run whole, with every checkpoint and evaluation. They hold all steps of a
    checkpoint before that counts, so a training that goes on from one drops what stands behind it and misses nothing.
    """

    def __init__(self, output: RunDir, folder: Path) -> None:
        self.folder = Path(output.location.path) if output.location.is_local else folder / "reports"
        """Where the files grow: the step's folder on a local disk."""
        self._output = output
        self._file = self.folder / METRICS
        self._line: dict[str, Any] = {}

    def begin(self, num_steps: int) -> None:
        """Keep the lines of the first steps only."""
        place, kept = self._output.location / METRICS, []
        stored = place.read().decode("utf-8", "replace").splitlines() if num_steps and place.exists() else []
        with suppress(json.JSONDecodeError):  # the last line may be cut, as its writer was killed
            for line in stored:
                kept += [line] if json.loads(line)["step"] <= num_steps else []
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(f".{METRICS}.tmp")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(self._file)

    def add(self, entry: dict[str, Any]) -> None:
        """Take what was logged of a step, or of an evaluation behind it."""
        if entry["step"] != self._line.get("step"):
            self._flush()
        self._line |= entry

    def _flush(self) -> None:
        if self._line:
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(self._line) + "\n")
        self._line = {}

    def publish(self) -> None:
        """Have all that was logged in the run."""
        self._flush()
        for file in [] if self._output.location.is_local else self.folder.rglob("*"):
            if file.is_file():
                (self._output.location / str(file.relative_to(self.folder))).write(file.read_bytes())

    def lines(self) -> Iterator[dict[str, Any]]:
        """Return all that was written, a line at a time."""
        with self._file.open(encoding="utf-8") as stream:
            yield from map(json.loads, stream)


class Progress(TrainerCallback):
    """Prints how far training is, keeps metrics.jsonl, and stops when the loss is no number."""

    def __init__(self, step_name: str, section: str, metrics: MetricsFile) -> None:
        """Take the name of the step, and the section of the configuration with its settings."""
        self.step_name, self.section, self.metrics = step_name, section, metrics
        self.began_s = self.logged_s = time.monotonic()
        self.first_step = 0
        """Steps that were done before, by workers that are gone."""
        self.step = 0
        """The last step that was done."""
        self.is_warned = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock after a start or a resume."""
        self.first_step = self.step = state.global_step
        self.began_s = time.monotonic()
        if state.is_world_process_zero:
            self.metrics.begin(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluate what training ends with, too."""
        self.step = state.global_step
        if state.global_step == state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Log how far it is, what the held-out rows give, and once that pairs look too easy.

        Raises FloatingPointError for a loss that is no number.
        """
        del state.log_history[:-_KEPT_ENTRIES]
        logs, step = given["logs"] or {}, state.global_step
        if not math.isfinite(logs.get("loss", 0.0)):
            raise FloatingPointError(f"the loss is {logs['loss']} at step {step}; lower {self.section}.learning_rate")
        if not state.is_world_process_zero or not {"loss", "eval_loss"} & logs.keys():
            return
        self.metrics.add({**logs, "step": step})
        if "eval_loss" in logs:
            words = {"eval_loss": "loss", "eval_rewards/accuracies": "accuracy", "eval_rewards/margins": "margin"}
            figures = [f"{word} {logs[key]:.4f}" for key, word in words.items() if key in logs]
            logger.info("%s: step %d, held out: %s", self.step_name, step, ", ".join(figures))
            return
        self._log_step(state, logs)
        # Windows that ended earlier were looked at then; an evaluation may stand behind every step.
        warning = warn_of_easy_pairs(state.log_history[-2 * _EASY_WINDOW :], state.max_steps)
        if warning and not self.is_warned:
            self.is_warned = True
            logger.warning("%s: %s", self.step_name, warning)

    def _log_step(self, state: TrainerState, logs: dict[str, float]) -> None:
        """Log a step, twenty of them at most where a log file is all there is."""
        step, num_steps, now_s = state.global_step, state.max_steps, time.monotonic()
        seconds_per_step = (now_s - self.began_s) / max(1, step - self.first_step)
        mfu = f", MFU {logs['mfu']:.0%}" if "mfu" in logs else ""
        is_due = step % max(1, num_steps // 20) == 0 and now_s - self.logged_s >= _LOG_EVERY_S
        is_due = is_due or step == num_steps
        self.logged_s = now_s if is_due else self.logged_s
        logger.log(
            logging.INFO if is_due else logging.DEBUG,  # a terminal's bar has all steps
            f"{self.step_name}: step {step}/{num_steps}, loss {logs['loss']:.4f}, "
            f"{logs['rows_per_second']:.2f} rows/s, {logs['tokens_per_second']:.0f} tokens/s{mfu}, "
            f"{logs['peak_memory_gib']:.2f} GiB, {(num_steps - step) * seconds_per_step:.0f} s left",
        )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have the metrics in the run as far as the checkpoint, before that is reported."""
        if state.is_world_process_zero:
            self.metrics.publish()

    on_evaluate = on_train_end = on_save


def summarise(metrics: MetricsFile, state: TrainerState) -> dict[str, Any]:
    """Return what a finished training came to: its steps, last loss and evaluation, speed, and warnings."""
    last_loss, held_out = None, None
    for line in metrics.lines():
        last_loss = line.get("loss", last_loss)
        if "eval_loss" in line:
            held_out = {key.removeprefix("eval_"): value for key, value in line.items() if key.startswith("eval_")}
    warning = warn_of_easy_pairs(metrics.lines(), state.max_steps)
    return {
        "num_steps": state.global_step,
        "last_loss": last_loss,
        "held_out": held_out,
        "throughput": totals(metrics.lines()),
        "warnings": [warning] if warning else [],
    }


def warn_of_easy_pairs(history: Iterable[dict[str, Any]], num_steps: int) -> str | None:
    """Return a warning if almost all pairs are told apart early on while the preferred answers become less likely.

    The known failure of pairs that are too easy: the margin grows by pushing both answers down, and nothing is
    learned about images (docs/architecture.md). Early is the first fifth of the training, or twenty steps.
    """
    window: deque[dict[str, Any]] = deque(maxlen=_EASY_WINDOW)
    for entry in history:
        if "loss" not in entry or "rewards/accuracies" not in entry:
            continue
        if entry["step"] > max(20, num_steps // 5):
            return None
        window.append(entry)
        accuracy, reward = (fmean(each[f"rewards/{name}"] for each in window) for name in ("accuracies", "chosen"))
        if len(window) == _EASY_WINDOW and accuracy >= EASY_ACCURACY and reward < 0:
            return (
                f"by step {entry['step']} of {num_steps}, {accuracy:.0%} of the pairs are told apart while the "
                f"preferred answers become less likely than they were (reward {reward:.3g}): the pairs may be too easy "
                "to teach anything. Look at them in report.html; a lower dpo.learning_rate, a higher dpo.alpha or "
                "dispreferred answers that are nearer to the preferred ones may help."
            )
    return None


def start_trackers(config: RunConfig, output: RunDir) -> None:
    """Set the trackers' environment variables to this run; what the user has set there stays."""
    ids, trackers = output.read_json(TRACKER_IDS) or {}, config.workers.trackers
    variables: dict[str, str] = {}
    if "wandb" in trackers:
        ids.setdefault("wandb", uuid.uuid4().hex[:8])
        output.write_json(TRACKER_IDS, ids)
        folder = output.location.path if output.location.is_local else tempfile.gettempdir()
        variables |= {"WANDB_PROJECT": "stic-ray", "WANDB_DIR": folder}
        variables |= {"WANDB_RUN_ID": ids["wandb"], "WANDB_RESUME": "allow", "WANDB_SILENT": "true"}
    if "mlflow" in trackers:
        variables |= {"MLFLOW_EXPERIMENT_NAME": "stic-ray"}
        if "mlflow" in ids:  # what it was started with is there, and must not be given again in other words
            variables |= {"MLFLOW_RUN_ID": ids["mlflow"], "MLFLOW_MAX_LOG_PARAMS": "0"}
    for name, value in variables.items():
        os.environ.setdefault(name, value)


def add_trackers(trainer: Trainer, config: RunConfig, output: RunDir, folder: Path) -> None:
    """Have a trainer log to the trackers of the configuration; TensorBoard's files grow below `folder`."""
    trackers = config.workers.trackers
    trainer.args.run_name = f"{config.name} {output.location.name}"
    if "tensorboard" in trackers:
        trainer.add_callback(RunTensorBoard(folder / TENSORBOARD))
    for callback in get_reporting_integration_callbacks([name for name in trackers if name != "tensorboard"]):
        trainer.add_callback(callback)
    trainer.add_callback(_TrackerRuns(trackers, output))


class RunTensorBoard(TensorBoardCallback):
    """TensorBoard's event files.

    Each start of a training writes a file of its own, which has TensorBoard forget what earlier ones logged
    after the checkpoint that it goes on from.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **keywords: Any
    ) -> None:
        """Open the event file."""
        if state.is_world_process_zero:
            self.tb_writer = SummaryWriter(str(self._folder), purge_step=state.global_step + 1)
        super().on_train_begin(args, state, control, **keywords)


class _TrackerRuns(TrainerCallback):
    """Notes the run that MLflow has begun, and ends that of W&B: Ray kills the process before its end does."""

    def __init__(self, trackers: Collection[str], output: RunDir) -> None:
        self._trackers, self._output = trackers, output

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and "mlflow" in self._trackers:
            import mlflow  # pyright: ignore[reportMissingImports]  # an extra

            ids = self._output.read_json(TRACKER_IDS) or {}
            self._output.write_json(TRACKER_IDS, {**ids, "mlflow": mlflow.active_run().info.run_id})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero and "wandb" in self._trackers:
            import wandb  # pyright: ignore[reportMissingImports]  # an extra

            wandb.finish()
