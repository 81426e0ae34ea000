"""Scorers of log-probabilities: `log_p` (CSR), `image_logratio`, `implicit_reward` (IRIS)."""

from collections.abc import Callable, Sequence

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError
from stic_ray.core.steps import StepRun
from stic_ray.core.verification import Likelihood, ScoresConfig
from stic_ray.core.workload import Sizes
from stic_ray.engines.base import AnsweredPrompt
from stic_ray.method.images import blank_like
from stic_ray.stages.scorers.base import (
    Answered,
    Candidate,
    Requests,
    Score,
    Scored,
    Scorer,
    ScoringEngine,
    Tools,
    by_answer,
)


def log_p(settings: ScoresConfig) -> Scorer:
    """Return the model's own log p of the answer given image and prompt (half of CSR's score, arXiv 2405.14622)."""

    def values(tools: Tools, images: Sequence[Answered]) -> list[list[float]]:
        return answer_logps(tools.engine, images, "model")

    return Scorer(_opening("log_p", values), frozenset({"model", "pictures"}), requests=_passes(1))


def image_logratio(settings: ScoresConfig) -> Scorer:
    """Return log p given the image minus log p given a uniform grey picture of its size."""

    def values(tools: Tools, images: Sequence[Answered]) -> list[list[float]]:
        seen = answer_logps(tools.engine, images, "model")
        return _differences(seen, answer_logps(tools.engine, images, "model", blank=True))

    return Scorer(_opening("image_logratio", values), frozenset({"model", "pictures"}), requests=_passes(2))


def implicit_reward(settings: ScoresConfig) -> Scorer:
    """Return log p of the trained model minus the reference's: DPO's reward over beta (IRIS, arXiv 2602.01769)."""

    def values(tools: Tools, images: Sequence[Answered]) -> list[list[float]]:
        trained = answer_logps(tools.engine, images, "model")
        return _differences(trained, answer_logps(tools.reference, images, "reference"))

    return Scorer(
        _opening("implicit_reward", values),
        frozenset({"model", "reference", "pictures"}),
        _check_two_models,
        requests=_passes(2),
    )


def answer_logps(
    engine: ScoringEngine | None, images: Sequence[Answered], name: str, *, blank: bool = False
) -> list[list[float]]:
    """Return log p of every answer of some images under a model, each given its own prompt.

    What several scorers of a window ask of the same model (by its `name`) is computed once.
    """
    assert engine is not None, "the stage opens what its scorers need"
    new = [image for image in images if (name, blank) not in image.known]
    asked, places = [], []
    for image in new:
        picture = blank_like(image.picture) if blank and image.picture else image.picture
        for prompt in dict.fromkeys(answer.prompt for answer in image.answers):
            own = [place for place, answer in enumerate(image.answers) if answer.prompt == prompt]
            texts = tuple(image.answers[place].text for place in own)
            cut_off = tuple(image.answers[place].cut_off for place in own)
            asked.append(AnsweredPrompt(prompt, picture, texts, cut_off))
            places.append((image, own))
    for image in new:
        image.known[name, blank] = [0.0] * len(image.answers)
    for (image, own), found in zip(places, engine.score_answers(asked), strict=True):
        for place, logp in zip(own, found, strict=True):
            image.known[name, blank][place] = logp
    return [image.known[name, blank] for image in images]


def _opening(
    name: Likelihood, values: Callable[[Tools, Sequence[Answered]], list[list[float]]]
) -> Callable[[Tools], Score]:
    """Return what opens a scorer: its values, divided by tokens where the settings say so."""

    def open_score(tools: Tools) -> Score:
        def score(images: Sequence[Answered]) -> list[Scored]:
            found = values(tools, images)
            if name in tools.config.scores.per_token:
                counts = [[_num_tokens(answer) for answer in image.answers] for image in images]
                found = [
                    [value / number for value, number in zip(*own, strict=True)]
                    for own in zip(found, counts, strict=True)
                ]
            return [by_answer(image, own) for image, own in zip(images, found, strict=True)]

        return score

    return open_score


def _num_tokens(answer: Candidate) -> int:
    """Return over how many tokens an answer's log p is a sum: its own, and the end where it has one."""
    if answer.num_tokens is None:
        raise ValueError("scores.per_token divides by the tokens of answers, so each needs its num_tokens")
    return max(1, answer.num_tokens + (not answer.cut_off))


def _differences(first: list[list[float]], second: list[list[float]]) -> list[list[float]]:
    return [[one - other for one, other in zip(*pair, strict=True)] for pair in zip(first, second, strict=True)]


def _check_two_models(step: StepRun) -> None:
    settings = step.config.scores
    if not (settings.model or settings.reference or {"model", "reference"} & step.inputs.keys()):
        raise ConfigError(
            "Scorer 'implicit_reward' compares two models, and both are the run's own: give this step an input "
            "`model` (a training), or set scores.model or scores.reference."
        )


def _passes(number: int) -> Callable[[RunConfig, Sizes], Requests]:
    """Return the requests of so many forward passes over the answers of an image, its prompt read once."""

    def requests(config: RunConfig, sizes: Sizes) -> Requests:
        candidates = config.candidates
        answer_tokens = min(sizes.num_answer_tokens, candidates.max_new_tokens)
        return ((number, sizes.num_prompt_tokens + candidates.num_candidates * answer_tokens, 0),)

    return requests
