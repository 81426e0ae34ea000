"""Scorer `image_text`: how well a text fits the picture in the eyes of CLIP, SigLIP or the like."""

from collections.abc import Sequence
from typing import cast

from PIL import Image

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError
from stic_ray.core.steps import StepRun
from stic_ray.core.verification import ScoresConfig
from stic_ray.method.text_scores import sentences
from stic_ray.stages.scorers.base import Answered, Score, Scored, Scorer, Tools, by_answer

_MODEL = "scores.image_text_model"


def image_text(settings: ScoresConfig) -> Scorer:
    """Return the cosine or logit of picture and answer, or the mean over its sentences, as CSR scores them."""
    return Scorer(_open, frozenset({"pictures", "gpu"}), _check, _check_model, none_because="the answer has no text")


def _open(tools: Tools) -> Score:
    from stic_ray.engines.similarity import ImageTextModel

    settings = tools.config.scores
    model = ImageTextModel(settings.image_text_model or "", _MODEL, on_gpu=tools.on_gpu)

    def parts_of(text: str) -> list[str]:
        return sentences(text) if settings.image_text_unit == "sentence" else [text] if text.strip() else []

    def score(images: Sequence[Answered]) -> list[Scored]:
        pictures = [cast(Image.Image, image.picture) for image in images]
        parts = [[parts_of(text) for text in image.texts] for image in images]
        fits = model.compare(
            pictures, [[t for own in found for t in own] for found in parts], settings.image_text_value
        )
        scored = []
        for image, found, flat in zip(images, parts, map(iter, fits), strict=True):
            by_part = [[next(flat) for _ in own] for own in found]
            scored.append(by_answer(image, [sum(own) / len(own) if own else None for own in by_part]))
        return scored

    return score


def _check(step: StepRun) -> None:
    if not step.config.scores.image_text_model:
        raise ConfigError(
            "Scorer 'image_text' needs scores.image_text_model: a folder or hub id of CLIP, SigLIP or the like."
        )


def _check_model(config: RunConfig) -> None:
    from stic_ray.engines.similarity import check_image_text

    check_image_text(config.scores.image_text_model or "", _MODEL)
