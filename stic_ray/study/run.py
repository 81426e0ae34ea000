"""The command of a scaling study: sources first, then cells, a few at a time; what is done is skipped."""

import argparse
import logging
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from stic_ray import cli
from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError, StageError
from stic_ray.core.placement import check_fits
from stic_ray.core.rundir import RunDir
from stic_ray.core.steps import BASE, needs_of
from stic_ray.recipes import stic
from stic_ray.report.formats import duration
from stic_ray.status import machines_for
from stic_ray.study.plan import SCORING, SOURCE_STEPS, Run, Study, plan_study, read_record, read_variants, write_record
from stic_ray.study.processes import DONE, FAILED, NOT_RUN, PIPELINE, Children, Outcome, outcome_of

logger = logging.getLogger(__name__)

SETTINGS = "settings.yaml"
"""The configuration that a run is given."""
LOG = "log.txt"
OUTCOME = "outcome.json"
"""How the last attempt at a run ended."""


def scaling_study(description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Run the pipeline over pool sizes, seeds and variants, as the command line says."""
    options_of = cli.parser(description)
    options_of.add_argument("--sizes", metavar="N,N", required=True, help="images in the pool, smallest first")
    options_of.add_argument("--seeds", metavar="S,S", default="0", help="each gives a pool and a training of its own")
    options_of.add_argument("--variants", metavar="FILE", help="YAML: name -> section.field -> value (docs/studies.md)")
    options_of.add_argument("--parallel", metavar="K", type=int, default=1, help="runs at the same time")
    options = options_of.parse_args(arguments)
    base, _, address, facts = cli.read_config(options)
    home = RunDir.of(address)
    before = read_record(home)
    study = _planned(options, base, home, before)
    if options.dry_run:
        _print_plan(study, home)
        return
    write_record(home, study, facts, before)
    run_study(study, home, parallel=options.parallel)
    from stic_ray.study.report import write_study  # matplotlib is for the report only

    write_study(home)
    for what, name in {"report": "report.html", "table": "cells.parquet"}.items():
        print(f"{what + ':':<16} {home.uri}/{name}")
    missing = [f"{cell.name} ({outcome(cell, home)[0]})" for cell in study.cells if not is_done(cell, home)]
    if missing:
        raise StageError(
            f"{len(missing)} of {len(study.cells)} cells are not done: {', '.join(missing)}. Each has a log.txt in "
            f"'{home.uri}/cells'; the same command tries them again."
        )


def _planned(options: argparse.Namespace, base: RunConfig, home: RunDir, before: Study | None) -> Study:
    """Return the study that the options ask for. Raises UserError for what cannot be."""
    if options.run is None:
        raise ConfigError("Give --run: the folder or URI of the study.")
    sizes, seeds = _numbers("--sizes", options.sizes), _numbers("--seeds", options.seeds)
    if not sizes or sizes[0] < 1 or list(sizes) != sorted(set(sizes)):
        raise ConfigError(
            f"--sizes {options.sizes} must be positive, each once, smallest first, such as 250,1000,4000."
        )
    if not seeds or min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds {options.seeds} must be whole numbers from 0 on, each once, such as 0,1,2.")
    _check_parallel(options.parallel, base)
    variants = read_variants(Path(options.variants)) if options.variants else {"default": {}}
    return plan_study(base, home.uri, sizes, seeds, variants, before)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ConfigError(f"{option} {text} must be whole numbers with commas between them.") from None


def _check_parallel(parallel: int, config: RunConfig) -> None:
    if parallel < 1:
        raise ConfigError(f"--parallel {parallel} must be 1 or more.")
    if parallel > 1 and os.environ.get("RAY_ADDRESS"):
        # With less, runs would wait for each other's processes, or leave no CPU for anybody's tasks.
        steps = stic(config)
        check_fits(needs_of(config, steps, [step.name for step in steps]), machines_for(config), num_runs=parallel)
    elif parallel > 1 and (config.actors.num_gpus or config.workers.num_gpus):
        logger.warning("--parallel %d: each run starts a Ray of its own, and all of them use the same GPUs", parallel)


def _print_plan(study: Study, home: RunDir) -> None:
    print(f"study: {home.uri}, {len(study.sources)} sources of {study.pool_size} images, {len(study.cells)} cells")
    for source in study.sources:
        print(f"source {source.name:<40} {outcome(source, home)[0]}")
    for cell in study.cells:
        print(f"cell   {cell.name:<40} {outcome(cell, home)[0]:<14} from {cell.source}")


def run_study(
    study: Study, home: RunDir, *, parallel: int = 1, entry: Sequence[str] = PIPELINE, children: Children | None = None
) -> None:
    """Make all runs that are not done. A run that fails leaves an outcome.json; only a stop of the study raises."""
    children = children or Children()
    for runs in (study.sources, study.cells):
        to_make = [run for run in runs if not is_done(run, home)]
        if runs is study.cells and len(to_make) < len(runs):
            logger.info("%d of %d cells are already done, skipped", len(runs) - len(to_make), len(runs))
        ended: dict[Run, Outcome] = {}
        with ThreadPoolExecutor(parallel) as pool:
            futures = {pool.submit(_make, run, study.configs[run], home, entry, children): run for run in to_make}
            try:
                for future in as_completed(futures):
                    run, result = futures[future], future.result()
                    ended[run] = result
                    progress = "" if run.is_source else f"; {_progress(ended, to_make, len(runs), parallel)}"
                    error = f": {result.error}" if result.error else ""
                    logger.info("%s: %s after %s%s%s", run, result.status, duration(result.seconds), progress, error)
            except BaseException:  # Ctrl-C too: leaving the pool waits for every run, which would go on for hours
                pool.shutdown(wait=False, cancel_futures=True)
                children.stop()
                raise


def is_done(run: Run, home: RunDir) -> bool:
    """Whether a source's pairs and the base model's scores are there, or a cell's scores and report."""
    folder = home / run.folder
    if run.is_source:
        return all((folder / step).manifest is not None for step in SOURCE_STEPS)
    return (folder / SCORING).manifest is not None and (folder.location / "report.html").exists()


def outcome(run: Run, home: RunDir) -> tuple[str, str | None]:
    """Return status and error of a run, as it is now or as its last attempt ended."""
    if is_done(run, home):
        return DONE, None
    last: dict[str, Any] = (home / run.folder).read_json(OUTCOME) or {}
    if not last or last["status"] == DONE:  # done once, and something was deleted since
        return NOT_RUN, None
    return last["status"], last["error"]


def _progress(ended: Mapping[Run, Outcome], to_make: Sequence[Run], total: int, parallel: int) -> str:
    """Return how many cells have ended, and how long the others may take where that is known."""
    waiting = [run for run in to_make if run not in ended]
    seconds: dict[int, list[float]] = {}
    for run, result in ended.items():
        if result.status == DONE:
            seconds.setdefault(run.size, []).append(result.seconds)
    means = {size: fmean(seconds[size]) for size in sorted(seconds)}
    text = f"{total - len(waiting)} of {total} ended"
    if not waiting or not means or (len(means) < 2 and any(run.size not in means for run in waiting)):
        return text
    return f"{text}, about {duration(sum(_expected_s(run.size, means) for run in waiting) / parallel)} left"


def _expected_s(size: int, means: Mapping[int, float]) -> float:
    """Return the mean time of a size; of another size, the line through the two largest whose time is known."""
    if size in means:
        return means[size]
    (first, first_s), (second, second_s) = list(means.items())[-2:]
    return max(second_s, first_s + (size - first) * (second_s - first_s) / (second - first))


def _make(run: Run, config: RunConfig, home: RunDir, entry: Sequence[str], children: Children) -> Outcome:
    """Run the pipeline in a process of its own, and keep its log and its outcome."""
    folder = home / run.folder
    if missing := "" if run.is_source else _missing(run, home):
        result = Outcome(FAILED, missing, 0.0)
        folder.write_json(OUTCOME, asdict(result))
        return result
    logger.info("%s: started", run)
    folder.write_text(SETTINGS, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    kept_log = folder.location / LOG
    command = [*entry, "--config", str((folder.location / SETTINGS).local_copy()), "--run", folder.uri]
    command += ["--stages", ",".join(SOURCE_STEPS)] if run.is_source else []
    with tempfile.TemporaryDirectory(prefix="stic_ray_") as temporary:
        log = Path(kept_log.path if kept_log.is_local else f"{temporary}/{LOG}")
        began_s = time.monotonic()
        try:
            returncode = children.run(command, log)
        finally:
            if not kept_log.is_local and log.exists():
                kept_log.write(log.read_bytes())
        result = outcome_of(returncode, log, round(time.monotonic() - began_s, 3))
    if result.status == DONE and not is_done(run, home):
        result = Outcome(FAILED, "ended without an error, and without all of its results", result.seconds)
    folder.write_json(OUTCOME, {**asdict(result), "returncode": returncode})
    return result


def _missing(cell: Run, home: RunDir) -> str:
    """Return what a cell needs and its source does not have, "" for nothing."""
    source = Run(BASE, 0, cell.seed, cell.source)
    if not is_done(source, home):
        return f"its source {cell.source} is not done: {outcome(source, home)[1]}"
    num_images = ((home / source.folder / SOURCE_STEPS[0]).manifest or {}).get("num_rows_written", 0)
    if num_images < cell.size:
        return f"the pool has {num_images} images, fewer than {cell.size}; give sizes up to {num_images}"
    return ""
