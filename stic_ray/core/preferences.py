"""The section of the configuration about preference pairs, and the kinds of dispreferred answers."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, PlainSerializer, model_validator

from stic_ray.core.errors import nearest
from stic_ray.core.section import Count, Positive, Section, Share, Temperature

GradedCorruption = Literal["diffusion_noise", "crop", "mask", "blur"]
"""Corruptions of one number, their strength; method/corruption.py says what it means for each."""
CorruptionKind = Literal["low_resolution", "colour_jitter", GradedCorruption]
TextNegative = Literal["text_swap", "other_image"]
"""Dispreferred answers that are made of answers that are there, by no request of their own."""
NegativeKind = Literal["hallucination_prompt", CorruptionKind, TextNegative]


def _names_of(kind: Any) -> Iterator[str]:
    for part in get_args(kind):
        yield from [part] if isinstance(part, str) else _names_of(part)


GRADED: frozenset[str] = frozenset(_names_of(GradedCorruption))
CORRUPTIONS: frozenset[str] = frozenset(_names_of(CorruptionKind))
TEXT_NEGATIVES: frozenset[str] = frozenset(_names_of(TextNegative))
NEGATIVES: tuple[str, ...] = tuple(_names_of(NegativeKind))


def _weights(given: Any) -> Any:
    """Return a mapping of weights, or one kind alone, as pairs in the order of their names; the rest is pydantic's."""
    kinds = {given: 1.0} if isinstance(given, str) else given
    if not isinstance(kinds, dict):
        return given
    for kind in kinds:
        if kind not in NEGATIVES:
            raise ValueError(f"'{kind}' is no kind.{nearest(str(kind), NEGATIVES)} Valid: {', '.join(NEGATIVES)}")
    return tuple(sorted(kinds.items()))


NegativeWeights = Annotated[tuple[tuple[NegativeKind, Positive], ...], BeforeValidator(_weights), PlainSerializer(dict)]
"""How often each kind is drawn, {kind: weight}; the weights need not add up to 1."""


class PreferencesConfig(Section):
    """How preference pairs are made (STIC section 4.1, Algorithm 1)."""

    num_images: Count | None = None
    """Use the first so many images of the pool's order; all of them when unset."""
    chosen_prompt: Literal["step_by_step", "plain"] = "step_by_step"
    """What the preferred answer is asked with: a prompt of its own, or the one that both answers are filed under."""
    negatives: NegativeWeights = ()
    """Kinds of dispreferred answers and how often each is drawn: {crop: 1, text_swap: 2}. When unset, the two shares
    below decide."""
    hallucination_share: Share = 0.5
    """Probability of a hallucination prompt on the clean image; else a plain prompt on a corrupted image."""
    low_resolution_share: Share = 0.5
    """Probability that a corruption is low resolution; else colour jitter."""
    low_resolution_px: Count = 20
    """Shorter side after the low-resolution corruption."""
    jitter_brightness: Share = 0.5
    """Brightness factor is drawn from [1 - x, 1 + x]."""
    jitter_hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.3
    """Hue shift is drawn from [-x, x], in turns of the colour wheel."""
    strength: Share = 0.5
    """Of diffusion noise, crop, mask and blur: 0 leaves the picture nearly as it was, 1 nearly nothing of it."""
    strength_end: Share | None = None
    """Strength at the last of `num_images`, when it changes evenly from `strength` along the pool's order."""
    temperature: Temperature = 0.2
    """0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_new_tokens: Count = 1024
    allow_truncated: bool = False
    """Keep pairs with an answer that was cut off at `max_new_tokens`."""
    reference_logps: bool = False
    """Store the log-probabilities of both answers under the model that gave them: training then needs no pass of its
    reference model, which pays where pairs are trained on more than once."""

    @property
    def shares(self) -> dict[str, float]:
        """Return the probability of each kind of dispreferred answer that can be drawn."""
        corrupted = 1 - self.hallucination_share
        weights = dict(self.negatives) or {
            "hallucination_prompt": self.hallucination_share,
            "low_resolution": corrupted * self.low_resolution_share,
            "colour_jitter": corrupted * (1 - self.low_resolution_share),
        }
        total = sum(weights.values())
        return {kind: weight / total for kind, weight in weights.items() if weight}

    def strength_at(self, position: int) -> float:
        """Return the strength of a corruption at a position of the pool's order."""
        if self.strength_end is None or self.num_images is None:
            return self.strength
        way = position / max(1, self.num_images - 1)
        return self.strength + (self.strength_end - self.strength) * way

    @model_validator(mode="after")
    def _settings_fit_together(self) -> "PreferencesConfig":
        if self.strength_end is not None and self.num_images is None:
            raise ValueError(
                "strength_end needs num_images, the positions that the strength changes over: a pool may grow later"
            )
        if self.reference_logps and "other_image" in self.shares:
            raise ValueError(
                "reference_logps=true scores each image's answers together, and the kind other_image has its rejected "
                "one from another image; leave one of them out"
            )
        return self
