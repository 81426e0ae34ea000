"""The steps of a run in order: which are done, which must be refused, which run.

Reading order for a newcomer: recipes.py, core/steps.py, then `run_pipeline`.
"""

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, replace
from typing import Any

import yaml

from stic_ray.core import history, lease
from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError, RunError, SourceError, nearest, type_and_message
from stic_ray.core.rundir import MANIFEST, ROWS_NOW, STARTED, RunDir, digest
from stic_ray.core.steps import (
    BASE,
    CHECKPOINT,
    CONFIG,
    Step,
    StepRun,
    Steps,
    check_steps,
    identity,
    input_hashes,
    left_out_of,
    prepare_step,
    with_inputs,
)
from stic_ray.core.storage import Location
from stic_ray.estimate.steps import record_estimate

logger = logging.getLogger(__name__)

REPORT = "report"
"""What may be named beside the steps; it is written anew when a step was made."""
GROWN_FROM = "grown_from"
"""In the manifest of a step that has grown: the hashes of its manifests before."""


def run_pipeline(config: RunConfig, steps: Steps, run: RunDir, names: Sequence[str], facts: dict[str, Any]) -> None:
    """Run the named steps that are not done yet, in order; `facts` (recipe, overrides) go into config.yaml.

    Raises ConfigError for an unknown step, RunError when a step was made or begun with other settings, lacks its
    input, or when another driver holds the run, and whatever a stage raises. What was finished stays.
    """
    check_steps(steps)
    check_names(names, steps)
    needed = with_inputs(names, steps)
    done = {step.name for step in steps if step.name in needed and _is_done(step, config, run)}
    done -= _that_grow(done & set(names), steps, config, run)
    unwanted = left_out_of(steps, run)
    for step in steps:
        if step.name in done:
            logger.info("%s: already done, skipped", step.name)
        elif step.name in unwanted & set(names):
            _log_left_out(step)
    todo = [step for step in steps if step.name in names and step.name not in done | unwanted]
    if todo:
        ready = {step.name for step in todo} | done | unwanted
        for step in todo:
            if missing := [name for name in step.earlier_steps if name not in ready]:
                lacking = f"stage {missing[0]}, which '{run.uri}' does not have; run it first."
                raise RunError(f"Stage {step.name} needs {lacking}")
        _run(todo, steps, config, run, facts)
    if REPORT in names and not _report_is_current(steps, run):
        from stic_ray.report.write import write_report  # matplotlib is for the report only

        write_report(run)
        logger.info("report: written")


def run_evaluation_alone(
    config: RunConfig, step: Step, run: RunDir, checkpoint: str | None, facts: dict[str, Any]
) -> None:
    """Score the model of the configuration and, when given, a checkpoint that was trained from it as `checkpoint`."""
    if checkpoint is not None and not Location.of(checkpoint).is_folder():
        raise SourceError(f"--checkpoint '{checkpoint}' is no folder with an adapter or a model.")
    inputs = {CHECKPOINT: Location.of(checkpoint).uri} if checkpoint else {}
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"models": (BASE,)})})
    step = replace(step, inputs=inputs)
    if not _is_done(step, config, run):
        _run([step], [step], config, run, facts)


def names_of(steps: Steps) -> tuple[str, ...]:
    """Return the names of a whole run in order: the steps that are results, what they come from, and the report."""
    needed = with_inputs({step.name for step in steps if step.stage.is_result}, steps)
    return (*(step.name for step in steps if step.name in needed), REPORT)


def check_names(names: Collection[str], steps: Steps) -> None:
    """Raise ConfigError for a step that the run does not have."""
    valid = [*(step.name for step in steps), REPORT]
    for name in names:
        if name not in valid:
            raise ConfigError(f"Unknown stage '{name}'.{nearest(name, valid)} Valid: {', '.join(valid)}.")


def _run(todo: Sequence[Step], steps: Steps, config: RunConfig, run: RunDir, facts: dict[str, Any]) -> None:
    """Prepare, connect and run. Ray and torch are imported here, so that a finished run is recognised in no time."""
    from stic_ray.stages import cluster

    for name, value in cluster.process_environment(config).items():
        os.environ.setdefault(name, value)  # before torch and its friends are imported
    from stic_ray.preparation import check_before_work, prepare, with_commit
    from stic_ray.toyworld.assets import make_toyworld

    with lease.held(run) as cut_off_at:
        for step in steps:
            history.end_attempt(run / step.name, history.KILLED, at=cut_off_at)
        prepared = list(zip(todo, prepare(todo, config, run), strict=True))
        _write_config(config, steps, run, facts)
        for step in todo:
            make_toyworld(step.stage.sources, step.configured(config), run)
        record_estimate(config, steps, run, [step.name for step in todo])
        # Where a cluster does the work, this machine need not have the model, nor what an engine needs.
        checked = check_before_work(prepared, engine_too=cluster.cluster_address() is None)
        needs = {step.name: step.stage.need(each.config) for step, each in prepared}
        with cluster.connected(config, needs):
            for step, each in prepared:
                if step.name in left_out_of(steps, run):
                    _log_left_out(step)
                    continue
                ready = prepare_step(step, config, run, each.config)  # which of several steps it reads, is known now
                if step.stage.loads_model(each.config):
                    model = digest(each.config.model.model_dump())
                    if model not in checked:
                        checked[model] = cluster.check_model(each.config)
                    ready = with_commit(ready, checked[model], run)
                _run_step(step, ready, config, run)


