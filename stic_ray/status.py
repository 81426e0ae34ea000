"""What a command would do, and how far a run is: from its directory alone, while it runs or after it died."""

import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from stic_ray.core import history, lease
from stic_ray.core.config import RunConfig
from stic_ray.core.errors import RunError
from stic_ray.core.placement import Machines, format_selector
from stic_ray.core.resources import accumulation_steps
from stic_ray.core.rundir import NOTES_FAMILY, RECORD_FAMILY, STARTED, RunDir
from stic_ray.core.steps import CONFIG, Step, Steps, left_out_of, left_out_of_record, read_from, read_record
from stic_ray.pipeline import REPORT, check_names
from stic_ray.report.formats import duration, number

_TRAINING = "training"
"""Folder of Ray Train's checkpoints while a training is not finished."""


def plan(config: RunConfig, steps: Steps, run: RunDir | None, names: Sequence[str]) -> list[str]:
    """Return a line per step: what it would do, or that it is done. Touches nothing."""
    check_names(names, steps)
    lines = []
    unwanted = left_out_of(steps, run) if run else set()
    for step in steps:
        if step.name in names:
            own = step.configured(config)
            todo = "left out" if step.name in unwanted else "to do"
            state = "done" if run and (run / step.name).manifest else todo
            sources = [source for field in step.stage.sources for source in own.sources(field)]
            read = [read_from(source, run) if run else source for source in step.inputs.values()]
            reads = ", ".join(dict.fromkeys(read)) or ", ".join(sources)
            lines.append(
                f"{step.name:<12} {state:<8} reads {reads}; {_processes(step, own)}; "
                f"leaves {step.name}/{step.stage.writes}"
            )
    if REPORT in names:
        lines.append(f"{REPORT:<12} {'':<8} reads manifests, metrics, scores; leaves report.html, report.json")
    return lines


def machines_for(config: RunConfig) -> Machines:
    """Return the machines that a run would find: of the cluster at RAY_ADDRESS, else this one."""
    from stic_ray.stages import cluster  # Ray is for this only

    return cluster.machines(config)


def _processes(step: Step, config: RunConfig) -> str:
    """Return with how many processes a step runs, and for training how the global batch comes about."""
    actors, workers, need = config.actors, config.workers, step.stage.need(config)
    if need.what == "tasks":
        return need.what
    if need.what == "workers":
        global_batch = getattr(config, step.stage.section).global_batch
        return (
            f"{workers.num_workers} workers of {workers.num_cpus:g} CPU, {workers.num_gpus:g} GPU"
            f"{format_selector(need.label_selector)}, "
            f"ZeRO {workers.zero_stage}, {config.tuning.method}, global batch {global_batch} = "
            f"{workers.num_workers} x {workers.micro_batch} x {accumulation_steps(global_batch, workers)} steps"
        )
    parallel = f", tensor parallel {actors.num_gpus:g}" if config.model.engine == "vllm" and actors.num_gpus > 1 else ""
    least = f"{actors.min_actors} to " if actors.min_actors else ""
    return (
        f"{least}{actors.num_actors} actors of {actors.num_cpus:g} CPU, {need.each['GPU']:g} GPU"
        f"{parallel}{format_selector(need.label_selector)}, batch {actors.batch_size}"
    )


def run_status(run: RunDir) -> list[str]:
    """Return a line per step: finished and with what, under way and how far, or not begun; and who holds the run.

    Raises RunError when there is no run.
    """
    record = read_record(run)
    if not record.steps:
        raise RunError(f"No run at '{run.uri}': it has no {CONFIG}.")
    unwanted = left_out_of_record(record, run)
    lines = [
        f"{step['name']:<12} "
        + (f"left out    {step['only_after']}" if step["name"] in unwanted else _step(run / step["name"], step))
        for step in record.steps
    ]
    if holder := lease.holder(run):
        seen = duration(max(0.0, time.time() - holder["seen_at"]))
        lines.append(f"held by process {holder['pid']} on {holder['host']}, last sign of life {seen} ago")
    return lines


def _step(output: RunDir, step: Mapping[str, Any]) -> str:
    attempts = history.read_attempts(output)
    took = history.totals(attempts, time.time())
    times = f" in {took.num_attempts} attempts" if took.num_attempts > 1 else ""
    if manifest := output.manifest:
        counts = ", ".join(
            f"{number(manifest[f'num_rows_{what}'])} {what}" for what in ("in", "written", "rejected", "failed")
        )
        reasons = ", ".join(f"{reason} {number(count)}" for reason, count in manifest["rejected_by_reason"].items())
        finished = f"{manifest['finished_at']} after {duration(manifest['seconds'])}{times}"
        return f"finished    {counts}{f' ({reasons})' if reasons else ''}; {finished}"
    if output.read_json(STARTED) is None:
        return "not begun"
    files = output.location.files()
    age_s = time.time() - max(file.mtime_ns for file in files) / 1e9
    progress = _checkpoints(output) if step["processes"] == "workers" else _shards(output)
    ended = f"; ended with {attempts[-1]['ended']}" if attempts and attempts[-1]["ended"] else ""
    return f"begun       {progress}; last file {duration(max(0.0, age_s))} ago{times}{ended}"


def _checkpoints(output: RunDir) -> str:
    found = [file.path for file in (output.location / _TRAINING).below(recursive=True)]
    names = {match[0] for path in found if (match := re.search(r"checkpoint_\S+?(?=/|$)", path))}
    return f"last checkpoint {max(names)}" if names else "no checkpoint yet"


def _shards(output: RunDir) -> str:
    """Say how many shards are finished, of how many where that is known."""
    names = [re.match(r"(.+)-\d{6,}\.(?:parquet|json)$", file.base_name) for file in output.location.files()]
    counts = Counter(name[1] for name in names if name)
    num_open = counts[NOTES_FAMILY]
    num_done = sum(times for name, times in counts.items() if name.partition("-")[0] == RECORD_FAMILY)
    total = sum((output.read_json(STARTED) or {}).get("num_shards", {}).values())
    shards = f"{num_done} of {total} shards" if total else f"{num_done} shards"
    return f"{shards}, {num_open} at work or cut off"
