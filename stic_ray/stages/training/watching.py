"""What is told while training goes on: the log lines, metrics.jsonl, evaluations, and the warning of easy pairs."""

import json
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stic_ray.core.rundir import RunDir
from stic_ray.stages.training.measured import totals

METRICS = "metrics.jsonl"

EASY_ACCURACY = 0.95
"""Share of pairs that are told apart from which on they count as easy."""
_EASY_WINDOW = 5
"""Logged steps that the warning looks at together."""

logger = logging.getLogger(__name__)


class Progress(TrainerCallback):
    """Says how far training is, keeps metrics.jsonl, and stops when the loss is no number."""

    def __init__(self, stage: str, output: RunDir) -> None:
        self.stage = stage
        self.output = output
        self.began_s = time.monotonic()
        self.first_step = 0
        """Steps that were done before, by workers that are gone."""
        self.step = 0
        """The last step that was done."""
        self.is_warned = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the clock after a start or a resume."""
        self.first_step = self.step = state.global_step
        self.began_s = time.monotonic()

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
        """Tell twenty times how far it is, and once when the pairs look too easy. Raises FloatingPointError."""
        loss = (logs or {}).get("loss")
        if logs is None or loss is None:
            return
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at step {state.global_step}; lower {self.stage}.learning_rate"
            )
        due = state.global_step == state.max_steps or state.global_step % max(1, state.max_steps // 20) == 0
        if state.is_world_process_zero and due:
            num_steps = state.global_step - self.first_step
            seconds_per_step = (time.monotonic() - self.began_s) / max(1, num_steps)
            mfu = f", MFU {logs['mfu']:.0%}" if "mfu" in logs else ""
            print(
                f"{self.stage}: step {state.global_step}/{state.max_steps}, loss {loss:.4f}, "
                f"{logs['rows_per_second']:.2f} rows/s, {logs['tokens_per_second']:.0f} tokens/s{mfu}, "
                f"{logs['peak_memory_gib']:.2f} GiB, "
                f"{(state.max_steps - state.global_step) * seconds_per_step:.0f} s left",
                flush=True,
            )
        if state.is_world_process_zero and not self.is_warned:
            # Windows that ended earlier were looked at then; an evaluation may stand behind every step.
            recent = state.log_history[-2 * _EASY_WINDOW :]
            warning = warn_of_easy_pairs(recent, state.max_steps)
            self.is_warned = warning is not None
            if warning:
                logger.warning("%s: %s", self.stage, warning)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Tell what the held-out rows say."""
        if state.is_world_process_zero and metrics is not None:
            words = {"eval_loss": "loss", "eval_rewards/accuracies": "accuracy", "eval_rewards/margins": "margin"}
            figures = [f"{word} {metrics[key]:.4f}" for key, word in words.items() if key in metrics]
            print(f"{self.stage}: step {state.global_step}, held out: {', '.join(figures)}", flush=True)
            write_metrics(self.output, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep metrics.jsonl as far as the checkpoint."""
        if state.is_world_process_zero:
            write_metrics(self.output, state)


def write_metrics(output: RunDir, state: TrainerState) -> None:
    """Write a line per optimiser step, with the figures of an evaluation after it: those of a resumed training, too."""
    lines: dict[int, dict[str, Any]] = {}
    for entry in state.log_history:
        if "loss" in entry or "eval_loss" in entry:
            lines.setdefault(int(entry["step"]), {}).update(entry)
    output.write_text(METRICS, "".join(json.dumps(line) + "\n" for line in lines.values()))


def summary(state: TrainerState) -> dict[str, Any]:
    """Return what a finished training tells: its steps, last loss and evaluation, speed, and warnings."""
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    warning = warn_of_easy_pairs(state.log_history, state.max_steps)
    return {
        "num_steps": state.global_step,
        "last_loss": losses[-1] if losses else None,
        "held_out": {key.removeprefix("eval_"): value for key, value in evaluations[-1].items() if "eval_" in key}
        if evaluations
        else None,
        "throughput": totals(state.log_history),
        "warnings": [warning] if warning else [],
    }


def warn_of_easy_pairs(history: Sequence[dict[str, Any]], num_steps: int) -> str | None:
    """Say so if almost all pairs are told apart within a few steps while the preferred answers become less likely.

    The known failure of pairs that are too easy: the margin grows by pushing both answers down, and nothing is
    learned about images (docs/architecture.md). A few steps are the first fifth of the training, or twenty.
    """
    steps = [entry for entry in history if "loss" in entry and "rewards/accuracies" in entry]
    for end in range(_EASY_WINDOW, len(steps) + 1):
        window = steps[end - _EASY_WINDOW : end]
        if window[-1]["step"] > max(20, num_steps // 5):
            return None
        accuracy, reward = (_mean(window, f"rewards/{name}") for name in ("accuracies", "chosen"))
        if accuracy >= EASY_ACCURACY and reward < 0:
            return (
                f"by step {window[-1]['step']} of {num_steps}, {accuracy:.0%} of the pairs are told apart while the "
                f"preferred answers become less likely than they were (reward {reward:.3g}): the pairs may be too easy "
                "to teach anything. Look at them in report.html; a lower dpo.learning_rate, a higher dpo.alpha or "
                "dispreferred answers that are nearer to the preferred ones may help."
            )
    return None


def _mean(entries: Sequence[dict[str, Any]], key: str) -> float:
    return sum(entry[key] for entry in entries) / len(entries)
