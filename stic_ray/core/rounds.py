"""The sections of the configuration about captions that a model writes anew, and about rounds of self-training."""

import re
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator

from stic_ray.core.section import Count, Pattern, Section, Temperature, in_order

CaptionPart = Literal["step_by_step", "plain", "describe"]
SELF = "self"
"""Kind of captions that a model writes about any image."""
SPECIALIST = "specialist:"
"""How the kinds begin of captions that answer a task."""

_KIND = re.compile(rf"{SELF}|{SPECIALIST}[A-Za-z0-9_-]+")


class CaptionsConfig(Section):
    """Captions that a model writes about the pool (VILA² section 3, arXiv:2407.17453)."""

    num_images: Count | None = None
    """Use the first so many images of the pool's order; all of them when unset."""
    kind: str = SELF
    """Whose they are: `self`, or `specialist:NAME` where the answers to a task become further turns."""
    round: Count = 1
    """Of an image's captions of a kind, a corpus takes those of the last round."""
    prompts: Annotated[tuple[CaptionPart, ...], Field(min_length=1)] = ("step_by_step",)
    """Parts of the prompt set; one prompt out of all of them is drawn for each image."""
    questions: tuple[str, ...] = ()
    """Asked instead of a prompt of the set, each of them about each image: a specialist's task."""
    temperature: Temperature = 0.2
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_new_tokens: Count = 1024
    allow_truncated: bool = False
    """Keep captions that were cut off at `max_new_tokens`."""
    num_answers: Count = 1
    """How often each is written; of several, the most frequent answer is kept, where `majority` of them agree."""
    majority: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    pattern: Pattern | None = None
    """Regular expression that a caption must match somewhere, as "[0-9]" for a count."""

    @field_validator("kind")
    @classmethod
    def _is_kind(cls, kind: str) -> str:
        if not _KIND.fullmatch(kind):
            raise ValueError(f"is '{kind}'; valid are {SELF}, and {SPECIALIST}NAME with letters, digits, _ and -")
        return kind

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.num_answers > 1 and self.temperature == 0:
            raise ValueError("num_answers > 1 gives equal answers with temperature=0; set a temperature")
        if self.kind == SELF and self.questions:
            raise ValueError(f"questions are a specialist's; set kind={SPECIALIST}NAME with them")
        if self.kind != SELF and not self.questions:
            raise ValueError(f"kind={self.kind} needs questions, the task that it answers")
        return self


class CorpusConfig(Section):
    """What of its captions an image is trained on."""

    template: Literal["side_by_side", "recaption", "original", "sample"] = "side_by_side"
    """`side_by_side`: the original caption, then the model's own (VILA² section 3.1); `recaption` and `original`: that
    one alone, a control; `sample`: one of both, drawn for each image. An image that has one of them only is trained
    on that one, and counted."""
    shuffle: bool = False
    """A control: the model's captions are exchanged between the images of a shard."""


class Specialist(Section):
    """A task that a model is fine-tuned on, to answer its questions about the whole pool (VILA² section 3.2)."""

    source: Annotated[str, Field(min_length=1)]
    """Instruction data of the task, as `infusion.source`; all of it, once through or `sft.num_epochs` times."""
    images: str | None = None
    """As `infusion.images`."""
    questions: Annotated[tuple[str, ...], Field(min_length=1)]
    """What it is asked about each image; its answers become further turns."""
    num_answers: Count = 1
    """As `captions.num_answers`, with `captions.majority`."""
    pattern: Pattern | None = None
    """As `captions.pattern`."""


Specialists = Annotated[tuple[tuple[str, Specialist], ...], BeforeValidator(in_order), PlainSerializer(dict)]
"""Specialists by name."""


class RoundsConfig(Section):
    """How often a recipe that goes in rounds describes and trains again, and when it stops."""

    num: Count = 1
    """Rounds at most."""
    image_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the pool's images that each round asks about, drawn anew in each."""
    restart: Literal["base", "previous"] = "base"
    """What each round trains: the base model again (VILA²), or what the round before left."""
    specialists: Specialists = ()
    """By name; they are trained from the last round's model, and the base model from what they add. Recipe `vila2`."""
    stop_metric: str | None = None
    """`BENCHMARK METRIC`, as in scores.json: no further round once this has not grown, the interval of its difference
    to the round before, paired by question, holding 0 or lying below it. All rounds are done when unset."""

    @field_validator("specialists")
    @classmethod
    def _are_names(cls, given: Specialists) -> Specialists:
        if wrong := [name for name, _ in given if not _KIND.fullmatch(SPECIALIST + name)]:
            raise ValueError(f"has '{wrong[0]}'; names have letters, digits, _ and -")
        return given

    @field_validator("stop_metric")
    @classmethod
    def _is_benchmark_and_metric(cls, value: str | None) -> str | None:
        if value is not None and len(value.split()) != 2:
            raise ValueError(f"is '{value}'; give benchmark and metric, as 'toy_describe object_f1'")
        return value

    @model_validator(mode="after")
    def _stops_between_rounds(self) -> Self:
        if self.stop_metric is not None and self.num == 1:
            raise ValueError("stop_metric decides about a further round and needs rounds.num=2 or more")
        return self
