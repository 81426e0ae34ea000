"""The scorers, by name. One of a user's own is named as `package.module:name` and needs no change here."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import cast

from stic_ray.core.errors import ConfigError, nearest, type_and_message
from stic_ray.core.verification import ScoresConfig
from stic_ray.stages.scorers.base import Answered, Score, Scored, Scorer, Tools, by_answer
from stic_ray.stages.scorers.claims import claims
from stic_ray.stages.scorers.column import column
from stic_ray.stages.scorers.likelihood import image_logratio, implicit_reward, log_p
from stic_ray.stages.scorers.pictures import image_text
from stic_ray.stages.scorers.texts import consistency, length, pattern, repetition

Values = Callable[[Sequence[Answered]], Sequence[Sequence[float | None]]]
"""A scorer as a plain function."""
SCORERS: dict[str, Callable[[ScoresConfig], Scorer]] = {
    "consistency": consistency,
    "image_logratio": image_logratio,
    "implicit_reward": implicit_reward,
    "log_p": log_p,
    "claims": claims,
    "image_text": image_text,
    "length": length,
    "repetition": repetition,
    "pattern": pattern,
    "column": column,
}


def find_scorers(settings: ScoresConfig) -> dict[str, Scorer]:
    """Return the scorers that the settings name, by the name in their scores: what is behind the colon of a user's own.

    Raises ConfigError for one that is not there, or two of one name.
    """
    found: dict[str, Scorer] = {}
    for given in settings.scorers:
        name = given.partition(":")[2] or given
        if name in found:
            raise ConfigError(f"scores.scorers names two scorers '{name}'; give yours another name.")
        found[name] = _find(given, settings)
    return found


def open_scorer(name: str, tools: Tools) -> Score:
    """Return the function of a scorer, for use without a stage: it takes images with their answers.

    `tools` has the settings, and a loaded engine where the scorer asks a model. Raises ConfigError for a name that is
    not there.
    """
    return _find(name, tools.config.scores).open(tools)


def _find(given: str, settings: ScoresConfig) -> Scorer:
    if given in SCORERS:
        return SCORERS[given](settings)
    module, colon, name = given.partition(":")
    if not colon:
        raise ConfigError(
            f"scores.scorers: there is no '{given}'.{nearest(given, SCORERS)} Valid: {', '.join(SCORERS)}, and "
            "package.module:name of your own."
        )
    try:
        own = getattr(import_module(module), name)
    except Exception as error:  # whatever the module raises
        raise ConfigError(f"scores.scorers: '{given}' cannot be imported: {type_and_message(error)}") from error
    if isinstance(own, Scorer):
        return own
    if not callable(own):
        raise ConfigError(f"scores.scorers: '{given}' is {type(own).__name__}; give a function or a Scorer.")
    return Scorer(lambda tools: partial(_plain, cast(Values, own)))


def _plain(own: Values, images: Sequence[Answered]) -> Sequence[Scored]:
    """Call a function that gives, for each image, a value for each of its answers."""
    return [by_answer(image, values) for image, values in zip(images, own(images), strict=True)]
