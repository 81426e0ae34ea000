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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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


class Means:
    """Values summed over rows until they are taken, on the device that they were made on."""

    def __init__(self) -> None:
        self.names: Sequence[str] = []
        self.values = torch.zeros(0, dtype=torch.float64)
        """By how much all rows count, then a sum for each name."""

    def add(self, names: Sequence[str], sums: torch.Tensor) -> None:
        """Add sums over some rows; the first is by how much they count, and has no name."""
        self.names, self.values = names[1:], sums + self.values if len(self.values) else sums

    def take(self) -> "Means":
        """Return what is there, and begin anew."""
        taken = Means()
        taken.names, taken.values = self.names, self.values
        self.__init__()
        return taken

    def figures(self, sums: torch.Tensor) -> dict[str, float]:
        """Return the mean of each name, given the sums of all workers."""
        if not len(sums) or not sums[0]:
            return {}
        return dict(zip(self.names, (sums[1:] / sums[0]).tolist(), strict=True))


class Speed:
    """How fast a trainer's steps are: from the wait for data to the log."""

    def __init__(self, trainer: Trainer) -> None:
        self.has_reference_pass = False
        """Whether every batch goes through a reference model, too."""
        self._trainer = trainer
        self._stopwatch = Stopwatch(on_gpu=trainer.args.device.type == "cuda")
        self._began_s: float | None = None
        self._rows: Any = 0
        self._tokens: Any = 0
        self._flops_per_token: float | None = None
        trainer.add_callback(_OptimizerClock(self._stopwatch))

    @property
    def is_running(self) -> bool:
        """Whether a step has begun."""
        return self._began_s is not None

    def measure(self, part: str) -> AbstractContextManager[None]:
        """Add the time of a block to a part of the step."""
        return self._stopwatch.measure(part)

    def waiting_for_data(self) -> AbstractContextManager[None]:
        """Measure a wait for data, with which a step begins."""
        self._began_s = self._began_s or time.perf_counter()
        return self.measure("data")

    def count(self, batch: dict[str, torch.Tensor]) -> None:
        """Count the rows and tokens of a micro-batch."""
        rows, tokens = count_rows_and_tokens(batch)
        self._rows, self._tokens = self._rows + rows, self._tokens + tokens

    def own(self) -> torch.Tensor:
        """Return what this worker measured of a step, for `figures`, and begin anew."""
        assert self._began_s is not None, "a step has begun"
        wall_s, seconds = time.perf_counter() - self._began_s, self._stopwatch.read()
        own = [float(self._rows), float(self._tokens), _peak_memory_gib(), wall_s, *(seconds[part] for part in _PARTS)]
        self._began_s, self._rows, self._tokens = None, 0, 0
        return torch.tensor(own, dtype=torch.float64, device=self._trainer.args.device)

    def figures(self, every: torch.Tensor) -> dict[str, float]:
        """Return the figures of a step from what each worker measured, shape (workers, measures)."""
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
        if self._trainer.is_deepspeed_enabled:
            figures["seconds/backward_and_optimizer"] = compute_s - forward_s
        else:
            figures |= {"seconds/backward": compute_s - forward_s, "seconds/optimizer": optimizer_s}
        share = self._utilisation(tokens / step_s / len(every))
        return figures if share is None else {**figures, "mfu": share}

    def _utilisation(self, tokens_per_second: float) -> float | None:
        """Return the share of a worker's device that the model's own arithmetic takes; None where it is not known."""
        on_gpu = self._trainer.args.device.type == "cuda"
        device = find_device(torch.cuda.get_device_name()) if on_gpu else None
        if device is None:
            return None
        if self._flops_per_token is None:
            model = cast(nn.Module, self._trainer.model)
            self._flops_per_token = flops_per_token(model, has_reference=self.has_reference_pass)
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


def totals(history: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return the figures of a whole training from its logged steps: seconds summed, rates and `mfu` over all of it."""
    found: dict[str, float] = {}
    weights: dict[str, float] = {}
    for entry in history:
        for key, value in entry.items() if STEP in entry else ():
            if key.startswith("seconds/"):
                found[key] = found.get(key, 0.0) + value
            elif key in ("rows_per_second", "tokens_per_second", "mfu"):
                found[key] = found.get(key, 0.0) + value * entry[STEP]
                weights[key] = weights.get(key, 0.0) + entry[STEP]
            elif key == "peak_memory_gib":
                found[key] = max(found.get(key, 0.0), value)
    return found | {key: found[key] / seconds for key, seconds in weights.items() if seconds}


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
