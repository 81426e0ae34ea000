"""What is known of a run's parts before it is made: images, rows, questions, tokens, bytes."""

from dataclasses import replace

from stic_ray.core.config import RunConfig, is_toy
from stic_ray.core.steps import Steps
from stic_ray.core.workload import Sizes
from stic_ray.estimate.model_size import model_size
from stic_ray.estimate.rates import Measured
from stic_ray.toyworld.assets import BENCHMARKS

_TOY_IMAGE_BYTES = 1_300


def sizes_of(config: RunConfig, steps: Steps, own: Measured, pilot: Measured) -> Sizes | None:
    """Return the sizes, or None when nothing says how large the model is."""
    model, given = model_size(config), config.estimate
    if model is None:
        return None
    image_tokens = given.num_image_tokens or own.num_image_tokens or pilot.num_image_tokens or model.num_image_tokens
    return Sizes(
        replace(model, num_image_tokens=round(image_tokens)),
        _num_images(config, _finished("num_images", steps, own)),
        _num_instructions(config, _finished("num_instructions", steps, own)),
        _num_toy_questions(config) or given.num_questions,
        image_tokens + given.num_prompt_tokens,
        own.num_answer_tokens or pilot.num_answer_tokens or given.num_answer_tokens,
        own.image_bytes or pilot.image_bytes or (_TOY_IMAGE_BYTES if is_toy(config.pool.source) else given.image_bytes),
    )


def _finished(amount: str, steps: Steps, own: Measured) -> float | None:
    """Return an amount as the finished step says it that counts it."""
    found = [step for step in steps if step.stage.amount == amount and step.name in own.manifests]
    counts = [own.manifests[step.name].get(step.stage.amount_in_manifest or "") for step in found]
    return next((count for count in counts if count is not None), None)


def _num_images(config: RunConfig, finished: float | None) -> float | None:
    there = finished or (config.toyworld.num_pictures if is_toy(config.pool.source) else config.estimate.num_images)
    asked = config.preferences.num_images
    return min(there, asked) if there and asked else there or asked


def _num_instructions(config: RunConfig, finished: float | None) -> float | None:
    toys = config.toyworld.num_instructions if is_toy(config.infusion.source) else None
    return config.infusion.num_rows or finished or toys or config.estimate.num_instructions


def _num_toy_questions(config: RunConfig) -> int | None:
    """Return the questions of the toy world's benchmarks, or None where there are others."""
    names = config.evaluation.benchmarks
    if not all(map(is_toy, names)):
        return None
    return sum(1 if ":" in name else len(BENCHMARKS) for name in names) * config.toyworld.num_scenes
