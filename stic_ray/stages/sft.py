"""Stage `sft`: likelihood fine-tuning on conversations, from the model that it reads: in STIC on the infused rows
(Algorithm 2), else on those of one source or several."""

from dataclasses import replace
from typing import Any

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError, nearest
from stic_ray.core.rundir import RunDir
from stic_ray.core.steps import StepRun
from stic_ray.core.workload import SHORT_ANSWER_TOKENS, Sizes, Work, training_work
from stic_ray.stages.dpo import DPO, check_training


def _train(step: StepRun) -> dict[str, Any]:
    from stic_ray.stages.training import index, launch, mixing  # Ray Train and torch

    shards = {name: [*rows.shards("rows"), *rows.shards("text")] for name, rows in sources_of(step).items()}
    return launch.train("sft", step, mixing.plan(step.config, index.index_conversations(step.config, shards)))


def sources_of(step: StepRun) -> dict[str, RunDir]:
    """Return the folders with rows by the names of the sources: NAME of "rows:NAME", of "rows" that of its folder.

    Raises ConfigError for two of one name.
    """
    found: dict[str, RunDir] = {}
    for role, place in step.inputs.items():
        kind, _, name = role.partition(":")
        if kind != "rows":
            continue
        name = name or place.location.name
        if name in found:
            raise ConfigError(f"Step '{step.name}' has two sources '{name}': give one the role rows:NAME.")
        found[name] = place
    return found


def _check(step: StepRun) -> None:
    settings, sources = step.config.sft, sources_of(step)
    check_training(step.config, settings)
    mixed = dict(settings.mix)
    valid = f"Sources of step '{step.name}': {', '.join(sources)}."
    if mixed and len(sources) == 1:
        raise ConfigError(f"sft.mix needs several sources. {valid}")
    for name in mixed:
        if name not in sources:
            raise ConfigError(f"sft.mix names '{name}', which is no source.{nearest(name, sources)} {valid}")
    if mixed and (left_out := [name for name in sources if name not in mixed]):
        raise ConfigError(f"sft.mix says nothing of '{left_out[0]}'; give it a weight, or leave out the input. {valid}")


def _work(config: RunConfig, sizes: Sizes) -> Work | None:
    described = min(sizes.num_answer_tokens, config.infusion.max_new_tokens) if config.infusion.describe else 0
    return _work_of(config, sizes, sizes.num_instructions, described + SHORT_ANSWER_TOKENS)


def _work_on_images(config: RunConfig, sizes: Sizes) -> Work | None:
    num_rows = sizes.num_images
    if config.sft.mix and num_rows:  # with instruction data beside
        num_rows = num_rows + sizes.num_instructions if sizes.num_instructions else None
    return _work_of(config, sizes, num_rows, sizes.num_answer_tokens)


def _work_of(config: RunConfig, sizes: Sizes, num_rows: float | None, num_answer_tokens: float) -> Work | None:
    settings = config.sft
    if not num_rows and settings.num_steps is None and settings.num_tokens is None:
        return None
    tokens = sizes.num_prompt_tokens + num_answer_tokens
    if settings.image == "none":
        tokens -= min(sizes.model.num_image_tokens, sizes.num_prompt_tokens)
    work = training_work(config, sizes, settings, num_rows or 0, tokens, reference_pass=False)
    return replace(work, num_rows=settings.num_tokens / tokens) if settings.num_tokens else work


SFT = replace(
    DPO,
    name="sft",
    run=_train,
    settings=("seed", "model", "tuning", "sft"),
    section="sft",
    reads=("rows", "model"),
    check=_check,
    work=_work,
    amount="num_instructions",
)
SFT_ON_IMAGES = replace(SFT, work=_work_on_images, amount="num_images")
"""The same on rows that were made of the pool, one an image."""
