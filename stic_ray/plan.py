"""What a command would do, said without touching anything."""

from collections.abc import Sequence

from stic_ray.core.config import RunConfig, sources_of
from stic_ray.core.resources import accumulation_steps
from stic_ray.core.rundir import RunDir
from stic_ray.pipeline import REPORT, STAGES, check_stage_names, inputs_of


def plan(config: RunConfig, run: RunDir | None, stages: Sequence[str]) -> list[str]:
    """Return a line per stage: what it would do, or that it is done. Touches nothing."""
    check_stage_names(stages)
    lines = []
    for stage in STAGES:
        if stage.name in stages:
            state = "done" if run and (run / stage.name).manifest else "to do"
            reads = ", ".join(inputs_of(stage, config)) or ", ".join(sources_of(stage.name, config))
            with_what = _processes(stage.name, config)
            lines.append(f"{stage.name:<12} {state:<6} reads {reads}; {with_what}; leaves {stage.name}/{stage.leaves}")
    if REPORT in stages:
        lines.append(f"{REPORT:<12} {'':<6} reads manifests, metrics, scores; leaves report.html, report.json")
    return lines


def _processes(name: str, config: RunConfig) -> str:
    """Say with how many processes a stage runs, and for training how the global batch comes about."""
    actors, workers = config.actors, config.workers
    if name == "pool":
        return "tasks"
    if name in ("dpo", "sft"):
        stage = config.dpo if name == "dpo" else config.sft
        return (
            f"{workers.num_workers} workers of {workers.num_cpus:g} CPU, {workers.num_gpus:g} GPU, "
            f"ZeRO {workers.zero_stage}, {config.tuning.method}, global batch {stage.global_batch} = "
            f"{workers.num_workers} x {workers.micro_batch} x {accumulation_steps(stage.global_batch, workers)} steps"
        )
    return f"{actors.num_actors} actors of {actors.num_cpus:g} CPU, {actors.num_gpus:g} GPU, batch {actors.batch_size}"
