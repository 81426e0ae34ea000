"""Estimates as lines of text, for `--dry-run`."""

import math
from collections.abc import Sequence

from stic_ray.core.config import RunConfig
from stic_ray.core.devices import find_device
from stic_ray.estimate.model_size import model_size
from stic_ray.estimate.steps import StageEstimate
from stic_ray.report.formats import UNKNOWN, duration

_COLUMNS = "{:<12} {:>9} {:>9} {:>9} {:>10} {:>9} {:>14}  {}"


def table(estimates: Sequence[StageEstimate], config: RunConfig) -> list[str]:
    """Return a line per stage and their sum; what is not known is a dash."""
    price = config.estimate.price_per_gpu_hour
    money = f"{price:g} per GPU-hour" if price is not None else "no price: set estimate.price_per_gpu_hour"
    lines = [
        f"estimate with {config.estimate.device}, {money}; settings are estimate.*, the model is in docs/operations.md",
        _COLUMNS.format("stage", "images", "tokens", "GPU-hours", "money", "storage", "wall time", "from"),
    ]
    lines += [_line(each) for each in estimates]
    known = [each for each in estimates if each.wall_s is not None]
    return [
        *lines,
        _COLUMNS.format(
            "sum" if len(known) == len(estimates) else "sum of known",
            "",
            _short(sum(each.num_tokens or 0 for each in known)),
            f"{sum(each.gpu_hours or 0 for each in known):.2f}",
            f"{sum(each.money or 0 for each in known):.2f}" if price is not None else UNKNOWN,
            _bytes(sum(each.storage_bytes or 0 for each in known)),
            duration(sum(each.wall_s or 0 for each in known)),
            "",
        ).rstrip(),
        *_too_small(config),
    ]


def _line(each: StageEstimate) -> str:
    return _COLUMNS.format(
        each.stage,
        _short(each.num_images),
        _short(each.num_tokens),
        UNKNOWN if each.gpu_hours is None else f"{each.gpu_hours:.2f}",
        UNKNOWN if each.money is None else f"{each.money:.2f}",
        _bytes(each.storage_bytes),
        duration(each.wall_s),
        each.basis,
    )


def _too_small(config: RunConfig) -> list[str]:
    """Say when the weights alone do not fit the GPUs that an actor or a worker holds."""
    model, device = model_size(config), find_device(config.estimate.device)
    assert device, "the configuration checks it"
    lines = []
    for what, processes in {"actors": config.actors, "workers": config.workers}.items():
        holds_gib = math.ceil(processes.num_gpus) * device.memory_gib
        if model and holds_gib and model.weight_bytes / 2**30 > holds_gib:
            lines.append(
                f"{what}: {model.weight_bytes / 2**30:.0f} GiB of weights do not fit the {holds_gib:g} GiB of "
                f"{what}.num_gpus={processes.num_gpus:g} x {device.name}"
            )
    return lines


def _short(number: float | None) -> str:
    """Return a count in three digits: 6,000 is "6.00k"."""
    if number is None:
        return UNKNOWN
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            scaled = number / (1e3 if letter == "k" else size)
            return f"{scaled:.3g}{letter}"
    return f"{number:.0f}"


def _bytes(number: float | None) -> str:
    if number is None:
        return UNKNOWN
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"
