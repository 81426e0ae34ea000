"""Estimates step by step: `estimate_run`. The arithmetic is in costs.py, the amounts are the stages' own.

Measured rates, of the run itself or of a pilot, come before modelled ones. Settings are `estimate.*`.
"""

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass

from stic_ray.core.config import RunConfig
from stic_ray.core.devices import find_device
from stic_ray.core.errors import RunError
from stic_ray.core.rundir import ESTIMATE, RunDir
from stic_ray.core.steps import Stage, Step, Steps
from stic_ray.core.workload import Sizes, Work
from stic_ray.estimate.costs import Speed, generation_s
from stic_ray.estimate.rates import Measured, measure
from stic_ray.estimate.sizes import sizes_of

_CPU = Speed(flops=40e9, bandwidth=8e9)
"""One core."""
_STEP_FLOOR_S = 0.025 / 7.25e9
"""What a step of transformers' `generate` takes per parameter, whatever the device: 25 ms for 7B."""
_START_S, _LOADING_BYTES_PER_S = 30.0, 0.5e9
"""Until a process works: it starts, and reads the weights from a disk or a mirror."""
_SCAN_CPU_S = 0.005
"""CPU time to hash, decode and index a photograph."""


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
    return [_of_step(step, config, steps, sizes, own, pilot) for step in steps if step.name in names]


def record_estimate(config: RunConfig, steps: Steps, run: RunDir, names: Collection[str]) -> None:
    """Keep the estimate of steps that are about to be made, for the report; what was kept before stays."""
    kept = run.read_json(ESTIMATE) or {}
    for each in estimate_run(config, steps, run, names):
        if each.basis != "done":
            kept[each.stage] = asdict(each)
    run.write_json(ESTIMATE, kept)


def _of_step(
    step: Step, config: RunConfig, steps: Steps, sizes: Sizes | None, own: Measured, pilot: Measured
) -> StageEstimate:
    """Return what a finished step took, or what one will take."""
    config, stage = step.configured(config), step.stage
    num_gpus, price = _gpus_of(stage, config), _price_of(stage, config)
    if manifest := own.manifests.get(step.name):
        seconds, num_rows = manifest["seconds"], manifest["num_rows_in"]
        return StageEstimate(step.name, "done", num_rows, None, num_gpus, seconds, None, price)
    if sizes is None:
        return StageEstimate(step.name, "set estimate.num_parameters", num_gpus=num_gpus, price_per_gpu_hour=price)
    work = stage.work(config, sizes)
    if work is None:
        missing = f"set estimate.{stage.amount}" if stage.amount else "not known"
        return StageEstimate(step.name, missing, num_gpus=num_gpus, price_per_gpu_hour=price)
    row_s, basis = _row_s(step, config, steps, sizes, work, pilot)
    wall_s = _start_s(step, config, sizes) + _rows_of_busiest(stage, work, config) * row_s
    tokens = work.num_rows * (work.row_tokens + sum(n * (reads + writes) for n, reads, writes in work.requests))
    return StageEstimate(step.name, basis, work.num_rows, tokens, num_gpus, wall_s, work.storage_bytes, price)


def _row_s(step: Step, config: RunConfig, steps: Steps, sizes: Sizes, work: Work, pilot: Measured) -> tuple[float, str]:
    """Return the seconds of one process per row, and where they come from."""
    modelled_s = _modelled_row_s(step.stage, config, sizes, work)
    if measured_s := pilot.process_s_per_row(step.stage.name):
        return measured_s, "measured"
    for other in steps:  # of the same kind of processes: what the model gets wrong of one, it gets wrong of the other
        if _what(other.stage, config) != _what(step.stage, config) or not (work.requests or work.row_flops):
            continue
        other_work, measured_s = other.stage.work(config, sizes), pilot.process_s_per_row(other.stage.name)
        other_s = _modelled_row_s(other.stage, config, sizes, other_work) if other_work else 0.0
        if other_s and measured_s:
            return modelled_s * measured_s / other_s, f"as {other.name} was"
    return modelled_s, "model"


def _what(stage: Stage, config: RunConfig) -> str:
    """Return the kind of processes that a stage starts."""
    return stage.need(config).what


def _modelled_row_s(stage: Stage, config: RunConfig, sizes: Sizes, work: Work) -> float:
    """Return the modelled seconds of one process per row."""
    if _what(stage, config) == "tasks":
        return _SCAN_CPU_S
    speed = _speed_of(stage, config, sizes)
    batch = _batch_of(config, sizes)
    answering_s = sum(
        number * generation_s(sizes.model, speed, num_prompt_tokens=reads, num_answer_tokens=writes, batch_size=batch)
        for number, reads, writes in work.requests
    )
    return answering_s + work.row_flops / speed.flops


def _speed_of(stage: Stage, config: RunConfig, sizes: Sizes) -> Speed:
    """Return what one actor or worker reaches: its share of GPUs, or its cores."""
    processes = config.workers if _what(stage, config) == "workers" else config.actors
    floor_s = _STEP_FLOOR_S * sizes.model.num_parameters if config.model.engine == "transformers" else 0.0
    if not processes.num_gpus:
        cores = max(processes.num_cpus, 1.0)
        return Speed(cores * _CPU.flops, cores * _CPU.bandwidth, floor_s)
    device, given = find_device(config.estimate.device), config.estimate
    assert device, "the configuration checks it"
    return Speed(
        processes.num_gpus * device.peak_flops * given.compute_share,
        processes.num_gpus * device.memory_bandwidth_gb_s * 1e9 * given.bandwidth_share,
        floor_s,
    )


def _batch_of(config: RunConfig, sizes: Sizes) -> float:
    """Return the requests that an actor computes at once."""
    actors = config.actors
    if not actors.batch_tokens or config.model.engine == "vllm":
        return actors.batch_size
    longest = sizes.num_prompt_tokens + config.preferences.max_new_tokens
    return max(1.0, min(actors.batch_size, actors.batch_tokens // longest))


def _rows_of_busiest(stage: Stage, work: Work, config: RunConfig) -> float:
    """Return the rows of the process with the most: whole shards for an actor, an equal part for a worker."""
    what = _what(stage, config)
    if what == "workers":
        return work.num_rows / config.workers.num_workers
    if what == "tasks":
        return work.num_rows / max(1.0, config.actors.num_actors * config.actors.num_cpus)
    shard_size = config.pool.shard_size
    return min(work.num_rows, math.ceil(math.ceil(work.num_rows / shard_size) / config.actors.num_actors) * shard_size)


def _start_s(step: Step, config: RunConfig, sizes: Sizes) -> float:
    """Return the seconds until the processes work: they start, and load every model that the step asks."""
    num_models = len(step.inputs) + 1 if step.stage.reads is None else 1
    num_models = num_models if _what(step.stage, config) != "tasks" else 0
    return _START_S + num_models * sizes.model.weight_bytes / _LOADING_BYTES_PER_S


def _gpus_of(stage: Stage, config: RunConfig) -> float:
    need = stage.need(config)
    num = config.workers.num_workers if need.what == "workers" else config.actors.num_actors
    return num * need.each.get("GPU", 0.0)


def _price_of(stage: Stage, config: RunConfig) -> float | None:
    given = config.estimate
    own = given.training_price_per_gpu_hour if _what(stage, config) == "workers" else None
    return given.price_per_gpu_hour if own is None else own
