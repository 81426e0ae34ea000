"""The command of a scaling study: options, what is checked before any work, and the exit status."""

import argparse
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from stic_ray import cli
from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError, StageError
from stic_ray.core.rundir import RunDir
from stic_ray.plan import check_room, machines_for
from stic_ray.recipes import stic
from stic_ray.study.plan import Study, check_numbers, plan_study, read_variants
from stic_ray.study.processes import DONE
from stic_ray.study.record import Record, check_continues, read_record, write_record
from stic_ray.study.run import cell_is_done, outcome, run_study, source_is_done

logger = logging.getLogger(__name__)


def scaling_study(description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Run the pipeline over pool sizes, seeds and variants, as the command line says."""
    options = _parser(description).parse_args(arguments)
    base, _, address, facts = cli.read_config(options)
    home = RunDir.of(address)
    before = read_record(home)
    study = _planned(options, base, home, before)
    if options.dry_run:
        _print_plan(study, home)
        return
    write_record(home, study, base, facts, before)
    run_study(study, home, parallel=options.parallel)
    from stic_ray.study.report import write_study  # matplotlib is for the report only

    write_study(home)
    _tell(study, home)


def _parser(description: str | None) -> argparse.ArgumentParser:
    options = cli.parser(description)
    options.add_argument("--sizes", metavar="N,N", required=True, help="images in the pool, smallest first")
    options.add_argument("--seeds", metavar="S,S", default="0", help="each gives a pool and a training of its own")
    options.add_argument("--variants", metavar="FILE", help="YAML: name -> section.field -> value (docs/studies.md)")
    options.add_argument("--parallel", metavar="K", type=int, default=1, help="runs at the same time")
    return options


def _planned(options: argparse.Namespace, base: RunConfig, home: RunDir, before: Record | None) -> Study:
    """Return the study that the options ask for. Raises UserError for what cannot be."""
    if options.run is None:
        raise ConfigError("Give --run: the folder or URI of the study.")
    sizes, seeds = _numbers("--sizes", options.sizes), _numbers("--seeds", options.seeds)
    check_numbers(sizes, seeds)
    _check_parallel(options.parallel, base)
    variants = read_variants(Path(options.variants)) if options.variants else {"default": {}}
    if before:
        check_continues(before, base, sizes, variants, home.uri)
    return plan_study(base, home.uri, sizes, seeds, variants, before.pool_size if before else max(sizes))


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
        check_room(config, steps, [step.name for step in steps], machines_for(config), num_runs=parallel)
    elif parallel > 1 and (config.actors.num_gpus or config.workers.num_gpus):
        logger.warning("--parallel %d: each run starts a Ray of its own, and all of them use the same GPUs", parallel)


def _print_plan(study: Study, home: RunDir) -> None:
    print(f"study: {home.uri}, {len(study.sources)} sources of {study.pool_size} images, {len(study.cells)} cells")
    for source in study.sources:
        status, _ = outcome(home / source.folder, is_done=source_is_done(home / source.folder))
        print(f"source {source.name:<40} {status}")
    for cell in study.cells:
        status, _ = outcome(home / cell.folder, is_done=cell_is_done(home / cell.folder))
        print(f"cell   {cell.name:<40} {status:<14} from {cell.source}")


def _tell(study: Study, home: RunDir) -> None:
    """Say where the results are. Raises StageError naming the cells that are not done."""
    for what, name in {"report": "report.html", "table": "cells.parquet"}.items():
        print(f"{what + ':':<16} {home.uri}/{name}")
    statuses = {c.name: outcome(home / c.folder, is_done=cell_is_done(home / c.folder))[0] for c in study.cells}
    missing = [f"{name} ({status})" for name, status in statuses.items() if status != DONE]
    if missing:
        raise StageError(
            f"{len(missing)} of {len(statuses)} cells are not done: {', '.join(missing)}. Each has a log.txt in "
            f"'{home.uri}/cells'; the same command tries them again."
        )
