"""Stage `dpo`: regularised DPO on preference pairs (STIC Algorithm 1), from the model that it reads."""

import importlib.util
from typing import Any

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError, ModelError, SourceError
from stic_ray.core.placement import workers_need
from stic_ray.core.resources import accumulation_steps
from stic_ray.core.steps import CHECKPOINT, Stage, StepRun
from stic_ray.core.training import OptimisationConfig
from stic_ray.core.workload import Sizes, Work, pair_tokens, training_work


def _train(step: StepRun) -> dict[str, Any]:
    from stic_ray.stages.training import index, launch  # Ray Train and torch

    start = step.model() if step.config.dpo.reference == "start" else None
    return launch.train("dpo", step, index.index_pairs(step.config, step.inputs["pairs"].shards("pairs"), start))


def _check(step: StepRun) -> None:
    check_training(step.config, step.config.dpo)
    if step.config.dpo.reference == "base" and step.config.model.adapter:
        raise ConfigError(
            "dpo.reference=base is the model without any adapter, and the run begins with model.adapter; merge it into "
            "the model first, or leave dpo.reference=start."
        )
    pairs = step.inputs["pairs"]
    is_outside = pairs.location.folder.path != step.output.location.folder.path
    if is_outside and (pairs.manifest is None or not pairs.shards("pairs")):
        raise SourceError(
            f"dpo.pairs='{pairs.uri}' must hold pairs-*.parquet and the manifest.json of a finished stage; "
            "give the folder preferences of a run."
        )


def check_training(config: RunConfig, settings: OptimisationConfig) -> None:
    """Find what a training with these settings would refuse. Raises UserError."""
    if config.model.engine == "fake":
        raise ConfigError("model.engine=fake cannot be trained; use --stages pool,preferences with it.")
    accumulation_steps(settings.global_batch, config.workers)
    for name in config.workers.trackers:
        if name != "tensorboard" and importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"workers.trackers={name} needs the extra stic-ray[{name}], which is not installed here; workers on "
                "other machines need it, too."
            )
    if config.tuning.method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("tuning.method=qlora needs bitsandbytes: install the extra stic-ray[qlora].")
    if config.tuning.projector_learning_rate is not None:
        from stic_ray.engines.loading import make_skeleton, parts_of  # torch

        if not parts_of(make_skeleton(config.model))["projector"]:
            raise ConfigError(
                "tuning.projector_learning_rate is set, but no part of "
                f"model.path='{config.model.path}' is known as a projector."
            )


def _work(config: RunConfig, sizes: Sizes) -> Work | None:
    known = [number for number in (config.dpo.num_images, sizes.num_images) if number]
    num_pairs = config.dpo.num_pairs or min(known, default=None)
    if not num_pairs:
        return None
    answer = min(sizes.num_answer_tokens, config.preferences.max_new_tokens)
    if config.dpo.objective == "sft":  # the preferred answer alone
        tokens, has_reference = sizes.num_prompt_tokens + answer, False
    else:
        shared = config.workers.share_prefix and config.dpo.objective == "paper"
        tokens = pair_tokens(sizes.num_prompt_tokens, answer, shared_prefix=shared)
        has_reference = bool(config.dpo.image_terms) or not config.preferences.reference_logps
        tokens += _view_tokens(config, sizes, answer)
    return training_work(config, sizes, config.dpo, num_pairs, tokens, reference_pass=has_reference)


def _view_tokens(config: RunConfig, sizes: Sizes, answer: float) -> float:
    """Return the tokens of a pair's sequences with a rejected image, and without an image."""
    settings, prompt = config.dpo, sizes.num_prompt_tokens
    if settings.symmetric_weight:
        shared = config.workers.share_prefix
        views = (prompt, max(0.0, prompt - sizes.model.num_image_tokens))
        return sum(pair_tokens(each, answer, shared_prefix=shared) for each in views)
    if settings.conditional_weight:
        return prompt + answer
    return (prompt + answer) / 3 if settings.own_tokens_weight else 0.0  # a forward pass, and nothing goes back


DPO = Stage(
    name="dpo",
    run=_train,
    settings=("seed", "model", "tuning", "dpo"),
    need=workers_need,
    writes=f"{CHECKPOINT}/",
    section="dpo",
    reads=("pairs", "model"),
    check=_check,
    work=_work,
    amount="num_images",
)
