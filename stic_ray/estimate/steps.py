"""Estimates of steps (`estimate_run`), and the same as lines of text for `--dry-run` (`table`).

How much there is to do comes from known.py and the stages' own `work`. Measured rates, of the run itself or of a
pilot, come before modelled ones (rates.py). Settings are `estimate.*`.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace

from stic_ray.core.config import RunConfig
from stic_ray.core.devices import find_device
from stic_ray.core.errors import RunError
from stic_ray.core.placement import Need
from stic_ray.core.rundir import ESTIMATE, RunDir
from stic_ray.core.steps import Step, Steps
from stic_ray.core.workload import Sizes, Work
from stic_ray.estimate.known import Measured, measure, model_size, num_rows_done, sizes_for, sizes_of
from stic_ray.estimate.rates import Rate, rates_of, row_s
from stic_ray.report.formats import UNKNOWN, duration

_START_S, _LOADING_BYTES_PER_S = 30.0, 0.5e9
"""Until a process works: it starts, and reads the weights from a disk or a mirror."""
_COLUMNS = "{:<12} {:>9} {:>9} {:>9} {:>10} {:>9} {:>14}  {}"
"""Of the table."""


@dataclass(frozen=True)
class StageEstimate:
    """What a stage will take, or took; None is not known."""

    stage: str
    basis: str
    """Where the time comes from: "model", "measured", "as STAGE was", "done", or the setting that is missing."""
    num_images: float | None = None
    num_tokens: float | None = None
    """Read and written, padding left out."""
    num_gpus: float = 0.0
    """Held at the same time."""
    wall_s: float | None = None
    storage_bytes: float | None = None
    """What it leaves in the run."""
    price_per_gpu_hour: float | None = None

    @property
    def gpu_hours(self) -> float | None:
        """GPUs held, times the hours that they are held."""
        return None if self.wall_s is None else self.num_gpus * self.wall_s / 3600

    @property
    def money(self) -> float | None:
        """None where no price is set."""
        hours, price = self.gpu_hours, self.price_per_gpu_hour
        return None if hours is None or price is None else hours * price


def estimate_run(config: RunConfig, steps: Steps, run: RunDir | None, names: Collection[str]) -> list[StageEstimate]:
    """Return an estimate of each named step; `run` is None where it cannot be reached. Touches nothing.

    Raises RunError when `estimate.rates_of` has no finished step.
    """
    own = measure(run)
    pilot = own
    if config.estimate.rates_of:
        pilot = measure(RunDir.of(config.estimate.rates_of))
        if not pilot.manifests:
            raise RunError(f"estimate.rates_of='{config.estimate.rates_of}' has no finished stage to take rates from.")
    sizes = sizes_of(config, steps, own, pilot)
    rates = rates_of(pilot, config, steps, sizes) if sizes else []
    return [
        _of_step(step, config, sizes and sizes_for(step, steps, config, sizes, own), own, rates)
        for step in steps
        if step.name in names
    ]


def record_estimate(config: RunConfig, steps: Steps, run: RunDir, names: Collection[str]) -> None:
    """Keep the estimate of steps that are about to be made, for the report; what was kept before stays."""
    kept = run.read_json(ESTIMATE) or {}
    for each in estimate_run(config, steps, run, names):
        if each.basis != "done":
            kept[each.stage] = asdict(each)
    run.write_json(ESTIMATE, kept)


def _of_step(step: Step, config: RunConfig, sizes: Sizes | None, own: Measured, rates: Sequence[Rate]) -> StageEstimate:
    """Return what a finished step took, or what one will take."""
    config, stage = step.configured(config), step.stage
    need, given = stage.need(config), config.estimate
    num_processes = config.actors.num_actors if need.what == "actors" else need.num
    price = given.training_price_per_gpu_hour if need.what == "workers" else None
    found = StageEstimate(
        step.name,
        "done",
        num_gpus=num_processes * need.each.get("GPU", 0.0),
        price_per_gpu_hour=given.price_per_gpu_hour if price is None else price,
    )
    if manifest := own.manifests.get(step.name):
        return replace(found, num_images=num_rows_done(manifest), wall_s=manifest["seconds"])
    if sizes is None:
        return replace(found, basis="set estimate.num_parameters")
    work = stage.work(config, sizes)
    if work is None:
        return replace(found, basis=f"set estimate.{stage.amount}" if stage.amount else "not known")
    seconds, basis = row_s(step, config, sizes, work, rates)
    num_models = 0 if need.what == "tasks" else len(step.inputs) + 1 if stage.reads is None else 1
    start_s = _START_S + num_models * sizes.model.weight_bytes / _LOADING_BYTES_PER_S
    return replace(
        found,
        basis=basis,
        num_images=work.num_rows,
        num_tokens=work.num_rows * (work.row_tokens + sum(n * (reads + writes) for n, reads, writes in work.requests)),
        wall_s=start_s + _rows_of_busiest(need, work, config) * seconds,
        storage_bytes=work.storage_bytes,
    )


def _rows_of_busiest(need: Need, work: Work, config: RunConfig) -> float:
    """Return the rows of the process with the most: whole shards for an actor, an equal part for a worker."""
    if need.what == "workers":
        return work.num_rows / need.num
    if need.what == "tasks":
        return work.num_rows / max(1.0, config.actors.num_actors * config.actors.num_cpus)
    shard_size = config.pool.shard_size
    return min(work.num_rows, math.ceil(math.ceil(work.num_rows / shard_size) / config.actors.num_actors) * shard_size)


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
