"""The command line that all jobs share: options, logging, exit status."""

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml

from stic_ray.core.config import RunConfig, is_toy
from stic_ray.core.console import configure
from stic_ray.core.errors import ConfigError, SourceError, SticError, one_line
from stic_ray.core.overrides import RECIPE, apply_overrides, load_config, read_mapping
from stic_ray.core.placement import check_fits, format_unplaced, unplaced
from stic_ray.core.rundir import RunDir
from stic_ray.core.steps import Recipe, Step, Steps, check_given, left_out_of, needs_of
from stic_ray.estimate.steps import estimate_run, table
from stic_ray.pipeline import names_of, run_evaluation_alone, run_pipeline
from stic_ray.recipes import RECIPES, recipe, stic
from stic_ray.report.scores import in_words
from stic_ray.stages.evaluation import EVALUATION
from stic_ray.status import machines_for, plan, run_status


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line and exit status 1, like every other mistake of the user's."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see --help)")


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that every job has."""
    found = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--recipe", help=f"named run: {', '.join(RECIPES)} (default: demo, on its own model)")
    found.add_argument(
        "--config", metavar="FILE", help="YAML run configuration, instead of a recipe or (its key recipe) on one"
    )
    found.add_argument("--run", metavar="URI", help="run directory, local or s3://, gs:// (default: runs/<name>)")
    found.add_argument(
        "--set", metavar="SECTION.FIELD=VALUE", action="append", default=[], dest="overrides", help="repeatable"
    )
    found.add_argument("--dry-run", action="store_true", help="print configuration, plan and estimate, touch nothing")
    return found


def read_config(
    options: argparse.Namespace, own: Recipe | None = None
) -> tuple[RunConfig, Recipe, str, dict[str, Any]]:
    """Return configuration, recipe, address of the run, and what config.yaml records of the command.

    `own` is a recipe of the job's; with --config its steps stay.

    Raises ConfigError, also where a model of the user's own would be run with the toy world's settings.
    """
    if options.recipe and options.config:
        raise ConfigError("Give --recipe or --config, not both.")
    named = own if own and not options.recipe else recipe(options.recipe or "demo")
    chosen = _from_file(Path(options.config), own) if options.config else named
    config = apply_overrides(chosen.config, options.overrides)
    is_demo = not (own or options.recipe or options.config)
    if is_demo and not is_toy(config.model.path) and config.model.engine != "fake":
        raise ConfigError(
            f"model.path='{config.model.path}' is not the demo's model, and the demo's settings (learning rates, 64 "
            "tokens an answer) suit no other: add --recipe any_model, or another of "
            f"{', '.join(RECIPES)}, or give a --config FILE."
        )
    name = options.config or options.recipe or chosen.config.name
    facts = {"recipe": name, "overrides": list(options.overrides)}
    return config, chosen, options.run or f"runs/{config.name}", facts


def _from_file(path: Path, own: Recipe | None) -> Recipe:
    """Return what a configuration file says: on the recipe that it names, or by itself with STIC's steps or `own`'s."""
    name = read_mapping(path).get(RECIPE)
    base = recipe(str(name)) if name is not None else None
    steps = own.steps if own else base.steps if base else stic
    return Recipe(load_config(path, base.config if base else None), steps)


def full_pipeline(description: str | None, arguments: Sequence[str] | None = None, own: Recipe | None = None) -> None:
    """Run the pipeline as the command line says, by default the steps of a job's `own` recipe."""
    options_of = parser(description)
    options_of.add_argument(
        "--stages", metavar="A,B", help="only these steps of the recipe, and report (default: all that the scores need)"
    )
    options = options_of.parse_args(arguments)
    config, chosen, address, facts = read_config(options, own)
    steps = chosen.steps(config)
    named = names_of(steps) if options.stages is None else options.stages.split(",")
    names = [name.strip() for name in named if name.strip()]
    if options.dry_run:
        print_plan(config, steps, address, names)
        return
    check_given(config, steps, names)
    run = RunDir.of(address)
    run_pipeline(config, steps, run, names, facts)
    print_results(run, steps)


