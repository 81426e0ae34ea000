"""The stages in order: which are done, which must be refused, which run.

Reading order for a newcomer: STAGES, then `run_pipeline`.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stic_ray.core.config import TOYWORLD, RunConfig, accumulation_steps
from stic_ray.core.errors import ConfigError, RunError, SourceError, nearest
from stic_ray.core.provenance import git_commit, package_versions
from stic_ray.core.rundir import RunDir, digest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """A stage: what it reads, and the settings that are part of its identity."""

    name: str
    inputs: tuple[str, ...]
    """Stages whose output it reads."""
    settings: tuple[str, ...]
    """Sections (or "section.field") of the configuration that its result depends on."""
    leaves: str
    """What it writes, for the plan."""


STAGES = (
    Stage("pool", (), ("seed", "pool"), "index-*.parquet"),
    Stage(
        "preferences",
        ("pool",),
        ("seed", "prompts", "model", "preferences", "dpo.max_length_tokens"),
        "pairs-*.parquet",
    ),
    Stage("dpo", ("preferences",), ("seed", "model", "tuning", "dpo"), "checkpoint/"),
    Stage("infusion", ("dpo",), ("seed", "prompts", "model", "infusion", "sft.max_length_tokens"), "rows-*.parquet"),
    Stage("sft", ("dpo", "infusion"), ("seed", "model", "tuning", "sft"), "checkpoint/"),
    Stage("evaluation", ("dpo", "sft"), ("seed", "prompts", "model", "evaluation"), "scores.json"),
)
REPORT = "report"
STAGE_NAMES = (*(stage.name for stage in STAGES), REPORT)


def run_pipeline(config: RunConfig, run: RunDir, stages: Sequence[str], facts: dict[str, Any]) -> None:
    """Run the named stages that are not done yet, in order; `facts` (recipe, overrides) go into config.yaml.

    Raises ConfigError for an unknown stage, RunError when a finished stage was made with other settings or a stage
    lacks its input, and whatever a stage raises. What was finished stays.
    """
    check_stage_names(stages)
    wanted = [stage for stage in STAGES if stage.name in stages]
    todo = [stage for stage in wanted if not _is_done(stage, config, run)]
    config_made = resolve(config, run)
    if todo:
        _check_inputs(todo, run)
        _check_before_work(todo, config_made)
        _write_config(config, run, facts)
        _make_toyworld(config, run)
        _run_stages(todo, config, config_made, run)
    if REPORT in stages and (todo or not (run.location / "report.html").exists()):
        from stic_ray.report.write import write_report  # matplotlib is for the report only

        write_report(run)
        logger.info("report: written")


def check_stage_names(stages: Sequence[str]) -> None:
    """Raise ConfigError for a stage that does not exist."""
    for name in stages:
        if name not in STAGE_NAMES:
            raise ConfigError(f"Unknown stage '{name}'.{nearest(name, STAGE_NAMES)} Valid: {', '.join(STAGE_NAMES)}.")


def plan(config: RunConfig, run: RunDir, stages: Sequence[str]) -> list[str]:
    """Return a line per stage: what it would do, or that it is done. Touches nothing."""
    check_stage_names(stages)
    lines = []
    for stage in STAGES:
        if stage.name in stages:
            state = "done" if (run / stage.name).manifest else "to do"
            reads = ", ".join(stage.inputs) or config.pool.source
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


def resolve(config: RunConfig, run: RunDir) -> RunConfig:
    """Return the configuration with `toyworld` replaced by the places where its parts are made."""
    folder = f"{run.uri}/{TOYWORLD}"
    data = config.model_dump()
    for section, field, place in (
        ("model", "path", "model"),
        ("pool", "source", "pictures"),
        ("infusion", "source", "instructions/instructions.json"),
    ):
        if data[section][field] == TOYWORLD:
            data[section][field] = f"{folder}/{place}"
    toy_benchmarks = tuple(f"{folder}/benchmarks/{name}.jsonl" for name in ("toy_choice", "toy_short"))
    given = config.evaluation.benchmarks
    data["evaluation"]["benchmarks"] = tuple(b for g in given for b in (toy_benchmarks if g == TOYWORLD else (g,)))
    return RunConfig.model_validate(data)


def _run_stages(todo: Sequence[Stage], config: RunConfig, resolved: RunConfig, run: RunDir) -> None:
    from stic_ray.stages import cluster  # heavy, and not needed where every stage is done

    for name, value in cluster.process_environment(resolved).items():
        os.environ.setdefault(name, value)  # before torch and its friends are imported
    from stic_ray.engines.opening import check_engine

    check_engine(resolved.model)
    cluster.connect(resolved)
    functions = _functions()
    for stage in todo:
        logger.info("%s: started", stage.name)
        began_s = time.monotonic()
        with cluster.released():
            accounts = functions[stage.name](resolved, run)
        seconds = time.monotonic() - began_s
        settings = identity(stage, config)
        (run / stage.name).write_manifest(
            {
                "stage": stage.name,
                "seconds": round(seconds, 3),
                **accounts,
                "config": settings,
                "config_hash": digest(settings),
                "inputs": _input_hashes(stage, run),
            }
        )
        logger.info(
            "%s: done in %.1f s, %d rows in, %d written, %d rejected",
            stage.name,
            seconds,
            accounts["num_rows_in"],
            accounts["num_rows_written"],
            accounts["num_rows_rejected"],
        )


def _functions() -> dict[str, Callable[[RunConfig, RunDir], dict[str, Any]]]:
    from stic_ray.stages.evaluation import run_evaluation
    from stic_ray.stages.infusion import build_infusion
    from stic_ray.stages.pool import build_pool
    from stic_ray.stages.preferences import build_preferences
    from stic_ray.stages.training.launch import train_dpo, train_sft

    return {
        "pool": build_pool,
        "preferences": build_preferences,
        "dpo": train_dpo,
        "infusion": build_infusion,
        "sft": train_sft,
        "evaluation": run_evaluation,
    }


def identity(stage: Stage, config: RunConfig) -> dict[str, Any]:
    """Return the settings that a stage's result depends on, as flat "section.field" keys."""
    flat: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{key}.{field}": inner for field, inner in value.items()}
        else:
            flat[key] = value
    uses_toyworld = any(TOYWORLD in str(flat[key]) for key in _toy_fields(stage))
    wanted = (*stage.settings, *(("toyworld",) if uses_toyworld else ()))
    return {key: value for key, value in flat.items() if key in wanted or key.split(".")[0] in wanted}


