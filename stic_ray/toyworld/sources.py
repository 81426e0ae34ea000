"""The toy world as a source: what a field of the configuration that says `toyworld` stands for, and making it."""

import os
from collections.abc import Callable, Collection
from pathlib import Path

from stic_ray.core.config import TOYWORLD, RunConfig, is_toy
from stic_ray.core.errors import ConfigError, SourceError, nearest
from stic_ray.core.overrides import apply_values
from stic_ray.core.rundir import RunDir
from stic_ray.toyworld.assets import BENCHMARKS, write_benchmarks, write_instructions, write_pool
from stic_ray.toyworld.model import PROMPTS_FILE, WEIGHTS


def resolve_toyworld(config: RunConfig, run: RunDir) -> RunConfig:
    """Return the configuration with the places of the toy world's files instead of its name.

    Raises ConfigError for a benchmark that the toy world does not have.
    """
    places, changes = _places(config, run), {}
    if config.model.path == TOYWORLD:
        changes["model.path"] = str(WEIGHTS)
        changes["prompts"] = config.prompts or str(PROMPTS_FILE)
    if is_toy(config.pool.source):
        changes["pool.source"] = places["pool.source"]
    if is_toy(config.infusion.source):
        changes["infusion.source"] = f"{places['infusion.source']}/instructions.json"
    folder = places["evaluation.benchmarks"]
    changes["evaluation.benchmarks"] = [
        file for given in config.evaluation.benchmarks for file in _benchmarks(given, folder)
    ]
    return apply_values(config, changes)


def make_toyworld(fields: Collection[str], config: RunConfig, run: RunDir) -> None:
    """Make what these fields of the configuration take from the toy world: pictures, instruction data, benchmarks.

    Raises SourceError when it would have to be made in a run directory that is not local.
    """
    toy = config.toyworld
    makers: dict[str, Callable[[Path], None]] = {
        "pool.source": lambda place: write_pool(
            place, seed=config.seed, num_pictures=toy.num_pictures, num_processes=os.cpu_count() or 1
        ),
        "infusion.source": lambda place: write_instructions(place, seed=config.seed, num_rows=toy.num_instructions),
        "evaluation.benchmarks": lambda place: write_benchmarks(place, num_scenes=toy.num_scenes, split=toy.split),
    }
    for field, place in _places(config, run).items():
        if field not in fields or not any(map(is_toy, config.sources(field))):
            continue
        if not run.location.is_local:
            raise SourceError(f"The toy world's files need a local --run, not '{run.uri}'; set {field} instead.")
        makers[field](Path(place))


def _places(config: RunConfig, run: RunDir) -> dict[str, str]:
    """Return where the toy world's files of a field are; the names say what they were made with."""
    toy, folder = config.toyworld, f"{run.uri}/{TOYWORLD}"
    return {
        "pool.source": f"{folder}/pictures-seed{config.seed}-{toy.num_pictures}",
        "infusion.source": f"{folder}/instructions-seed{config.seed}-{toy.num_instructions}",
        "evaluation.benchmarks": f"{folder}/benchmarks-{toy.split}-{toy.num_scenes}",
    }


def _benchmarks(given: str, folder: str) -> list[str]:
    """Return the files that a benchmark of the configuration stands for."""
    if not is_toy(given):
        return [given]
    name = given.partition(":")[2]
    if name and name not in BENCHMARKS:
        raise ConfigError(
            f"evaluation.benchmarks: no '{given}'.{nearest(name, BENCHMARKS)} Valid: {', '.join(BENCHMARKS)}."
        )
    return [f"{folder}/{each}.jsonl" for each in BENCHMARKS if name in ("", each)]
