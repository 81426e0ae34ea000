"""How fast training is and where its time goes: figures that every logged step carries.

| key | meaning |
|---|---|
| `rows_per_second`, `tokens_per_second` | of all workers, from the wait for data to the log; padding does not count |
| `seconds/step` | that time; evaluation and checkpoints lie outside it |
| `seconds/data` | waiting for the loader, which reads, decodes and collates |
| `seconds/forward`, `seconds/backward` | of all accumulation steps; the forward has the reference's pass in it |
| `seconds/optimizer` | DeepSpeed's engine takes its step inside the backward: `seconds/backward_and_optimizer` |
| `mfu` | model FLOP utilisation, where `core/devices.py` knows the device |
| `peak_memory_gib` | of the device since the start, or of the process on CPUs; the worker with the most |

Seconds are means over the workers. On a GPU they lie between events of its stream, which nobody waits for.
"""

import math
import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from stic_ray.core.devices import find_device
from stic_ray.engines.loading import parts_of
from stic_ray.stages.training.batches import count_rows_and_tokens

STEP = "seconds/step"
_PARTS = ("data", "forward", "compute", "optimizer")


class Stopwatch:
    """Seconds by part, summed until they are read."""

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time that the block takes, on a GPU that of the work which it hands over."""
        begin = self._now()
        yield
        self._spans.append((part, begin, self._now()))

    def read(self) -> dict[str, float]:
        """Return the seconds of each part so far, and begin anew."""
        if self._on_gpu and self._spans:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for part, begin, end in self._spans:
            seconds[part] += begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
        self._spans.clear()
        return seconds

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class MeasuredTrainer(Trainer):
    """Adds the figures of this module to what a trainer logs; to be mixed in before one of TRL's."""

    has_reference_pass = False
    """Whether every batch goes through a reference model, too."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._watch = Stopwatch(on_gpu=self.args.device.type == "cuda")
        self._began_s: float | None = None
        self._rows = self._tokens = 0
        self._flops_per_token: float | None = None
        self.add_callback(_OptimizerClock(self._watch))

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> Any:
        """Wait for the batches of a step."""
        self._began_s = self._began_s or time.perf_counter()
        with self._watch.measure("data"):
            return super().get_batch_samples(*arguments, **keywords)

    def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """Go forward and back."""
        with self._watch.measure("compute"):
            return super().training_step(*arguments, **keywords)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *arguments: Any, **keywords: Any) -> Any:
        """Go forward."""
        if not cast(nn.Module, self.model).training:
            return super().compute_loss(model, inputs, *arguments, **keywords)
        rows, tokens = count_rows_and_tokens(inputs)
        self._rows, self._tokens = self._rows + rows, self._tokens + tokens
        with self._watch.measure("forward"):
            return super().compute_loss(model, inputs, *arguments, **keywords)

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """Log, and where it is about a training step, how fast it was. Called by all workers."""
        if "loss" in logs and self._began_s is not None:
            logs |= self._speed(time.perf_counter() - self._began_s)
            self._began_s, self._rows, self._tokens = None, 0, 0
        super().log(logs, *arguments, **keywords)

    def _speed(self, wall_s: float) -> dict[str, float]:
        seconds = self._watch.read()
        own = [float(self._rows), float(self._tokens), _peak_memory_gib(), wall_s, *(seconds[part] for part in _PARTS)]
        every = self.accelerator.gather(torch.tensor([own], dtype=torch.float64, device=self.args.device))
        every = cast(torch.Tensor, every).cpu()
        rows, tokens = every[:, :2].sum(0).tolist()
        step_s, data_s, forward_s, compute_s, optimizer_s = every[:, 3:].mean(0).tolist()
        figures = {
            "rows_per_second": rows / step_s,
            "tokens_per_second": tokens / step_s,
            "peak_memory_gib": every[:, 2].max().item(),
            STEP: step_s,
            "seconds/data": data_s,
            "seconds/forward": forward_s,
        }
        if self.is_deepspeed_enabled:
            figures["seconds/backward_and_optimizer"] = compute_s - forward_s
        else:
            figures |= {"seconds/backward": compute_s - forward_s, "seconds/optimizer": optimizer_s}
        share = self._utilisation(tokens / step_s / self.accelerator.num_processes)
        return figures if share is None else {**figures, "mfu": share}

    def _utilisation(self, tokens_per_second: float) -> float | None:
        """Return the share of a worker's device that the model's own arithmetic takes; None where it is not known."""
        device = find_device(torch.cuda.get_device_name()) if self.args.device.type == "cuda" else None
        if device is None:
            return None
        if self._flops_per_token is None:
            self._flops_per_token = flops_per_token(cast(nn.Module, self.model), has_reference=self.has_reference_pass)
        return tokens_per_second * self._flops_per_token / device.peak_flops


class _OptimizerClock(TrainerCallback):
    def __init__(self, watch: Stopwatch) -> None:
        self._watch = watch
        self._measuring: Any = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._measuring = self._watch.measure("optimizer")
        self._measuring.__enter__()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._measuring.__exit__(None, None, None)


def flops_per_token(model: nn.Module, *, has_reference: bool) -> float:
    """Return the arithmetic of a training step per token of its sequences, by the weights of the language model.

    2 operations per weight forward, 2 backward for the activations and 2 for each weight that is trained; 2 for a
    reference. Left out are attention, the vision tower, embeddings and head, and what gradient checkpointing computes
    twice: utilisation by it is a lower bound.
    """
    prefixes = tuple(parts_of(model)["language_model"])
    ends = {id(module.weight) for module in (_embeddings(model), _head(model)) if module is not None}
    weights = [p for name, p in model.named_parameters() if name.startswith(prefixes) and id(p) not in ends]
    adapters = {id(p) for name, p in model.named_parameters() if "lora_" in name}
    num_weights = sum(_size(p) for p in weights)
    num_trained = sum(_size(p) for p in weights if p.requires_grad)
    num_in_reference = sum(_size(p) for p in weights if id(p) not in adapters) if has_reference else 0
    return 4.0 * num_weights + 2.0 * num_trained + 2.0 * num_in_reference


def totals(history: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the figures of a whole training from its logged steps: seconds summed, rates and `mfu` over all of it."""
    steps = [entry for entry in history if STEP in entry]
    seconds = sum(entry[STEP] for entry in steps)
    if not seconds:
        return {}
    found: dict[str, float] = {}
    for key in dict.fromkeys(key for entry in steps for key in entry):
        values = [(entry[key], entry[STEP]) for entry in steps if key in entry]
        if key.startswith("seconds/"):
            found[key] = sum(value for value, _ in values)
        elif key in ("rows_per_second", "tokens_per_second", "mfu"):
            found[key] = sum(value * step_s for value, step_s in values) / seconds
        elif key == "peak_memory_gib":
            found[key] = max(value for value, _ in values)
    return found


def _embeddings(model: nn.Module) -> Any:
    return cast(Any, model).get_input_embeddings()


def _head(model: nn.Module) -> Any:
    return cast(Any, model).get_output_embeddings()


def _size(parameter: nn.Parameter) -> int:
    """Return the number of weights, of which this process may hold a part (ZeRO-3), or packed (4 bits)."""
    packed = getattr(parameter, "quant_state", None)
    return math.prod(packed.shape) if packed is not None else getattr(parameter, "ds_numel", parameter.numel())


def _peak_memory_gib() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
