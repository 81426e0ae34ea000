"""One image to one preference pair (STIC Algorithm 1): what is asked of the model, and what becomes of the answers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from PIL import Image

from stic_ray.core.errors import Rejected
from stic_ray.core.preferences import CORRUPTIONS, TEXT_NEGATIVES, CorruptionKind, PreferencesConfig, TextNegative
from stic_ray.core.randomness import random_for
from stic_ray.core.schemas import Reason
from stic_ray.method.corruption import Corruption, corrupt, draw_corruption, draw_of_kind, pixel_change
from stic_ray.method.prompts import PromptSet
from stic_ray.method.swapping import swap_words

Negative = Literal["hallucination_prompt", "corrupted_image", TextNegative]

NO_CANDIDATES: dict[str, None] = dict.fromkeys(
    (
        "more_rejected",
        "rejected_image",
        "rejected_image_corruption",
        "chosen_number",
        "rejected_numbers",
        "chosen_score",
        "rejected_scores",
    )
)
"""Columns of a pair that was not chosen from candidates and has one rejected answer on one picture."""


@dataclass(frozen=True)
class PairPlan:
    """What one image's pair is made from. Both answers are filed under `prompt` and the clean image."""

    prompt: str
    chosen_prompt: str
    rejected_prompt: str
    negative: Negative
    corruption: Corruption | None

    @property
    def asks_twice(self) -> bool:
        """Whether the dispreferred answer takes a request of its own."""
        return self.negative not in TEXT_NEGATIVES


@dataclass(frozen=True)
class AnswerText:
    """An answer as far as the pair rules look at it."""

    text: str
    num_tokens: int
    finish_reason: str

    @classmethod
    def in_pair(cls, pair: Mapping[str, Any], side: str) -> "AnswerText":
        """Read one side of a pair, `chosen` or `rejected`."""
        return cls(pair[side][0]["content"], pair[f"num_{side}_tokens"], pair[f"{side}_finish_reason"])


def plan_pair(image_id: str, seed: int, config: PreferencesConfig, prompts: PromptSet, position: int) -> PairPlan:
    """Draw branch, prompts and corruption of an image: a function of (seed, image id) and the settings.

    Its position in the pool's order counts only where the strength changes along it.
    """
    generator = random_for(seed, image_id, "preferences")
    prompt = generator.choice(prompts.plain)
    step_by_step = generator.choice(prompts.step_by_step)  # drawn in any case: the other draws stay as they are
    chosen_prompt = prompt if config.chosen_prompt == "plain" else step_by_step
    if config.negatives:
        kinds = config.shares
        kind = generator.choices([*kinds], [*kinds.values()])[0]
    elif generator.random() < config.hallucination_share:
        kind = "hallucination_prompt"
    else:
        return PairPlan(prompt, chosen_prompt, prompt, "corrupted_image", draw_corruption(generator, config))
    if kind == "hallucination_prompt":
        return PairPlan(prompt, chosen_prompt, generator.choice(prompts.hallucination), kind, None)
    if kind in CORRUPTIONS:
        strength = config.strength_at(position)
        corruption = draw_of_kind(cast(CorruptionKind, kind), generator, config, strength)
        return PairPlan(prompt, chosen_prompt, prompt, "corrupted_image", corruption)
    return PairPlan(prompt, chosen_prompt, chosen_prompt, cast(TextNegative, kind), None)


def picture_for_rejected(plan: PairPlan, clean: Image.Image) -> tuple[Image.Image, float | None]:
    """Return the picture that the dispreferred answer is given on, and its mean change from the clean one.

    The change is None for a clean picture. Raises Rejected for a corruption that changed nothing.
    """
    if plan.corruption is None:
        return clean, None
    corrupted = corrupt(clean, plan.corruption)
    change = pixel_change(clean, corrupted)
    if change == 0.0:
        raise Rejected(Reason.CORRUPTION_CHANGED_NOTHING, f"{plan.corruption['kind']} left every pixel as it was")
    return corrupted, change


def swapped(chosen: AnswerText, image_id: str, seed: int, count_tokens: Callable[[str], int]) -> AnswerText:
    """Return an answer with two words exchanged. Raises Rejected where that cannot be."""
    text = swap_words(chosen.text, random_for(seed, image_id, "text swap"))
    return AnswerText(text, chosen.num_tokens + count_tokens(text) - count_tokens(chosen.text), chosen.finish_reason)


def borrowed(own: str, image_id: str, seed: int, answers: Sequence[AnswerText]) -> AnswerText:
    """Return one of the answers, drawn from those that say something else. Raises Rejected where none does."""
    others = [answer for answer in answers if answer.text.strip() != own.strip()]
    if not others:
        raise Rejected(Reason.IDENTICAL_ANSWERS, "no image of its shard has another answer")
    return random_for(seed, image_id, "other image").choice(others)


def judge_pair(
    chosen: AnswerText,
    rejected: AnswerText | None,
    config: PreferencesConfig,
    *,
    count_tokens: Callable[[str], int],
    max_length_tokens: int,
) -> int:
    """Return the longer sequence's length in tokens. Raises Rejected where the two answers are no pair.

    `count_tokens` gives the length of the training sequence (image, prompt and answer) for an answer's text. Without a
    rejected answer the other one is judged alone.
    """
    answers = {"preferred": chosen} if rejected is None else {"preferred": chosen, "dispreferred": rejected}
    for name, answer in answers.items():
        if not answer.text.strip():
            raise Rejected(Reason.EMPTY_ANSWER, f"the {name} answer is empty")
        if answer.finish_reason == "length" and not config.allow_truncated:
            raise Rejected(
                Reason.TRUNCATED_ANSWER,
                f"the {name} answer was cut off at preferences.max_new_tokens={config.max_new_tokens}",
            )
    if rejected is not None and chosen.text.strip() == rejected.text.strip():
        raise Rejected(Reason.IDENTICAL_ANSWERS, f"both answers are {chosen.text.strip()[:80]!r}")
    length = max(count_tokens(answer.text) for answer in answers.values())
    if length > max_length_tokens:
        raise Rejected(Reason.TOO_LONG, f"{length} tokens, more than dpo.max_length_tokens={max_length_tokens}")
    return length


def pair_row(plan: PairPlan, chosen: AnswerText, rejected: AnswerText) -> dict[str, Any]:
    """Return the columns of a pair that follow from the plan and the answers."""
    return {
        "prompt": [{"role": "user", "content": plan.prompt}],
        "chosen_prompt": plan.chosen_prompt,
        "rejected_prompt": plan.rejected_prompt,
        "negative": plan.negative,
        "corruption": plan.corruption,
        **answer_columns("chosen", chosen),
        **answer_columns("rejected", rejected),
    }


def answer_columns(side: str, answer: AnswerText) -> dict[str, Any]:
    """Return the columns of one side of a pair, `chosen` or `rejected`."""
    return {
        side: [{"role": "assistant", "content": answer.text}],
        f"num_{side}_tokens": answer.num_tokens,
        f"{side}_finish_reason": answer.finish_reason,
    }
