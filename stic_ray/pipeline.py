"""The stages in order: which are done, which must be refused, which run.

Reading order for a newcomer: STAGES, then `run_pipeline`.
"""

import logging
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from stic_ray.core.config import RunConfig, is_toy, sources_of
from stic_ray.core.errors import ConfigError, RunError, SourceError, nearest
from stic_ray.core.placement import need_of
from stic_ray.core.provenance import git_commit, package_versions
from stic_ray.core.rundir import MANIFEST, STARTED, RunDir, digest
from stic_ray.core.storage import Location
from stic_ray.estimate.stages import record_estimate
from stic_ray.growth import takes_in_more

logger = logging.getLogger(__name__)

StageFunction = Callable[[RunConfig, RunDir, Mapping[str, str] | None], dict[str, Any]]
"""Does a stage's work and returns its row accounts; the mapping is `Stage.trained`."""


@dataclass(frozen=True)
class Stage:
    """A stage, and the settings that are part of its identity; what it reads is `inputs_of`."""

    name: str
    settings: tuple[str, ...]
    """Sections (or "section.field") of the configuration that its result depends on."""
    leaves: str
    """What it writes, for the plan."""
    trained: Mapping[str, str] | None = None
    """For an evaluation alone: checkpoints to compare with the base model, by name."""


_IMAGES = ("pool.shard_size", "pool.min_side_px", "pool.max_image_pixels", "pool.max_aspect_ratio")
"""Settings of the pool that also hold for images of instruction data and benchmarks."""

STAGES = (
    Stage("pool", ("seed", "pool"), "index-*.parquet"),
    Stage(
        "preferences",
        ("seed", "prompts", "model", "preferences", "dpo.max_length_tokens", "pool.shard_size"),
        "pairs-*.parquet",
    ),
    Stage("dpo", ("seed", "model", "tuning", "dpo"), "checkpoint/"),
    Stage(
        "infusion",
        ("seed", "prompts", "model", "infusion", "sft.max_length_tokens", *_IMAGES),
        "rows-*.parquet",
    ),
    Stage("sft", ("seed", "model", "tuning", "sft"), "checkpoint/"),
    Stage("evaluation", ("seed", "prompts", "model", "evaluation", *_IMAGES), "scores.json"),
)
EVALUATION = STAGES[-1]
REPORT = "report"
STAGE_NAMES = (*(stage.name for stage in STAGES), REPORT)
GROWING = {"pool", "preferences"}
"""Stages that go on behind what they have when the source has grown; nothing that was finished is made again."""
GROWN_FROM = "grown_from"
"""In the manifest of a stage that has grown: the hashes of its manifests before."""
_PAIRS = "dpo.pairs"
"""Name under which the pairs of another run are recorded as an input."""


def inputs_of(stage: Stage, config: RunConfig) -> tuple[str, ...]:
    """Return the stages whose output a stage reads under this configuration."""
    start = ("dpo",) if config.sft.start == "dpo" else ()
    inputs = {
        "preferences": ("pool",),
        "dpo": () if config.dpo.pairs else ("preferences",),
        "infusion": start if config.infusion.describe else (),
        "sft": (*start, "infusion"),
        "evaluation": tuple(model for model in config.evaluation.models if model != "base"),
    }
    return inputs.get(stage.name, ())


def stages_needed(config: RunConfig) -> tuple[str, ...]:
    """Return the stages of a whole run in order, without those that nothing in its evaluation comes from."""
    needed = _with_inputs({EVALUATION.name, REPORT}, config)
    return tuple(name for name in STAGE_NAMES if name in needed)


def run_pipeline(config: RunConfig, run: RunDir, stages: Sequence[str], facts: dict[str, Any]) -> None:
    """Run the named stages that are not done yet, in order; `facts` (recipe, overrides) go into config.yaml.

    Raises ConfigError for an unknown stage, RunError when a stage was made or begun with other settings or lacks
    its input, and whatever a stage raises. What was finished stays.
    """
    check_stage_names(stages)
    needed = _with_inputs(stages, config)
    done = {stage.name for stage in STAGES if stage.name in needed and _is_done(stage, config, run)}
    if "pool" in done & set(stages) and takes_in_more(config, run):
        done -= GROWING
    for name in (stage.name for stage in STAGES if stage.name in done):
        logger.info("%s: already done, skipped", name)
    todo = [stage for stage in STAGES if stage.name in stages and stage.name not in done]
    if todo:
        _check_inputs(todo, done, config, run)
        _run(todo, config, run, facts)
    if REPORT in stages and not _report_is_current(run):
        from stic_ray.report.write import write_report  # matplotlib is for the report only

        write_report(run)
        logger.info("report: written")


