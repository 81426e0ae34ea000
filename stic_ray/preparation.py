"""Before the first stage: where the sources are, and the mistakes that can be found before anything is spent."""

import importlib.util
import os
from collections.abc import Collection
from pathlib import Path

from stic_ray.core.config import TOYWORLD, RunConfig, is_toy, sources_of
from stic_ray.core.errors import ConfigError, SourceError, nearest
from stic_ray.core.resources import accumulation_steps
from stic_ray.core.rundir import RunDir
from stic_ray.core.storage import Location
from stic_ray.engines.opening import check_engine
from stic_ray.method.prompts import load_prompts
from stic_ray.stages.benchmarks import read_benchmarks
from stic_ray.stages.infusion import read_instructions
from stic_ray.stages.training.tuning import check_tuning
from stic_ray.toyworld.assets import BENCHMARKS, write_benchmarks, write_instructions, write_pool
from stic_ray.toyworld.lessons import PROMPTS_FILE
from stic_ray.toyworld.model import WEIGHTS


def resolve(config: RunConfig, run: RunDir) -> RunConfig:
    """Return the configuration as workers on any machine, in any working directory, can use it.

    `toyworld` becomes the places of its parts, a model directory and a folder of pairs an absolute path, and a file
    with a chat template its text. Raises ConfigError when that file cannot be read.
    """
    toys, model = _toy_places(config, run), config.model
    model_path = str(WEIGHTS) if model.path == TOYWORLD else os.path.expanduser(model.path)
    changes = {
        "dpo": {"pairs": RunDir.of(config.dpo.pairs).uri if config.dpo.pairs else None},
        "model": {
            "path": os.path.abspath(model_path) if os.path.isdir(model_path) else model_path,
            "chat_template": _text_of(model.chat_template),
        },
        "pool": {"source": toys["pool"] if config.pool.source == TOYWORLD else config.pool.source},
        "infusion": {
            "source": f"{toys['infusion']}/instructions.json"
            if config.infusion.source == TOYWORLD
            else config.infusion.source
        },
        "evaluation": {
            "benchmarks": tuple(
                place for given in config.evaluation.benchmarks for place in _benchmarks(given, toys["evaluation"])
            )
        },
    }
    sections = {name: getattr(config, name).model_copy(update=fields) for name, fields in changes.items()}
    prompts = str(PROMPTS_FILE) if config.prompts is None and model.path == TOYWORLD else config.prompts
    return config.model_copy(update={**sections, "prompts": prompts})


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


def _toy_places(config: RunConfig, run: RunDir) -> dict[str, str]:
    """Return where the toy world's files for a stage are; the names say what they were made with."""
    toy, folder = config.toyworld, f"{run.uri}/{TOYWORLD}"
    return {
        "pool": f"{folder}/pictures-seed{config.seed}-{toy.num_pictures}",
        "infusion": f"{folder}/instructions-seed{config.seed}-{toy.num_instructions}",
        "evaluation": f"{folder}/benchmarks-{toy.split}-{toy.num_scenes}",
    }


def _text_of(template: str | None) -> str | None:
    """Return the text of a chat template that is given as text or as a file."""
    if template is None or "{" in template:
        return template
    try:
        return Path(template).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"model.chat_template='{template}' cannot be read: {error.strerror}.") from error


def check_before_work(stages: Collection[str], config: RunConfig) -> None:
    """Find the user's mistakes before minutes or GPUs are spent on earlier stages. Raises UserError."""
    load_prompts(config.prompts)
    if config.model.engine == "fake" and {"dpo", "sft"} & set(stages):
        raise ConfigError("model.engine=fake cannot be trained; use --stages pool,preferences with it.")
    if config.preferences.reference_logps and config.model.engine != "transformers" and "preferences" in stages:
        raise ConfigError(
            f"preferences.reference_logps=true needs model.engine=transformers, which scores answers; "
            f"model.engine={config.model.engine} does not."
        )
    for name, stage in (("dpo", config.dpo), ("sft", config.sft)):
        if name in stages:
            accumulation_steps(stage.global_batch, config.workers)
            _check_trackers(config.workers.trackers)
            check_tuning(config.model, config.tuning)
    if "pool" in stages and not Location.of(config.pool.source).exists():
        raise SourceError(f"pool.source='{config.pool.source}' does not exist.")
    if "dpo" in stages and config.dpo.pairs:
        pairs = RunDir.of(config.dpo.pairs)
        if pairs.manifest is None or not pairs.shards("pairs"):
            raise SourceError(
                f"dpo.pairs='{config.dpo.pairs}' must hold pairs-*.parquet and the manifest.json of a finished stage; "
                "give the folder preferences of a run."
            )
    if "infusion" in stages:
        read_instructions(config.infusion)
    if "evaluation" in stages:
        read_benchmarks(config.evaluation.benchmarks)
    if not set(stages) <= {"pool"}:
        check_engine(config.model)


def _check_trackers(trackers: Collection[str]) -> None:
    for name in trackers:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"workers.trackers={name} needs the extra stic-ray[{name}], which is not installed here; workers on "
                "other machines need it, too."
            )


def make_toyworld(stages: Collection[str], config: RunConfig, run: RunDir) -> None:
    """Make the pictures, instruction data and benchmarks that these stages take from the toy world.

    Raises SourceError when they would have to be made in a run directory that is not local.
    """
    toy, places = config.toyworld, {stage: Path(place) for stage, place in _toy_places(config, run).items()}
    makers = {
        "pool": lambda place: write_pool(
            place, seed=config.seed, num_pictures=toy.num_pictures, num_processes=os.cpu_count() or 1
        ),
        "infusion": lambda place: write_instructions(place, seed=config.seed, num_rows=toy.num_instructions),
        "evaluation": lambda place: write_benchmarks(place, num_scenes=toy.num_scenes, split=toy.split),
    }
    for stage, make in makers.items():
        if stage not in stages or not any(map(is_toy, sources_of(stage, config))):
            continue
        if not run.location.is_local:
            raise SourceError(
                f"The toy world's files need a local --run, not '{run.uri}'; set the sources of the stages instead."
            )
        make(places[stage])
