"""What a command would do, said without touching anything."""

from collections.abc import Collection, Sequence

from stic_ray.core.config import RunConfig
from stic_ray.core.placement import Machines, Need
from stic_ray.core.resources import LabelSelector, accumulation_steps
from stic_ray.core.rundir import RunDir
from stic_ray.core.steps import Step, Steps
from stic_ray.pipeline import REPORT, check_names


def plan(config: RunConfig, steps: Steps, run: RunDir | None, names: Sequence[str]) -> list[str]:
    """Return a line per step: what it would do, or that it is done. Touches nothing."""
    check_names(names, steps)
    lines = []
    for step in steps:
        if step.name in names:
            own = step.configured(config)
            state = "done" if run and (run / step.name).manifest else "to do"
            sources = [source for field in step.stage.sources for source in own.sources(field)]
            reads = ", ".join(dict.fromkeys(step.inputs.values())) or ", ".join(sources)
            lines.append(
                f"{step.name:<12} {state:<6} reads {reads}; {_processes(step, own)}; "
                f"leaves {step.name}/{step.stage.writes}"
            )
    if REPORT in names:
        lines.append(f"{REPORT:<12} {'':<6} reads manifests, metrics, scores; leaves report.html, report.json")
    return lines


def machines_for(config: RunConfig) -> Machines:
    """Return the machines that a run would find: of the cluster at RAY_ADDRESS, else this one."""
    from stic_ray.stages import cluster  # Ray is for this only

    return cluster.machines(config)


def needs_of(config: RunConfig, steps: Steps, names: Collection[str]) -> dict[str, Need]:
    """Return the processes of the named steps."""
    return {step.name: step.stage.need(step.configured(config)) for step in steps if step.name in names}


def _processes(step: Step, config: RunConfig) -> str:
    """Say with how many processes a step runs, and for training how the global batch comes about."""
    actors, workers, what = config.actors, config.workers, step.stage.need(config).what
    if what == "tasks":
        return what
    if what == "workers":
        global_batch = getattr(config, step.stage.section).global_batch
        return (
            f"{workers.num_workers} workers of {workers.num_cpus:g} CPU, {workers.num_gpus:g} GPU"
            f"{_selected(workers.label_selector)}, "
            f"ZeRO {workers.zero_stage}, {config.tuning.method}, global batch {global_batch} = "
            f"{workers.num_workers} x {workers.micro_batch} x {accumulation_steps(global_batch, workers)} steps"
        )
    parallel = f", tensor parallel {actors.num_gpus:g}" if config.model.engine == "vllm" and actors.num_gpus > 1 else ""
    least = f"{actors.min_actors} to " if actors.min_actors else ""
    return (
        f"{least}{actors.num_actors} actors of {actors.num_cpus:g} CPU, {step.stage.need(config).each['GPU']:g} GPU"
        f"{parallel}{_selected(actors.label_selector)}, batch {actors.batch_size}"
    )


def _selected(selector: LabelSelector) -> str:
    return f" on nodes with {', '.join(f'{key}={value}' for key, value in selector)}" if selector else ""
