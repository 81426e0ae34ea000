"""Before the first stage: where the sources are, and the mistakes that can be found before anything is spent."""

import os
from collections.abc import Collection
from pathlib import Path

from stic_ray.core.config import TOYWORLD, RunConfig, accumulation_steps
from stic_ray.core.errors import ConfigError, RunError, SourceError
from stic_ray.core.rundir import RunDir
from stic_ray.core.storage import Location
from stic_ray.engines.opening import check_engine
from stic_ray.method.prompts import load_prompts
from stic_ray.stages.benchmarks import read_benchmarks
from stic_ray.stages.infusion import read_instructions
from stic_ray.toyworld.assets import write_assets


def resolve(config: RunConfig, run: RunDir) -> RunConfig:
    """Return the configuration as workers on any machine, in any working directory, can use it.

    `toyworld` becomes the places where its parts are made, a model directory and a folder of pairs an absolute path,
    and a file with a chat template its text. Raises ConfigError when that file cannot be read.
    """
    folder = f"{run.uri}/{TOYWORLD}"
    model, benchmarks = config.model, config.evaluation.benchmarks
    toy_benchmarks = tuple(f"{folder}/benchmarks/{name}.jsonl" for name in ("toy_choice", "toy_short"))
    model_path = f"{folder}/model" if model.path == TOYWORLD else os.path.expanduser(model.path)
    changes = {
        "dpo": {"pairs": RunDir.of(config.dpo.pairs).uri if config.dpo.pairs else None},
        "model": {
            "path": os.path.abspath(model_path) if os.path.isdir(model_path) else model_path,
            "chat_template": _text_of(model.chat_template),
        },
        "pool": {"source": f"{folder}/pictures" if config.pool.source == TOYWORLD else config.pool.source},
        "infusion": {
            "source": f"{folder}/instructions/instructions.json"
            if config.infusion.source == TOYWORLD
            else config.infusion.source
        },
        "evaluation": {"benchmarks": tuple(b for g in benchmarks for b in (toy_benchmarks if g == TOYWORLD else (g,)))},
    }
    sections = {name: getattr(config, name).model_copy(update=fields) for name, fields in changes.items()}
    return config.model_copy(update=sections)


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
    for name, stage in (("dpo", config.dpo), ("sft", config.sft)):
        if name in stages:
            accumulation_steps(stage.global_batch, config.workers)
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


def make_toyworld(stages: Collection[str], config: RunConfig, run: RunDir) -> None:
    """Make pictures, instruction data, benchmarks and model where a source of these stages says `toyworld`.

    Raises SourceError when the run directory is not local, where models could not be loaded from it.
    """
    sources = {
        "pool": (config.pool.source,),
        "infusion": (config.infusion.source,),
        "evaluation": config.evaluation.benchmarks,
    }
    models = () if set(stages) <= {"pool"} else (config.model.path,)
    if TOYWORLD not in (*models, *(source for stage in stages for source in sources.get(stage, ()))):
        return
    if not run.location.is_local:
        raise SourceError(
            f"The toy world needs a local --run, not '{run.uri}'; set model.path and the sources instead."
        )
    settings = {"seed": config.seed, **config.toyworld.model_dump()}
    place = run / TOYWORLD
    made = place.read_json("settings.json")
    if made not in (None, settings):
        raise RunError(f"'{place.uri}' was made with {made}, now it is {settings}: delete it, or use another --run.")
    write_assets(Path(place.uri), **settings)
    place.write_json("settings.json", settings)
