"""Questions that a model asks itself, and the answer that most of its answers agree on (V-Zero, VisPlay, EvoLMM).

Those train by reinforcement on what is kept here; fine-tuning and export are the two ways on from here.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from stic_ray.core.errors import Rejected
from stic_ray.core.schemas import Reason
from stic_ray.method.media import without_placeholder
from stic_ray.method.scoring import normalise

_QUESTION = re.compile(r"[^\n]*?[?？؟]+")
_LABEL = re.compile(r"^(?:[\s*#>\"'“”‘’`(\[-]|\d+[.):]|question\s*\d*\s*:|q\s*\d*\s*:)+", re.IGNORECASE)


class Majority(NamedTuple):
    """What most answers to a question say."""

    answer: str | None
    """In its most frequent wording; None where no answer can be counted."""
    share: float
    """Of all answers, 0 to 1."""
    is_tied: bool
    """Whether another answer was given as often."""


def read_question(text: str) -> str:
    """Return the first question in what the model wrote, up to its mark and without numbers and labels in front.

    Raises Rejected where there is none.
    """
    found = _QUESTION.search(without_placeholder(text))
    question = _LABEL.sub("", found[0]).strip() if found else ""
    if not re.search(r"\w", question):
        raise Rejected(Reason.NO_QUESTION, f"no question in {text.strip()[:80]!r}")
    return question


def read_questions(texts: Sequence[str]) -> list[str | Rejected]:
    """Return the question in each text about one image, or why it is not asked: none there, or asked before."""
    found: list[str | Rejected] = []
    asked: set[str] = set()
    for text in texts:
        try:
            question = read_question(text)
        except Rejected as error:
            found.append(error)
            continue
        key = _key(question)
        found.append(Rejected(Reason.DUPLICATE, f"asked before: {question[:80]!r}") if key in asked else question)
        asked.add(key)
    return found


def majority_of(answers: Sequence[str | None]) -> Majority:
    """Return what most answers say, case, punctuation and articles aside; None or empty ones agree with nothing."""
    keys = [_key(answer) if answer else "" for answer in answers]
    counts = Counter(key for key in keys if key).most_common(2)
    if not counts:
        return Majority(None, 0.0, is_tied=False)
    (winner, number), *others = counts
    wordings = Counter(answer.strip() for answer, key in zip(answers, keys, strict=True) if answer and key == winner)
    is_tied = bool(others) and others[0][1] == number
    return Majority(wordings.most_common(1)[0][0], number / len(answers), is_tied)


def check_majority(found: Majority, majority: float, max_share: float = 1.0, section: str = "questions") -> None:
    """Raise Rejected unless one answer, and no other, has at least `majority` and at most `max_share` of all.

    `section` of the configuration holds both.
    """
    if found.answer is None or found.is_tied or found.share < majority:
        best = "no answer" if found.answer is None else f"{found.share:.0%} say {found.answer[:60]!r}"
        tied = ", as many as say something else" if found.is_tied else ""
        raise Rejected(Reason.NO_MAJORITY, f"{best}{tied}; {section}.majority={majority:g}")
    if found.share > max_share:
        raise Rejected(
            Reason.TOO_EASY, f"{found.share:.0%} say {found.answer[:60]!r}; {section}.max_share={max_share:g}"
        )


def _key(text: str) -> str:
    """Return what two texts of one meaning have in common, "" without a word; one of articles alone stays as it is."""
    return (normalise(text) or text.strip().lower()) if re.search(r"\w", text) else ""
