"""How long rows are in training, and which are too long for it."""

from collections.abc import Sequence

from stic_ray.core.errors import ModelError, Rejected
from stic_ray.core.schemas import Reason
from stic_ray.engines.base import TokenCounter


def sequence_length(
    counter: TokenCounter, messages: Sequence[dict[str, str]], num_added_tokens: int, *, with_image: bool = True
) -> int:
    """Return the tokens of a conversation as trained on, an image adding so many. Raises Rejected where it has none."""
    try:
        return counter.count_text_tokens(messages, with_image=with_image) + num_added_tokens
    except ModelError as error:
        raise Rejected(Reason.BAD_CONVERSATION, str(error)) from error


def check_length(length: int, limit: int, setting: str) -> None:
    """Raise Rejected for a sequence that is longer than a setting allows."""
    if length > limit:
        raise Rejected(Reason.TOO_LONG, f"{length} tokens, more than {setting}={limit}")
