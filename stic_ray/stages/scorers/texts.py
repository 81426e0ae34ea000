"""Scorers that look at nothing but texts: `consistency`, `length`, `repetition`, `pattern`."""

import re
from collections.abc import Sequence
from functools import partial

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError
from stic_ray.core.steps import StepRun
from stic_ray.core.verification import ScoresConfig
from stic_ray.method.text_scores import agreement, mean_to_others, num_matches, num_words, repeated_share
from stic_ray.stages.scorers.base import Score, Scorer, Tools, of_texts

_SIMILARITY_MODEL = "scores.similarity_model"
_ALONE = "the image has no other answer to compare it with"


def consistency(settings: ScoresConfig) -> Scorer:
    """Return the mean similarity to the other answers: minimum Bayes risk (SIcog, arXiv 2503.12303)."""
    if settings.similarity_model:
        return Scorer(_open_embedder, frozenset({"gpu"}), check_model=_check_embedder, none_because=_ALONE)
    score = of_texts(partial(agreement, size=settings.consistency_ngram))
    return Scorer(lambda tools: score, none_because=_ALONE)


def length(settings: ScoresConfig) -> Scorer:
    """Return the number of words."""
    return Scorer(lambda tools: of_texts(lambda texts: [float(num_words(text)) for text in texts]))


def repetition(settings: ScoresConfig) -> Scorer:
    """Return minus the share of runs of words that were there before."""
    size = settings.repetition_ngram
    return Scorer(lambda tools: of_texts(lambda texts: [0.0 - repeated_share(text, size) for text in texts]))


def pattern(settings: ScoresConfig) -> Scorer:
    """Return minus the number of matches of `scores.pattern`."""
    found = re.compile(settings.pattern or "")
    score = of_texts(lambda texts: [float(-num_matches(text, found)) for text in texts])
    return Scorer(lambda tools: score, check=_check_pattern)


def _check_pattern(step: StepRun) -> None:
    if not step.config.scores.pattern:
        raise ConfigError("Scorer 'pattern' needs scores.pattern, a regular expression whose matches count against.")


def _check_embedder(config: RunConfig) -> None:
    from stic_ray.engines.similarity import check_embedder

    check_embedder(config.scores.similarity_model or "", _SIMILARITY_MODEL)


def _open_embedder(tools: Tools) -> Score:
    from stic_ray.engines.similarity import TextEmbedder

    embedder = TextEmbedder(tools.config.scores.similarity_model or "", _SIMILARITY_MODEL, on_gpu=tools.on_gpu)

    def score(texts: Sequence[str]) -> list[float | None]:
        vectors = embedder.embed(texts)
        return mean_to_others((vectors @ vectors.T).tolist())

    return of_texts(score)
