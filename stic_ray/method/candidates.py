"""Several answers of an image: what each is asked with, and which of them can be used."""

from collections.abc import Sequence

from stic_ray.core.config import CandidatesConfig
from stic_ray.core.errors import Rejected
from stic_ray.core.randomness import random_for
from stic_ray.core.schemas import Reason
from stic_ray.method.preferences import AnswerText
from stic_ray.method.prompts import PromptSet

MIN_CANDIDATES = 2
"""Below it there is nothing to choose from."""


def filed_under(image_id: str, seed: int, prompts: PromptSet) -> str:
    """Return the plain prompt that the image's answers are trained under: the one that its preference pair has."""
    return random_for(seed, image_id, "preferences").choice(prompts.plain)


def candidate_prompts(image_id: str, seed: int, config: CandidatesConfig, prompts: PromptSet) -> list[str]:
    """Return what each answer is asked with: the parts of the prompt set in turn, of each one prompt for the image."""
    drawn = {
        part: random_for(seed, image_id, f"candidates, {part}").choice(getattr(prompts, part))
        for part in dict.fromkeys(config.prompts)
    }
    return [drawn[config.prompts[number % len(config.prompts)]] for number in range(config.num_candidates)]


def usable(answers: Sequence[AnswerText], config: CandidatesConfig) -> list[int]:
    """Return the numbers of the answers that say something and were not cut off, where that is not allowed.

    Raises Rejected where fewer than two are left.
    """
    kept = [
        number
        for number, answer in enumerate(answers)
        if answer.text.strip() and (config.allow_truncated or answer.finish_reason != "length")
    ]
    if len(kept) < MIN_CANDIDATES:
        num_empty = sum(not answer.text.strip() for answer in answers)
        num_cut_off = len(answers) - len(kept) - num_empty
        raise Rejected(
            Reason.EMPTY_ANSWER if num_empty > num_cut_off else Reason.TRUNCATED_ANSWER,
            f"{len(kept)} of {len(answers)} answers can be used: {num_empty} are empty, {num_cut_off} were cut off at "
            f"candidates.max_new_tokens={config.max_new_tokens}",
        )
    return kept
