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

import resource
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer

from stic_ray.core.devices import find_device
from stic_ray.engines.loading import parts_of
from stic_ray.engines.shared_prefix import PADDING
from stic_ray.stages.training.collators import IGNORED
from stic_ray.stages.training.data import WEIGHT
from stic_ray.stages.training.models import num_weights

STEP = "seconds/step"


class Speed:
    """How fast a trainer's steps are: from the wait for data to the log."""

    def __init__(self, trainer: Trainer) -> None:
        self.began_s: float | None = None
        """When the step began; None between steps."""
        self.has_reference_pass = False
        """Whether every batch goes through a reference model, too."""
        self._trainer = trainer
        self._on_gpu = trainer.args.device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        """A part of the step, its begin and its end."""
        self._rows: Any = 0
        self._tokens: Any = 0
        self._flops_per_token: float | None = None

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Add the time that the block takes, on a GPU that of the work which it hands over. The first begins a step."""
        self.began_s = self.began_s or time.perf_counter()
        begin = self._now()
        yield
        self._spans.append((part, begin, self._now()))

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Measure the steps of an optimiser."""
        begun: list[Any] = []
        optimizer.register_step_pre_hook(lambda *_: begun.append(self._now()))
        optimizer.register_step_post_hook(lambda *_: self._spans.append(("optimizer", begun.pop(), self._now())))

    def count(self, batch: dict[str, Any]) -> None:
        """Count the rows that a micro-batch trains on, not those of weight 0, and its tokens."""
        rows = batch[WEIGHT] > 0 if WEIGHT in batch else (batch["labels"] != IGNORED).any(1)
        self._rows = self._rows + rows.sum()
        for view in (batch, *(view for view in batch.values() if isinstance(view, dict))):
            present = view["segments"] != PADDING if "segments" in view else view["attention_mask"]
            self._tokens = self._tokens + present.sum()

    def take(self) -> torch.Tensor:
        """Return what this worker measured of a step, for `figures`, and begin anew."""
        assert self.began_s is not None, "a step has begun"
        wall_s = time.perf_counter() - self.began_s
        if self._on_gpu:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for part, begin, end in self._spans:
            seconds[part] += begin.elapsed_time(end) / 1000 if self._on_gpu else end - begin
        parts = [seconds[part] for part in ("data", "forward", "compute", "optimizer")]
        own = [float(self._rows), float(self._tokens), _peak_memory_gib(), wall_s, *parts]
        self.began_s, self._rows, self._tokens = None, 0, 0
        self._spans.clear()
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
        device = find_device(torch.cuda.get_device_name()) if self._on_gpu else None
        if device is not None:
            if self._flops_per_token is None:
                model = cast(nn.Module, self._trainer.model)
                self._flops_per_token = flops_per_token(model, has_reference=self.has_reference_pass)
            figures["mfu"] = tokens / step_s / len(every) * self._flops_per_token / device.peak_flops
        return figures

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def flops_per_token(model: nn.Module, *, has_reference: bool) -> float:
    """Return the arithmetic of a training step per token of its sequences, by the weights of the language model.

    2 operations per weight forward, 2 backward for the activations and 2 for each weight that is trained; 2 for a
    reference. Left out are attention, the vision tower, embeddings and head, and what gradient checkpointing computes
    twice: utilisation by it is a lower bound.
    """
    prefixes = tuple(parts_of(model)["language_model"])
    any_model = cast(Any, model)
    ends = (any_model.get_input_embeddings(), any_model.get_output_embeddings())
    left_out = {id(module.weight) for module in ends if module is not None}
    flops = 0.0
    for name, parameter in model.named_parameters():
        if name.startswith(prefixes) and id(parameter) not in left_out:
            in_reference = has_reference and "lora_" not in name
            flops += (4 + 2 * parameter.requires_grad + 2 * in_reference) * num_weights(parameter)
    return flops


def totals(history: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Return the figures of a whole training from its logged steps: seconds summed, rates and `mfu` over all of it."""
    found: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    for entry in history:
        for key, value in entry.items() if STEP in entry else ():
            if key.startswith("seconds/"):
                found[key] += value
            elif key == "peak_memory_gib":
                found[key] = max(found[key], value)
            elif key in ("rows_per_second", "tokens_per_second", "mfu"):
                found[key] += value * entry[STEP]
                weights[key] += entry[STEP]
    return {key: value / weights[key] if weights.get(key) else value for key, value in found.items()}


def _peak_memory_gib() -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
