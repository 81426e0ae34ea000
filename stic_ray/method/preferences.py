"""One image to one preference pair (STIC Algorithm 1): what is asked of the model, and what becomes of the answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from stic_ray.core.config import PreferencesConfig
from stic_ray.core.errors import Rejected
from stic_ray.core.randomness import random_for
from stic_ray.core.schemas import Reason
from stic_ray.method.corruption import Corruption, corrupt, draw_corruption, pixel_change
from stic_ray.method.prompts import PromptSet

Negative = Literal["hallucination_prompt", "corrupted_image"]


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


@dataclass(frozen=True)
class AnswerText:
    """An answer as far as the pair rules look at it."""

    text: str
    num_tokens: int
    finish_reason: str


def plan_pair(image_id: str, seed: int, config: PreferencesConfig, prompts: PromptSet) -> PairPlan:
    """Draw branch, prompts and corruption of an image: a function of (seed, image id) and the settings alone."""
    generator = random_for(seed, image_id, "preferences")
    prompt = generator.choice(prompts.plain)
    chosen_prompt = generator.choice(prompts.step_by_step)
    if generator.random() < config.hallucination_share:
        bad_prompt = generator.choice(prompts.hallucination)
        return PairPlan(prompt, chosen_prompt, bad_prompt, "hallucination_prompt", None)
    return PairPlan(prompt, chosen_prompt, prompt, "corrupted_image", draw_corruption(generator, config))


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


def judge_pair(
    chosen: AnswerText,
    rejected: AnswerText,
    config: PreferencesConfig,
    *,
    count_tokens: Callable[[str], int],
    max_length_tokens: int,
) -> int:
    """Return the longer sequence's length in tokens. Raises Rejected where the two answers are no pair.

    `count_tokens` gives the length of the training sequence (image, prompt and answer) for an answer's text.
    """
    for name, answer in (("preferred", chosen), ("dispreferred", rejected)):
        if not answer.text.strip():
            raise Rejected(Reason.EMPTY_ANSWER, f"the {name} answer is empty")
        if answer.finish_reason == "length" and not config.allow_truncated:
            raise Rejected(
                Reason.TRUNCATED_ANSWER,
                f"the {name} answer was cut off at preferences.max_new_tokens={config.max_new_tokens}",
            )
    if chosen.text.strip() == rejected.text.strip():
        raise Rejected(Reason.IDENTICAL_ANSWERS, f"both answers are {chosen.text.strip()[:80]!r}")
    length = max(count_tokens(chosen.text), count_tokens(rejected.text))
    if length > max_length_tokens:
        raise Rejected(Reason.TOO_LONG, f"{length} tokens, more than dpo.max_length_tokens={max_length_tokens}")
    return length


def pair_row(plan: PairPlan, chosen: AnswerText, rejected: AnswerText) -> dict[str, Any]:
    """Return the columns of a pair that follow from the plan and the answers."""
    return {
        "prompt": [{"role": "user", "content": plan.prompt}],
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "chosen_prompt": plan.chosen_prompt,
        "rejected_prompt": plan.rejected_prompt,
        "negative": plan.negative,
        "corruption": plan.corruption,
        "num_chosen_tokens": chosen.num_tokens,
        "num_rejected_tokens": rejected.num_tokens,
        "chosen_finish_reason": chosen.finish_reason,
        "rejected_finish_reason": rejected.finish_reason,
    }
