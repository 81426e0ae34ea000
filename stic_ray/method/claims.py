"""Scoring an answer by its statements (RLAIF-V, arXiv 2405.17220): each becomes a question that yes or no answers."""

import math
import re
from collections.abc import Sequence

from stic_ray.core.verification import ClaimsValue

YES_NO = ("yes", "Yes", "no", "No")
"""The answers between which the model's probability is divided."""
_BULLET = re.compile(r"^\s*(?:[-*+>#\u2022\u2013\u2014]+\s*|[(\[]?[Qq]?\d{1,3}[.):\]]+(?=\s)\s*)+")


def read_questions(text: str, limit: int, *, cut_off: bool = False) -> list[str]:
    """Return the questions that a model wrote, each once, in their order, at most `limit`.

    One stands on a line, or ends with a question mark. Numbers and bullets in front of it, empty lines and headings
    (lines that end with a colon) are left out, and the last one of a text that was cut off at its limit is.
    """
    lines = [_BULLET.sub("", line).strip(" \t*") for line in re.split(r"\n+|(?<=\?)\s+", text)]
    if cut_off and not text.rstrip().endswith("?"):
        lines = lines[:-1]
    found: dict[str, str] = {}
    for line in lines:
        if any(map(str.isalpha, line)) and not line.endswith(":"):
            found.setdefault(same_question(line), line)
    return list(found.values())[:limit]


def same_question(question: str) -> str:
    """Return what is equal for questions that are asked once: the words, case and spaces aside."""
    return " ".join(question.casefold().split())


def yes_probability(logps: Sequence[float]) -> float:
    """Return the probability of yes against no, from log p of each of YES_NO."""
    most = max(logps)
    yes, capital_yes, no, capital_no = (math.exp(logp - most) for logp in logps)
    return (yes + capital_yes) / (yes + capital_yes + no + capital_no)


def claims_score(p_yes: Sequence[float], value: ClaimsValue) -> float | None:
    """Return the score of an answer whose statements have these probabilities; None without a statement.

    `denied` is RLAIF-V's: minus the number of statements of which no is likelier than yes.
    """
    if not p_yes:
        return None
    num_denied = sum(p < 0.5 for p in p_yes)
    if value == "denied":
        return float(-num_denied)
    if value == "expected_denied":
        return 0.0 - sum(1 - p for p in p_yes)
    return float(len(p_yes) - 2 * num_denied)
