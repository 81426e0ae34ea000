"""What a command would do, said without touching anything."""

from collections.abc import Sequence

from stic_ray.core.config import RunConfig, sources_of
from stic_ray.core.placement import Machines, check_fits, lacks_of, lacks_told
from stic_ray.core.resources import LabelSelector, accumulation_steps
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


def machines_for(config: RunConfig) -> Machines:
    """Return the machines that a run would find: of the cluster at RAY_ADDRESS, else this one."""
    from stic_ray.stages import cluster  # Ray is for this only

    return cluster.machines(config)


def placement(config: RunConfig, stages: Sequence[str], machines: Machines) -> list[str]:
    """Return lines about the machines, and about stages for which others have to be started."""
    lacks = lacks_of(config, _with_processes(stages), machines) if machines.may_grow else {}
    return [f"{machines}", *([f"to be started first: {lacks_told(lacks, machines)}"] if lacks else [])]


def check_room(config: RunConfig, stages: Sequence[str], machines: Machines, num_runs: int = 1) -> None:
    """Raise ConfigError when so many runs at once can never have what one of the stages asks for."""
    check_fits(config, _with_processes(stages), machines, num_runs)


def _with_processes(stages: Sequence[str]) -> list[str]:
    return [stage.name for stage in STAGES if stage.name in stages]


def _processes(name: str, config: RunConfig) -> str:
    """Say with how many processes a stage runs, and for training how the global batch comes about."""
    actors, workers = config.actors, config.workers
    if name == "pool":
        return "tasks"
    if name in ("dpo", "sft"):
        stage = config.dpo if name == "dpo" else config.sft
        return (
            f"{workers.num_workers} workers of {workers.num_cpus:g} CPU, {workers.num_gpus:g} GPU"
            f"{_selected(workers.label_selector)}, "
            f"ZeRO {workers.zero_stage}, {config.tuning.method}, global batch {stage.global_batch} = "
            f"{workers.num_workers} x {workers.micro_batch} x {accumulation_steps(stage.global_batch, workers)} steps"
        )
    parallel = f", tensor parallel {actors.num_gpus:g}" if config.model.engine == "vllm" and actors.num_gpus > 1 else ""
    least = f"{actors.min_actors} to " if actors.min_actors else ""
    return (
        f"{least}{actors.num_actors} actors of {actors.num_cpus:g} CPU, {actors.num_gpus:g} GPU"
        f"{parallel}{_selected(actors.label_selector)}, batch {actors.batch_size}"
    )


def _selected(selector: LabelSelector) -> str:
    return f" on nodes with {', '.join(f'{key}={value}' for key, value in selector)}" if selector else ""
