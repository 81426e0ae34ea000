"""What is reported while training goes on: log lines, metrics.jsonl, evaluations, and the warning of easy pairs."""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stic_ray.core.rundir import RunDir
from stic_ray.stages.training.metrics import totals

METRICS = "metrics.jsonl"

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

    A line is appended when the next one begins. An object store cannot append: there the file is kept in `folder` and
    put into the run whole, with every checkpoint and evaluation. It holds all steps of a checkpoint before that counts,
    so a training that goes on from one drops what stands behind it and misses nothing.
    """

    def __init__(self, output: RunDir, folder: Path) -> None:
        self._place = output.location / METRICS
        self._file = Path(self._place.path) if self._place.is_local else folder / METRICS
        self._line: dict[str, Any] = {}

    def begin(self, num_steps: int) -> None:
        """Keep the lines of the first steps only."""
        kept = [line for line in self._stored() if line["step"] <= num_steps] if num_steps else []
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_name(f".{METRICS}.tmp")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        partial.replace(self._file)
        self._line = {}

    def add(self, entry: dict[str, Any]) -> None:
        """Take what was logged of a step, or of an evaluation behind it."""
        if entry["step"] != self._line.get("step"):
            self.flush()
        self._line |= entry

    def flush(self) -> None:
        """Write the line that is not written yet."""
        if self._line:
            with self._file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(self._line) + "\n")
        self._line = {}

    def publish(self) -> None:
        """Have all that was logged in the run."""
        self.flush()
        if not self._place.is_local:
            self._place.write(self._file.read_bytes())

    def lines(self) -> Iterator[dict[str, Any]]:
        """Return all that was written, a line at a time."""
        with self._file.open(encoding="utf-8") as stream:
            yield from map(json.loads, stream)

    def _stored(self) -> Iterator[dict[str, Any]]:
        """Return the lines that a training before left; the last may be cut, as it was killed."""
        if not self._place.exists():
            return
        for line in self._place.read().decode("utf-8", "replace").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


class Progress(TrainerCallback):
    """Prints how far training is, keeps metrics.jsonl, and stops when the loss is no number."""

    def __init__(self, step_name: str, section: str, metrics: MetricsFile) -> None:
        """Take the name of the step, and the section of the configuration with its settings."""
        self.step_name, self.section, self.metrics = step_name, section, metrics
        self.began_s = time.monotonic()
        self.first_step = 0
        """Steps that were done before, by workers that are gone."""
        self.step = 0
        """The last step that was done."""
        self.is_warned = False
        self.logged_s = self.began_s

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

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Say twenty times at most how far it is, and once when the pairs look too easy. Raises FloatingPointError."""
        del state.log_history[:-_KEPT_ENTRIES]
        if logs is None or not {"loss", "eval_loss"} & logs.keys():
            return
        if state.is_world_process_zero:
            self.metrics.add({**logs, "step": state.global_step})
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(
                f"the loss is {logs['loss']} at step {state.global_step}; lower {self.section}.learning_rate"
            )
        if state.is_world_process_zero:
            self._log_step(state, logs)
        if state.is_world_process_zero and not self.is_warned:
            # Windows that ended earlier were looked at then; an evaluation may stand behind every step.
            recent = state.log_history[-2 * _EASY_WINDOW :]
            warning = warn_of_easy_pairs(recent, state.max_steps)
            self.is_warned = warning is not None
            if warning:
                logger.warning("%s: %s", self.step_name, warning)

    def _log_step(self, state: TrainerState, logs: dict[str, float]) -> None:
        num_steps = state.global_step - self.first_step
        seconds_per_step = (time.monotonic() - self.began_s) / max(1, num_steps)
        mfu = f", MFU {logs['mfu']:.0%}" if "mfu" in logs else ""
        due, now_s = state.global_step % max(1, state.max_steps // 20) == 0, time.monotonic()
        due = state.global_step == state.max_steps or (due and now_s - self.logged_s >= _LOG_EVERY_S)
        self.logged_s = now_s if due else self.logged_s
        logger.log(
            logging.INFO if due else logging.DEBUG,  # a terminal's bar has all steps
            f"{self.step_name}: step {state.global_step}/{state.max_steps}, loss {logs['loss']:.4f}, "
            f"{logs['rows_per_second']:.2f} rows/s, {logs['tokens_per_second']:.0f} tokens/s{mfu}, "
            f"{logs['peak_memory_gib']:.2f} GiB, "
            f"{(state.max_steps - state.global_step) * seconds_per_step:.0f} s left",
        )

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Say what the held-out rows give."""
        if state.is_world_process_zero and metrics is not None:
            words = {"eval_loss": "loss", "eval_rewards/accuracies": "accuracy", "eval_rewards/margins": "margin"}
            figures = [f"{word} {metrics[key]:.4f}" for key, word in words.items() if key in metrics]
            logger.info("%s: step %d, held out: %s", self.step_name, state.global_step, ", ".join(figures))
            self.metrics.publish()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have metrics.jsonl in the run as far as the checkpoint, before that is reported."""
        if state.is_world_process_zero:
            self.metrics.publish()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Have all of metrics.jsonl in the run."""
        if state.is_world_process_zero:
            self.metrics.publish()


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
        accuracy, reward = (_mean(window, f"rewards/{name}") for name in ("accuracies", "chosen"))
        if len(window) == _EASY_WINDOW and accuracy >= EASY_ACCURACY and reward < 0:
            return (
                f"by step {entry['step']} of {num_steps}, {accuracy:.0%} of the pairs are told apart while the "
                f"preferred answers become less likely than they were (reward {reward:.3g}): the pairs may be too easy "
                "to teach anything. Look at them in report.html; a lower dpo.learning_rate, a higher dpo.alpha or "
                "dispreferred answers that are nearer to the preferred ones may help."
            )
    return None


def _mean(entries: Iterable[dict[str, Any]], key: str) -> float:
    values = [entry[key] for entry in entries]
    return sum(values) / len(values)
