"""How much a stage has to do, before anything is said of speed: rows, tokens, operations, bytes that it leaves."""

from dataclasses import dataclass, replace

from stic_ray.core.config import OptimisationConfig, RunConfig, is_toy
from stic_ray.estimate.costs import BYTES_PER_TEXT_TOKEN, ModelSize, pair_tokens, training_flops
from stic_ray.estimate.model_size import model_size
from stic_ray.estimate.rates import Measured
from stic_ray.toyworld.assets import BENCHMARKS

_SHORT_ANSWER_TOKENS = 16
"""Answer to a question of a benchmark or of instruction data."""
_TOY_IMAGE_BYTES = 1_300
_INDEX_BYTES, _PREDICTION_BYTES = 120, 400
"""Of a row."""
_LORA_SHARE_PER_RANK = 335.5e6 / 128 / 7.25e9
"""Adapter parameters per parameter and rank: all linear layers of Mistral-7B's language model."""


@dataclass(frozen=True)
class Work:
    """What a stage does, before anything is said of speed."""

    num_rows: float
    """Images, instruction rows, or questions times models; trained on as often as there are epochs."""
    requests: tuple[tuple[float, float, float], ...] = ()
    """For a row: how many, and of each the tokens that are read and written."""
    row_tokens: float = 0.0
    row_flops: float = 0.0
    """Training only."""
    storage_bytes: float = 0.0


@dataclass(frozen=True)
class Sizes:
    """What is known of the run's parts."""

    model: ModelSize
    num_images: float | None
    num_instructions: float | None
    num_questions: float | None
    num_prompt_tokens: float
    """Image and text."""
    num_answer_tokens: float
    image_bytes: float


def sizes_of(config: RunConfig, own: Measured, pilot: Measured) -> Sizes | None:
    """Return the sizes, or None when nothing says how large the model is."""
    model, given = model_size(config), config.estimate
    if model is None:
        return None
    image_tokens = given.num_image_tokens or own.num_image_tokens or pilot.num_image_tokens or model.num_image_tokens
    return Sizes(
        replace(model, num_image_tokens=round(image_tokens)),
        _num_images(config, own),
        _num_instructions(config, own),
        _num_toy_questions(config) or given.num_questions,
        image_tokens + given.num_prompt_tokens,
        own.num_answer_tokens or pilot.num_answer_tokens or given.num_answer_tokens,
        own.image_bytes or pilot.image_bytes or (_TOY_IMAGE_BYTES if is_toy(config.pool.source) else given.image_bytes),
    )


def _num_images(config: RunConfig, own: Measured) -> float | None:
    there = own.manifests.get("pool", {}).get("num_rows_written")
    there = there or (config.toyworld.num_pictures if is_toy(config.pool.source) else config.estimate.num_images)
    asked = config.preferences.num_images
    return min(there, asked) if there and asked else there or asked


def _num_instructions(config: RunConfig, own: Measured) -> float | None:
    toys = config.toyworld.num_instructions if is_toy(config.infusion.source) else None
    there = own.manifests.get("infusion", {}).get("num_rows_in")
    return config.infusion.num_rows or there or toys or config.estimate.num_instructions


def _num_toy_questions(config: RunConfig) -> int | None:
    """Return the questions of the toy world's benchmarks, or None where there are others."""
    names = config.evaluation.benchmarks
    if not all(map(is_toy, names)):
        return None
    return sum(1 if ":" in name else len(BENCHMARKS) for name in names) * config.toyworld.num_scenes


def work_of(stage: str, config: RunConfig, sizes: Sizes) -> Work | None:
    """Return what a stage has to do, or None when nobody said how much there is."""
    makers = {
        "pool": _pool_work,
        "preferences": _preferences_work,
        "dpo": _dpo_work,
        "infusion": _infusion_work,
        "sft": _sft_work,
        "evaluation": _evaluation_work,
    }
    return makers[stage](config, sizes)


def _pool_work(config: RunConfig, sizes: Sizes) -> Work | None:
    if not sizes.num_images:
        return None
    copied = sizes.image_bytes if config.pool.copy_compressed else 0
    return Work(sizes.num_images, storage_bytes=sizes.num_images * (_INDEX_BYTES + copied))


