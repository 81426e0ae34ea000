"""Instruction rows: reading the LLaVA format, and putting a description in front of the first question.

(STIC section 4.2, Algorithm 2. The layout of an infused prompt is the prompt set's `infuse`.)
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stic_ray.core.config import InfusionConfig
from stic_ray.core.errors import Rejected
from stic_ray.core.randomness import random_for
from stic_ray.core.schemas import Reason
from stic_ray.method.media import check_placeholders, without_placeholder
from stic_ray.method.prompts import PromptSet

Messages = list[dict[str, str]]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_conversation(turns: Any, *, has_image: bool) -> Messages:
    """Turn LLaVA turns ({"from", "value"}) into messages ({"role", "content"}), without image placeholders.

    A conversation may open with a system turn, then alternates user and assistant and ends with the assistant.
    Raises Rejected for anything else, as nothing could be learned from it, and where the texts ask for an image that
    the row does not have, or for several.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise Rejected(Reason.BAD_CONVERSATION, f"'conversations' is no list of turns, but {str(turns)[:120]!r}")
    messages = [_read_turn(turn) for turn in turns]
    check_placeholders((message["content"] for message in messages), has_image=has_image)
    messages = [{**m, "content": without_placeholder(m["content"]).strip()} for m in messages]
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or len(spoken) % 2 or any(r != ("user", "assistant")[i % 2] for i, r in enumerate(spoken)):
        raise Rejected(Reason.BAD_CONVERSATION, f"turns are {', '.join(roles)}; user and assistant must alternate")
    if any(message["role"] == "assistant" and not message["content"] for message in messages):
        raise Rejected(Reason.EMPTY_ANSWER, "an assistant turn is empty")
    return messages


def description_prompt(row_id: str, seed: int, config: InfusionConfig, prompts: PromptSet) -> str:
    """Return what a row's picture is described with: a plain prompt drawn by (seed, row), or the one for all."""
    if config.prompt == "describe":
        return prompts.describe
    return random_for(seed, row_id, "description").choice(prompts.plain)


def infuse(messages: Messages, description: str, prompts: PromptSet) -> Messages:
    """Return the conversation with the description in front of its first question."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    question = prompts.infused(description, messages[first]["content"])
    return [{**m, "content": question} if i == first else m for i, m in enumerate(messages)]


def _read_turn(turn: Any) -> dict[str, str]:
    if not isinstance(turn, Mapping):
        raise Rejected(Reason.BAD_CONVERSATION, f"a turn is no object, but {str(turn)[:120]!r}")
    speaker, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    role = _ROLES.get(str(speaker).strip().lower())
    if role is None:
        raise Rejected(Reason.BAD_CONVERSATION, f"a turn is by {speaker!r:.60}; it can be by {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise Rejected(Reason.BAD_CONVERSATION, f"a turn by {speaker!r:.60} is no text, but {content!r:.60}")
    return {"role": role, "content": content}