def run_evaluation_alone(config: RunConfig, run: RunDir, checkpoint: str | None, facts: dict[str, Any]) -> None:
    """Score the model of the configuration and, when given, a checkpoint that was trained from it."""
    if checkpoint is not None and not Location.of(checkpoint).is_folder():
        raise SourceError(f"--checkpoint '{checkpoint}' is no folder with an adapter or a model.")
    stage = replace(EVALUATION, trained={"checkpoint": checkpoint} if checkpoint else {})
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"models": ("base",)})})
    if not _is_done(stage, config, run):
        _run([stage], config, run, facts)


def check_stage_names(stages: Sequence[str]) -> None:
    """Raise ConfigError for a stage that does not exist."""
    for name in stages:
        if name not in STAGE_NAMES:
            raise ConfigError(f"Unknown stage '{name}'.{nearest(name, STAGE_NAMES)} Valid: {', '.join(STAGE_NAMES)}.")


def _run(todo: Sequence[Stage], config: RunConfig, run: RunDir, facts: dict[str, Any]) -> None:
    """Prepare, connect and run. Ray and torch are imported here, so that a finished run is told in no time."""
    from stic_ray.stages import cluster, waiting

    for name, value in cluster.process_environment(config).items():
        os.environ.setdefault(name, value)  # before torch and its friends are imported
    from stic_ray.preparation import check_before_work, make_toyworld, resolve
    from stic_ray.stages.functions import FUNCTIONS

    resolved = resolve(config, run)
    _write_config(config, run, facts)
    names = [stage.name for stage in todo]
    record_estimate(config, run, names)
    make_toyworld(names, config, run)
    check_before_work(names, resolved)
    with cluster.connected(resolved, names):
        for stage in todo:
            need = need_of(stage.name, resolved)
            with cluster.released(), waiting.watched(stage.name, need, config.cluster.resource_timeout_s):
                _run_stage(stage, FUNCTIONS[stage.name], config, resolved, run)


def _run_stage(stage: Stage, function: StageFunction, config: RunConfig, resolved: RunConfig, run: RunDir) -> None:
    """Run one stage and write its manifest."""
    logger.info("%s: started", stage.name)
    output = run / stage.name
    settings = {"config": identity(stage, config), "inputs": _input_hashes(stage, config, run)}
    output.write_json(STARTED, settings)
    began_s = time.monotonic()
    accounts = function(resolved, run, stage.trained)
    seconds = round(time.monotonic() - began_s, 3)
    made = {"stage": stage.name, "seconds": seconds, **accounts, **settings, "config_hash": digest(settings["config"])}
    if smaller := output.manifest:
        made[GROWN_FROM] = [*smaller.get(GROWN_FROM, []), digest(smaller)]
    output.write_manifest(made)
    (output.location / STARTED).delete()
    counts = [accounts[f"num_rows_{what}"] for what in ("in", "written", "rejected")]
    logger.info("%s: done in %.1f s, %d rows in, %d written, %d rejected", stage.name, seconds, *counts)


def identity(stage: Stage, config: RunConfig) -> dict[str, Any]:
    """Return the settings that a stage's result depends on, as flat "section.field" keys."""
    flat: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{key}.{field}": inner for field, inner in value.items()}
        else:
            flat[key] = value
    for key in ("prompts", "model.chat_template"):
        if flat[key] and os.path.isfile(flat[key]):  # the text counts, not where it is
            flat[key] = digest(Path(flat[key]).read_bytes().hex())
    wanted = (*stage.settings, *_toy_settings(stage, config))
    settings = {key: value for key, value in flat.items() if key in wanted or key.split(".")[0] in wanted}
    return settings | dict(stage.trained or {})


