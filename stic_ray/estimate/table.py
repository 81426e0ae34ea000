"""Estimates as lines of text, for `--dry-run`."""

import math
from collections.abc import Sequence

from stic_ray.core.config import RunConfig
from stic_ray.core.devices import find_device
from stic_ray.estimate.known import model_size
from stic_ray.estimate.steps import StageEstimate
from stic_ray.report.formats import UNKNOWN, duration

_COLUMNS = "{:<12} {:>9} {:>9} {:>9} {:>10} {:>9} {:>14}  {}"


def table(estimates: Sequence[StageEstimate], config: RunConfig) -> list[str]:
    """Return a line per stage and their sum; what is not known is a dash."""
    price = config.estimate.price_per_gpu_hour
    money = f"{price:g} per GPU-hour" if price is not None else "no price: set estimate.price_per_gpu_hour"
    known = [each for each in estimates if each.wall_s is not None]
    total = _COLUMNS.format(
        "sum" if len(known) == len(estimates) else "sum of known",
        "",
        _amount(sum(each.num_tokens or 0 for each in known)),
        _cents(sum(each.gpu_hours or 0 for each in known)),
        _cents(sum(each.money or 0 for each in known) if price is not None else None),
        _amount(sum(each.storage_bytes or 0 for each in known), "B"),
        duration(sum(each.wall_s or 0 for each in known)),
        "",
    )
    return [
        f"estimate with {config.estimate.device}, {money}; settings are estimate.*, the model is in docs/operations.md",
        _COLUMNS.format("stage", "images", "tokens", "GPU-hours", "money", "storage", "wall time", "from"),
        *map(_line, estimates),
        total.rstrip(),
        *_too_small(config),
    ]


def _line(each: StageEstimate) -> str:
    return _COLUMNS.format(
        each.stage,
        _amount(each.num_images),
        _amount(each.num_tokens),
        _cents(each.gpu_hours),
        _cents(each.money),
        _amount(each.storage_bytes, "B"),
        duration(each.wall_s),
        each.basis,
    )


def _too_small(config: RunConfig) -> list[str]:
    """Return a line where the weights alone do not fit the GPUs that an actor or a worker holds."""
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


def _cents(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.2f}"


def _amount(value: float | None, unit: str = "") -> str:
    """Return an amount in three digits: 12,300 is "12.3k", and in bytes "12.3 kB"; a count below 10,000 in full."""
    if value is None:
        return UNKNOWN
    if value < 1e4 and not unit:
        return f"{value:.0f}"
    size, letter = next((each for each in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if value >= each[0]), (1e3, "k"))
    return f"{value / size:.3g}{f' {letter}{unit}' if unit else letter}"
