"""The sections of the configuration about which answer is right: candidates, scores, and rules over them."""

from typing import Annotated, Literal

from pydantic import Field

from stic_ray.core.section import Count, Section, Temperature

PromptPart = Literal["step_by_step", "plain", "hallucination"]


class CandidatesConfig(Section):
    """Several answers for each image, to choose from."""

    num_images: Count | None = None
    """Use the first so many images of the pool's order; all of them when unset."""
    num_candidates: Annotated[int, Field(ge=2)] = 8
    """Answers per image."""
    prompts: Annotated[tuple[PromptPart, ...], Field(min_length=1)] = ("step_by_step",)
    """Parts of the prompt set that are asked in turn: answer n gets one of part n, modulo their number."""
    temperature: Temperature = 0.7
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    max_new_tokens: Count = 1024
    allow_truncated: bool = False
    """Keep answers that were cut off at `max_new_tokens`."""