def _log_left_out(step: Step) -> None:
    logger.info("%s: left out, as %s found no gain", step.name, step.only_after)


def _run_step(step: Step, prepared: StepRun, config: RunConfig, run: RunDir) -> None:
    """Run one step as an attempt, and write its manifest."""
    from stic_ray.stages import processes

    logger.info("%s: started", step.name)
    output, need = prepared.output, step.stage.need(prepared.config)
    settings = {"config": identity(step, config), "inputs": input_hashes(step, run)}
    output.write_json(STARTED, settings)
    actors, workers = prepared.config.actors.num_actors, prepared.config.workers.num_workers
    history.begin_attempt(output, need, {"actors": actors, "workers": workers}.get(need.what, 1))
    try:
        with processes.released(), processes.watched(step.name, need, config.cluster.resource_timeout_s):
            accounts = step.stage.run(prepared)
    except BaseException as error:
        history.end_attempt(output, type_and_message(error))
        raise
    history.end_attempt(output, history.FINISHED, accounts.pop(ROWS_NOW, accounts["num_rows_in"]))
    attempts = history.read_attempts(output)
    took = history.totals(attempts)
    made = {
        "stage": step.stage.name,
        **asdict(took),
        **accounts,
        **settings,
        "config_hash": digest(settings["config"]),
        "made_with": {key: attempts[-1][key] for key in ("git_commit", "package_versions", "processes")},
    }
    if smaller := output.manifest:
        made[GROWN_FROM] = [*smaller.get(GROWN_FROM, []), digest(smaller)]
    output.write_manifest(made)
    (output.location / STARTED).delete()
    counts = ", ".join(f"{accounts[f'num_rows_{what}']} {what}" for what in ("written", "rejected", "failed"))
    logger.info("%s: done in %.1f s, %d rows in, %s", step.name, took.seconds, accounts["num_rows_in"], counts)


def _is_done(step: Step, config: RunConfig, run: RunDir) -> bool:
    """Whether the step is finished; raises RunError when it was made, or begun, from something else."""
    output = run / step.name
    manifest = output.manifest
    made = manifest or output.read_json(STARTED)
    if made is None:
        return False

    def refused(why: str) -> RunError:
        how = "finished" if manifest else "begun"
        way_out = f"delete '{output.uri}' and the stages behind it, or use another --run."
        return RunError(f"Stage {step.name} of '{run.uri}' was {how} {why} {way_out}")

    before, now = made["config"], identity(step, config)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        differences = "; ".join(f"{key} was {before.get(key)!r}, is now {now.get(key)!r}" for key in changed)
        raise refused(f"with other settings: {differences}. Set the old value,")
    before, now = made["inputs"], input_hashes(step, run)
    if {role: each["from"] for role, each in before.items()} != {role: each["from"] for role, each in now.items()}:
        sources = [" and ".join(sorted(i["from"] for i in inputs.values())) or "no other" for inputs in (before, now)]
        raise refused(f"from {sources[0]}, these settings make it from {sources[1]}:")
    changed = [role for role in now if now[role] != before[role]]
    # What an input was before it grew stands in its manifest.
    grown_from = {role: (step.place(role, run).manifest or {}).get(GROWN_FROM, []) for role in changed}
    goes_on = all(before[role]["manifest"] in grown_from[role] for role in changed)
    if not changed or (goes_on and (manifest or step.stage.grows)):
        # Training stays with the rows that it was made from.
        return manifest is not None and not (changed and step.stage.grows)
    raise refused(f"from another {now[changed[0]]['from']} than the one that is there now:")


def _that_grow(done: Collection[str], steps: Steps, config: RunConfig, run: RunDir) -> set[str]:
    """Return the steps that are done and go on, as their source has more now, with those that grow behind them."""
    from stic_ray.stages.pool import takes_in_more

    growing: set[str] = set()
    for step in steps:
        if step.stage.grows and growing & set(step.earlier_steps):
            growing.add(step.name)
        elif step.name in done and step.stage.grows and step.stage.sources:
            behind = [each for each in steps if step.name in with_inputs({each.name}, steps)]
            trained = [each for each in behind if each.stage.need(config).what == "workers"]
            has_trained = any((run / each.name).manifest or (run / each.name).read_json(STARTED) for each in trained)
            if takes_in_more(step.configured(config), run / step.name, has_trained=has_trained):
                growing.add(step.name)
    return growing


def _report_is_current(steps: Steps, run: RunDir) -> bool:
    """Whether the report was written after every manifest."""
    report = (run.location / "report.html").info()
    manifests = [((run / step.name).location / MANIFEST).info() for step in steps]
    return report.is_file and all(report.mtime_ns >= manifest.mtime_ns for manifest in manifests if manifest.is_file)


def _write_config(config: RunConfig, steps: Steps, run: RunDir, facts: dict[str, Any]) -> None:
    record = {
        **facts,
        **history.code_versions(),
        "steps": [step.record(config) for step in steps],
        "config": config.model_dump(mode="json"),
    }
    run.write_text(CONFIG, yaml.safe_dump(record, sort_keys=False))