def _toy_settings(stage: Stage, config: RunConfig) -> tuple[str, ...]:
    """Return the settings of the toy world that a stage's result depends on."""
    settings = {
        "pool": ("toyworld.num_pictures",),
        "infusion": ("toyworld.num_instructions",),
        "evaluation": ("toyworld.num_scenes", "toyworld.split"),
    }
    return settings.get(stage.name, ()) if any(map(is_toy, sources_of(stage.name, config))) else ()


def _is_done(stage: Stage, config: RunConfig, run: RunDir) -> bool:
    """Whether the stage is finished; raises RunError when it was made, or begun, from something else."""
    output = run / stage.name
    manifest = output.manifest
    made = manifest or output.read_json(STARTED)
    if made is None:
        return False
    how = "finished" if manifest else "begun"
    way_out = f"delete '{output.uri}' and the stages behind it, or use another --run."
    before, now = made["config"], identity(stage, config)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        differences = "; ".join(f"{key} was {before.get(key)!r}, is now {now.get(key)!r}" for key in changed)
        raise RunError(
            f"Stage {stage.name} of '{run.uri}' was {how} with other settings: {differences}. "
            f"Set the old value, {way_out}"
        )
    before, now = made["inputs"], _input_hashes(stage, config, run)
    if before.keys() != now.keys():
        sources = [" and ".join(sorted(inputs)) or "no other stage" for inputs in (before, now)]
        raise RunError(
            f"Stage {stage.name} of '{run.uri}' was {how} from {sources[0]}, these settings make it from "
            f"{sources[1]}: {way_out}"
        )
    changed = [name for name in now if now[name] != before[name]]
    if manifest and all(before[name] in _earlier_states(name, config, run) for name in changed):
        return not changed or stage.name not in GROWING  # training stays with the rows that it was begun with
    if changed:
        raise RunError(
            f"Stage {stage.name} of '{run.uri}' was {how} from another {changed[0]} than the one that is there now: "
            f"{way_out}"
        )
    return manifest is not None


def _with_inputs(names: Collection[str], config: RunConfig) -> set[str]:
    """Return the named stages and all that they are made from."""
    found = set(names)
    for stage in reversed(STAGES):
        if stage.name in found:
            found |= set(inputs_of(stage, config))
    return found


def _report_is_current(run: RunDir) -> bool:
    """Whether the report was written after every manifest."""
    report = (run.location / "report.html").info()
    manifests = [((run / stage.name).location / MANIFEST).info() for stage in STAGES]
    return report.is_file and all(report.mtime_ns >= manifest.mtime_ns for manifest in manifests if manifest.is_file)


def _input_hashes(stage: Stage, config: RunConfig, run: RunDir) -> dict[str, str]:
    names = (*inputs_of(stage, config), *((_PAIRS,) if stage.name == "dpo" and config.dpo.pairs else ()))
    return {name: digest(_place_of(name, config, run).manifest) for name in names}


def _place_of(name: str, config: RunConfig, run: RunDir) -> RunDir:
    """Return the folder of an input: a stage of the run, or the pairs of another run."""
    return RunDir.of(config.dpo.pairs) if name == _PAIRS and config.dpo.pairs else run / name


def _earlier_states(name: str, config: RunConfig, run: RunDir) -> list[str]:
    """Return the hashes of the manifests that an input had before it grew."""
    return (_place_of(name, config, run).manifest or {}).get(GROWN_FROM, [])


def _check_inputs(todo: Sequence[Stage], done: Collection[str], config: RunConfig, run: RunDir) -> None:
    ready = {stage.name for stage in todo} | set(done)
    for stage in todo:
        for name in inputs_of(stage, config):
            if name not in ready:
                raise RunError(f"Stage {stage.name} needs stage {name}, which '{run.uri}' does not have; run it first.")


def _write_config(config: RunConfig, run: RunDir, facts: dict[str, Any]) -> None:
    record = {
        **facts,
        "git_commit": git_commit(),
        "package_versions": package_versions(),
        "config": config.model_dump(mode="json"),
    }
    run.write_text("config.yaml", yaml.safe_dump(record, sort_keys=False))