def evaluate(description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Score one model, and a checkpoint trained from it, as the command line says."""
    options_of = parser(description)
    options_of.add_argument("--model", metavar="PATH", help="directory or hub id; the same as --set model.path=PATH")
    options_of.add_argument("--checkpoint", metavar="URI", help="adapter or model that was trained from it")
    options_of.add_argument("--benchmark", metavar="FILE", action="append", help="JSONL or Parquet; repeatable")
    options = options_of.parse_args(arguments)
    if options.model:
        options.overrides.append(f"model.path={options.model}")
    if options.benchmark:
        options.overrides.append(f"evaluation.benchmarks={json.dumps(options.benchmark)}")
    config, _, address, facts = read_config(options)
    step = Step(EVALUATION)
    if options.dry_run:
        print_plan(config, [step], address, [step.name])
        return
    check_given(config, [step], [step.name])
    run = RunDir.of(address)
    run_evaluation_alone(config, step, run, options.checkpoint, facts)
    for row in (run / step.name).read_json(step.stage.writes):
        known = row["low"] is not None  # one question has no spread
        interval = f"[{row['low']:.3f}, {row['high']:.3f}]" if known else "[interval not known]"
        print(
            f"{row['benchmark']:<20} {row['metric']:<18} {row['model']:<12} {row['mode']:<22} "
            f"{row['score']:.3f} {interval} of {row['num_questions']} questions"
        )


def status(description: str | None, arguments: Sequence[str] | None = None) -> None:
    """Print how far a run is."""
    options_of = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options_of.add_argument("--run", metavar="URI", required=True, help="run directory, local or s3://, gs://")
    print(*run_status(RunDir.of(options_of.parse_args(arguments).run)), sep="\n")


def print_plan(config: RunConfig, steps: Steps, address: str, names: Sequence[str]) -> None:
    """Print configuration, plan and estimate. A run that cannot be reached is planned as a new one, with a note.

    Raises ConfigError, behind the plan, when a step can never run on the machines that the run would find.
    """
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    try:
        run, note = RunDir.of(address), ""
    except SourceError as error:
        run, note = None, f" (what is done is not known: {error})"
    print(f"run: {run.uri if run else address}{note}", *plan(config, steps, run, names), sep="\n")
    machines = machines_for(config)
    print(machines)
    unwanted = left_out_of(steps, run) if run else set()
    names = [name for name in names if name not in unwanted]
    needs = needs_of(config, steps, names)
    if machines.may_grow and (missing := unplaced(needs, machines)):
        print(f"to be started first: {format_unplaced(missing, machines)}")
    print("", *table(estimate_run(config, steps, run, names), config), sep="\n")
    check_fits(needs, machines)


def print_results(run: RunDir, steps: Steps) -> None:
    """Say what training changed and where a run's results are, as far as they are there."""
    evaluations = [run / step.name for step in steps if step.stage is EVALUATION]
    lines = in_words([row for each in evaluations for row in each.read_json(EVALUATION.writes) or []])
    if lines:
        print(*lines, sep="\n")
    places = {"report": "report.html"}
    for step in steps:
        left = f"{step.name}/{step.stage.writes}"
        places[f"left by {step.name}"] = left.rstrip("/") if "*" not in left else step.name
    for what, name in places.items():
        location = run.location / name
        if location.exists():
            print(f"{what + ':':<20} {location.uri}")


def main(job: Callable[[str | None], None], description: str | None) -> NoReturn:
    """Run a job and exit: 0 when all that was asked for is there, 1 with one line for a mistake of the user's.

    Ctrl-C ends it with 130 and SIGTERM with 143, as shells have it, after what it started was ended.
    """
    received = signal.SIGINT

    def terminate(number: int, frame: object) -> NoReturn:
        nonlocal received
        received = signal.Signals(number)
        signal.signal(number, signal.SIG_IGN)  # once is enough: a second one would cut the clean end short
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    configure()
    try:
        job(description)
    except SticError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # a full or read-only disk, a path without permission
        print(f"error: {one_line(error)}. What was finished stays; mend this and rerun.", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(128 + received)
    sys.exit(0)
