"""Instruction rows: reading the LLaVA format, and putting a description in front of the first question.

(STIC section 4.2, Algorithm 2. The layout of an infused prompt is the prompt set's `infuse`.)
"""

from collections.abc import Mapping, Sequence
from typing import Any

from stic_ray.core.schemas import Reason
from stic_ray.method.preferences import Rejection
from stic_ray.method.prompts import PromptSet

Messages = list[dict[str, str]]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_PLACEHOLDER = "<image>"


def read_conversation(turns: Any) -> Messages | Rejection:
    """Turn LLaVA turns ({"from", "value"}) into messages ({"role", "content"}), without image placeholders.

    A conversation may open with a system turn, then alternates user and assistant and ends with the assistant;
    anything else is a rejection, as nothing could be learned from it.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        return Rejection(Reason.BAD_CONVERSATION, "no turns in 'conversations'")
    messages: Messages = []
    num_placeholders = 0
    for turn in turns:
        message = _read_turn(turn)
        if message is None:
            return Rejection(Reason.BAD_CONVERSATION, f"a turn that is not from/value text: {str(turn)[:120]}")
        num_placeholders += message["content"].count(_PLACEHOLDER)
        messages.append({**message, "content": message["content"].replace(_PLACEHOLDER, "").strip()})
    roles = [message["role"] for message in messages]
    spoken = roles[1:] if roles[0] == "system" else roles
    if not spoken or len(spoken) % 2 or any(r != ("user", "assistant")[i % 2] for i, r in enumerate(spoken)):
        return Rejection(Reason.BAD_CONVERSATION, f"turns are {', '.join(roles)}; user and assistant must alternate")
    if num_placeholders > 1:
        return Rejection(Reason.SEVERAL_IMAGES, f"{num_placeholders} image placeholders; one image per row")
    if any(message["role"] == "assistant" and not message["content"] for message in messages):
        return Rejection(Reason.EMPTY_ANSWER, "an assistant turn is empty")
    return messages


def infuse(messages: Messages, description: str, prompts: PromptSet) -> Messages:
    """Return the conversation with the description in front of its first question."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    question = prompts.infused(description, messages[first]["content"])
    return [{**m, "content": question} if i == first else m for i, m in enumerate(messages)]


def _read_turn(turn: Any) -> dict[str, str] | None:
    if not isinstance(turn, Mapping):
        return None
    role = _ROLES.get(str(turn.get("from", turn.get("role"))))
    content = turn.get("value", turn.get("content"))
    return {"role": role, "content": content} if role and isinstance(content, str) else None
