"""Seconds of one process per row of a step's work: as the model has it, and from what a run measured.

Reading a prompt is bound by arithmetic, 2 operations per parameter and token. Writing an answer is bound by memory:
every step reads the weights once for the whole batch, and each request's cached tokens. Training is bound by
arithmetic: 2 operations per parameter and token forward, 2 for the gradients of activations, 2 for those of weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from stic_ray.core.config import RunConfig
from stic_ray.core.devices import find_device
from stic_ray.core.errors import ConfigError
from stic_ray.core.overrides import apply_values
from stic_ray.core.placement import Need
from stic_ray.core.steps import Step, Steps
from stic_ray.core.workload import ModelSize, Sizes, Work
from stic_ray.estimate.known import Measured


@dataclass(frozen=True)
class Speed:
    """What one process reaches."""

    flops: float
    """Operations per second."""
    bandwidth: float
    """Bytes per second between chip and memory."""
    step_floor_s: float = 0.0
    """Seconds that a step of generation takes at least, whatever the device: the engine's own work."""


_CPU = Speed(flops=40e9, bandwidth=8e9)
"""One core."""
_STEP_FLOOR_S = 0.025 / 7.25e9
"""What a step of transformers' `generate` takes per parameter, whatever the device: 25 ms for 7B."""
_SCAN_CPU_S = 0.005
"""CPU time to hash, decode and index a photograph."""


@dataclass(frozen=True)
class Rate:
    """How fast a finished step was."""

    step: str
    stage: str
    what: str
    """Kind of its processes."""
    measured_s: float
    """Seconds of one process per row of its work."""
    modelled_s: float
    """The same as the model has it, under the settings that it was made with."""


def rates_of(pilot: Measured, config: RunConfig, steps: Steps, sizes: Sizes) -> list[Rate]:
    """Return the rates of a run's finished steps, as far as their stages are among `steps`."""
    own = {step.name: step for step in steps}
    of_stage = {step.stage.name: step for step in reversed(steps)}
    some = {name: getattr(sizes, name) or 1.0 for name in ("num_images", "num_instructions", "num_questions")}
    known, found = config.identifying(), []
    for name, manifest in pilot.manifests.items():
        stage, measured_s = manifest.get("stage"), pilot.process_s_per_row(name)
        step = own[name] if name in own and own[name].stage.name == stage else of_stage.get(str(stage))
        if step is None or not measured_s:
            continue
        made_with = {key: value for key, value in manifest.get("config", {}).items() if key in known}
        try:
            configured = apply_values(step.configured(config), made_with)
            work = step.stage.work(configured, replace(sizes, **some))
        except ConfigError:  # made by a version with other settings, or with scorers that are not here
            continue
        need = step.stage.need(configured)
        if work is not None:
            modelled_s = modelled_row_s(need, configured, sizes, work)
            found.append(Rate(name, step.stage.name, need.what, measured_s, modelled_s))
    return found


def row_s(step: Step, config: RunConfig, sizes: Sizes, work: Work, rates: Sequence[Rate]) -> tuple[float, str]:
    """Return the seconds of one process per row, and where they come from.

    Of a finished step of the same stage, of the same name or else the most similar one, the rate is scaled by what the
    model says of the difference between the settings of the two.
    """
    need = step.stage.need(config)
    modelled_s = modelled_row_s(need, config, sizes, work)
    same = [each for each in rates if each.stage == step.stage.name and bool(each.modelled_s) == bool(modelled_s)]
    if same:
        scales = {each: modelled_s / each.modelled_s if modelled_s else 1.0 for each in same}
        nearest = min(same, key=lambda each: (each.step != step.name, abs(math.log(scales[each]))))
        return nearest.measured_s * scales[nearest], "measured"
    for other in rates if work.requests or work.row_flops else ():
        # Of the same kind of processes: what the model gets wrong of one, it gets wrong of the other.
        if other.what == need.what and other.modelled_s:
            return modelled_s * other.measured_s / other.modelled_s, f"as {other.step} was"
    return modelled_s, "model"


def modelled_row_s(need: Need, config: RunConfig, sizes: Sizes, work: Work) -> float:
    """Return the modelled seconds of one process per row."""
    if need.what == "tasks":
        return _SCAN_CPU_S
    speed, actors = _speed_of(need, config, sizes), config.actors
    batch_size = float(actors.batch_size)
    if actors.batch_tokens and config.model.engine != "vllm":
        longest = sizes.num_prompt_tokens + config.preferences.max_new_tokens
        batch_size = max(1.0, min(batch_size, actors.batch_tokens // longest))
    answering_s = sum(
        number
        * generation_s(sizes.model, speed, num_prompt_tokens=reads, num_answer_tokens=writes, batch_size=batch_size)
        for number, reads, writes in work.requests
    )
    return answering_s + work.row_flops / speed.flops


def generation_s(
    model: ModelSize, speed: Speed, *, num_prompt_tokens: float, num_answer_tokens: float, batch_size: float
) -> float:
    """Return the seconds of one process per request, when it has `batch_size` requests at a time.

    `num_prompt_tokens` are those that are computed, image included: a shared prefix counts once.
    """
    reading_s = 2 * model.num_parameters * num_prompt_tokens / speed.flops
    context_tokens = num_prompt_tokens + num_answer_tokens / 2
    step_bytes = model.weight_bytes + batch_size * context_tokens * model.cache_bytes_per_token
    step_s = max(step_bytes / speed.bandwidth, speed.step_floor_s)
    return reading_s + num_answer_tokens * step_s / batch_size


def _speed_of(need: Need, config: RunConfig, sizes: Sizes) -> Speed:
    """Return what one actor or worker reaches: its share of GPUs, or its cores."""
    floor_s = _STEP_FLOOR_S * sizes.model.num_parameters if config.model.engine == "transformers" else 0.0
    num_gpus, given = need.each.get("GPU", 0.0), config.estimate
    if not num_gpus:
        cores = max(need.each["CPU"], 1.0)
        return Speed(cores * _CPU.flops, cores * _CPU.bandwidth, floor_s)
    device = find_device(given.device)
    assert device, "the configuration checks it"
    return Speed(
        num_gpus * device.peak_flops * given.compute_share,
        num_gpus * device.memory_bandwidth_gb_s * 1e9 * given.bandwidth_share,
        floor_s,
    )
