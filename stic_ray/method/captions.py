"""Captions of images: what asks for them, and what of them an image is trained on (VILA², arXiv:2407.17453)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from stic_ray.core.errors import Rejected
from stic_ray.core.randomness import random_for
from stic_ray.core.rounds import SELF, CaptionsConfig, CorpusConfig
from stic_ray.core.schemas import Reason
from stic_ray.method.prompts import PromptSet

Source = Literal["original", "recaption", "both"]
"""Which captions a text is made of."""


class Target(NamedTuple):
    """What the model is to say of an image."""

    text: str
    source: Source


def caption_prompts(image_id: str, seed: int, config: CaptionsConfig, prompts: PromptSet) -> tuple[str, ...]:
    """Return what is asked about an image: the task's questions, or one prompt that is drawn from the prompt set."""
    if config.questions:
        return config.questions
    parts = [getattr(prompts, part) for part in config.prompts]
    known = [prompt for part in parts for prompt in ([part] if isinstance(part, str) else part)]
    return (random_for(seed, image_id, f"caption of round {config.round}").choice(known),)


def newest(captions: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """Return an image's captions of a kind that are of its last round."""
    own = [each for each in captions if each["kind"] == kind]
    last = max((each["round"] for each in own), default=0)
    return [each for each in own if each["round"] == last]


def target_of(image_id: str, original: str | None, recaption: str | None, config: CorpusConfig, seed: int) -> Target:
    """Return what an image is trained to be described with, by the template. Raises Rejected without any caption."""
    original, recaption = (text.strip() if text and text.strip() else None for text in (original, recaption))
    if original is None and recaption is None:
        raise Rejected(Reason.NO_CAPTION, "neither the source nor the model has a caption of it")
    template = config.template
    if original is None:
        template = "recaption"
    elif recaption is None:
        template = "original"
    elif template == "sample":
        template = random_for(seed, image_id, "caption of the corpus").choice(("original", "recaption"))
    if template == "side_by_side":
        return Target(f"{original} {recaption}", "both")
    return Target(original or "", "original") if template == "original" else Target(recaption or "", "recaption")


def recaptions_of(captions: Mapping[str, Sequence[Mapping[str, Any]]], *, shuffle: bool) -> dict[str, str]:
    """Return by image its newest caption by the model; with `shuffle`, that of the next image that has one."""
    own = {image: newest(rows, SELF) for image, rows in captions.items()}
    texts = {image: rows[0]["text"] for image, rows in own.items() if rows}
    if not shuffle:
        return texts
    given = [*texts.values()] if len(texts) > 1 else []  # one alone has nobody to exchange with
    return dict(zip(texts, given[1:] + given[:1], strict=False))