def _toy_fields(stage: Stage) -> list[str]:
    fields = {"pool": "pool.source", "infusion": "infusion.source", "evaluation": "evaluation.benchmarks"}
    return [fields[stage.name]] if stage.name in fields else []


def _is_done(stage: Stage, config: RunConfig, run: RunDir) -> bool:
    """Whether the stage is finished; raises RunError when it was finished with other settings or inputs."""
    manifest = (run / stage.name).manifest
    if manifest is None:
        return False
    before, now = manifest["config"], identity(stage, config)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        differences = "; ".join(f"{key} was {before.get(key)!r}, is now {now.get(key)!r}" for key in changed)
        raise RunError(
            f"Stage {stage.name} of '{run.uri}' is finished with other settings: {differences}. Use another --run, "
            f"set the old value, or delete '{run.uri}/{stage.name}' and the stages behind it."
        )
    changed = [name for name, value in _input_hashes(stage, run).items() if value != manifest["inputs"].get(name)]
    if changed:
        raise RunError(
            f"Stage {stage.name} of '{run.uri}' was made from another {changed[0]} than the one that is there now. "
            f"Delete '{run.uri}/{stage.name}' and the stages behind it, or use another --run."
        )
    logger.info("%s: already done, skipped", stage.name)
    return True


def _input_hashes(stage: Stage, run: RunDir) -> dict[str, str]:
    return {name: digest((run / name).manifest) for name in stage.inputs}


def _check_inputs(todo: Sequence[Stage], run: RunDir) -> None:
    coming = {stage.name for stage in todo}
    for stage in todo:
        for name in stage.inputs:
            if name not in coming and (run / name).manifest is None:
                raise RunError(f"Stage {stage.name} needs stage {name}, which '{run.uri}' does not have; run it first.")


def _check_before_work(todo: Sequence[Stage], config: RunConfig) -> None:
    """Find the user's mistakes before minutes or GPUs are spent on earlier stages."""
    from stic_ray.core.storage import Location
    from stic_ray.method.prompts import load_prompts

    load_prompts(config.prompts)
    names = {stage.name for stage in todo}
    if config.model.engine == "fake" and names & {"dpo", "sft"}:
        raise ConfigError("model.engine=fake cannot be trained; use --stages pool,preferences with it.")
    for name, stage in (("dpo", config.dpo), ("sft", config.sft)):
        if name in names:
            accumulation_steps(stage.global_batch, config.workers)
    needed = {
        "pool": ("pool.source", (config.pool.source,)),
        "infusion": ("infusion.source", (config.infusion.source,)),
        "evaluation": ("evaluation.benchmarks", config.evaluation.benchmarks),
    }
    for name, (setting, sources) in needed.items():
        for source in sources:
            in_toyworld = f"/{TOYWORLD}/" in source
            if name in names and not in_toyworld and not Location.of(source).exists():
                raise SourceError(f"{setting}='{source}' does not exist.")


def _write_config(config: RunConfig, run: RunDir, facts: dict[str, Any]) -> None:
    import yaml

    record = {
        **facts,
        "git_commit": git_commit(),
        "package_versions": package_versions(),
        "config": config.model_dump(mode="json"),
    }
    run.write_text("config.yaml", yaml.safe_dump(record, sort_keys=False))


def _make_toyworld(config: RunConfig, run: RunDir) -> None:
    """Make pictures, instruction data, benchmarks and model where a source says `toyworld`."""
    sources = (config.model.path, config.pool.source, config.infusion.source, *config.evaluation.benchmarks)
    if TOYWORLD not in sources:
        return
    if not run.location.is_local:
        raise SourceError(
            f"The toy world needs a local --run, not '{run.uri}'; set model.path and the sources instead."
        )
    from pathlib import Path

    from stic_ray.toyworld.assets import write_assets

    write_assets(Path(run.uri) / TOYWORLD, seed=config.seed, **config.toyworld.model_dump())