def _preferences_work(config: RunConfig, sizes: Sizes) -> Work | None:
    if not sizes.num_images:
        return None
    reads, writes = 2 * sizes.num_prompt_tokens, min(sizes.num_answer_tokens, config.preferences.max_new_tokens)
    if config.model.engine == "vllm":  # the image of both clean requests is computed once
        reads -= config.preferences.hallucination_share * sizes.model.num_image_tokens
    if config.preferences.reference_logps:
        reads += pair_tokens(sizes.num_prompt_tokens, writes, shared_prefix=True)
    stored = sizes.image_bytes + BYTES_PER_TEXT_TOKEN * 2 * writes
    return Work(sizes.num_images, ((2, reads / 2, writes),), storage_bytes=sizes.num_images * stored)


def _infusion_work(config: RunConfig, sizes: Sizes) -> Work | None:
    if not sizes.num_instructions:
        return None
    writes = min(sizes.num_answer_tokens, config.infusion.max_new_tokens)
    requests = ((1, sizes.num_prompt_tokens, writes),) if config.infusion.describe else ()
    stored = sizes.image_bytes + BYTES_PER_TEXT_TOKEN * 2 * writes
    return Work(sizes.num_instructions, requests, storage_bytes=sizes.num_instructions * stored)


def _evaluation_work(config: RunConfig, sizes: Sizes) -> Work | None:
    if not sizes.num_questions:
        return None
    asked, evaluation = sizes.num_prompt_tokens, config.evaluation
    short = min(_SHORT_ANSWER_TOKENS, evaluation.max_answer_tokens)
    described = min(sizes.num_answer_tokens, evaluation.max_description_tokens)
    requests = ((1, asked, short),) if "direct" in evaluation.modes else ()
    if "describe_and_respond" in evaluation.modes:
        requests += ((1, asked, described), (1, asked + described, short))
    rows = sizes.num_questions * len(evaluation.models)
    return Work(rows, requests, storage_bytes=rows * len(evaluation.modes) * _PREDICTION_BYTES)


def _dpo_work(config: RunConfig, sizes: Sizes) -> Work | None:
    num_pairs = config.dpo.num_images or sizes.num_images
    if not num_pairs:
        return None
    answer = min(sizes.num_answer_tokens, config.preferences.max_new_tokens)
    preferred_only = config.dpo.objective == "sft"
    shared = config.workers.share_prefix and config.dpo.objective == "paper"
    tokens = pair_tokens(sizes.num_prompt_tokens, answer, shared_prefix=shared)
    if preferred_only:
        tokens = sizes.num_prompt_tokens + answer
    reference = not preferred_only and not config.preferences.reference_logps
    return _training_work(config, sizes, config.dpo, num_pairs, tokens, reference_pass=reference)


def _sft_work(config: RunConfig, sizes: Sizes) -> Work | None:
    if not sizes.num_instructions:
        return None
    described = min(sizes.num_answer_tokens, config.infusion.max_new_tokens) if config.infusion.describe else 0
    tokens = sizes.num_prompt_tokens + described + _SHORT_ANSWER_TOKENS
    return _training_work(config, sizes, config.sft, sizes.num_instructions, tokens, reference_pass=False)


def _training_work(
    config: RunConfig,
    sizes: Sizes,
    stage: OptimisationConfig,
    num_rows: float,
    row_tokens: float,
    *,
    reference_pass: bool,
) -> Work:
    full, num_parameters = config.tuning.method == "full", sizes.model.num_parameters
    flops = training_flops(
        num_parameters,
        row_tokens,
        full=full,
        checkpointing=config.workers.gradient_checkpointing,
        reference_pass=reference_pass,
    )
    adapter_bytes = 4 * config.tuning.lora_rank * _LORA_SHARE_PER_RANK * num_parameters
    trained = stage.num_steps * stage.global_batch if stage.num_steps else stage.num_epochs * num_rows
    left = sizes.model.weight_bytes if full else adapter_bytes
    return Work(trained, row_tokens=row_tokens, row_flops=flops, storage_bytes=left)
