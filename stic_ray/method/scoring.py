"""Reading the answer out of a response, and scoring it."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from stic_ray.method.objects import any_hallucination, hallucinated_share, named_objects, object_f1

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
MAX_CHOICES = len(_LETTERS)


def choice_lines(choices: Sequence[str]) -> str:
    """Return the choices as "A. red" lines."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False))


def read_choice(response: str, choices: Sequence[str]) -> str:
    """Return the letter that a response chooses, or "" when it chooses none or several.

    Taken in this order: a letter alone or with punctuation at the start ("B", "(b).", "B: red"), a letter behind
    the word "answer" or "option", the text of exactly one choice. "A red ball" is no choice of A.
    """
    letters = _LETTERS[: len(choices)]
    text = response.strip()
    start = re.match(rf"\(?([{letters}{letters.lower()}])(?:[).:,]|\s*$)", text)
    if start:
        another = re.match(rf"\s*(?:,|;|/|&|and|or)?\s*\(?[{letters}]\b(?!\s+\w)", text[start.end() :])
        return "" if another else start[1].upper()
    named = re.findall(rf"(?i:\b(?:answer|option|choice)(?:\s+is)?)\s*:?\s*\(?([{letters}])\b", text)
    if named and len(set(named)) == 1:
        return str(named[0])
    said = _normalise(text)
    exact = [letter for letter, choice in zip(letters, choices, strict=True) if _normalise(choice) == said]
    inside = exact or [
        letter for letter, choice in zip(letters, choices, strict=True) if _contains(said, _normalise(choice))
    ]
    return inside[0] if len(inside) == 1 else ""


def letter_of(answer: str | float, choices: Sequence[str]) -> str | None:
    """Return the letter of a right answer given as the text of a choice, as letter, or as number from 0."""
    letters = _LETTERS[: len(choices)]
    if str(answer) in choices:
        return letters[list(choices).index(str(answer))]
    if isinstance(answer, int | float):
        return letters[int(answer)] if answer in range(len(choices)) else None
    letter = answer.strip().upper()
    return letter if len(letter) == 1 and letter in letters else None


def multiple_choice(prediction: str, answers: Sequence[str]) -> float:
    """1 when the chosen letter is an accepted one."""
    return float(prediction.upper() in {answer.strip().upper() for answer in answers})


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 when the response equals an accepted answer, case, punctuation and articles aside."""
    said = _normalise(prediction)
    if not said:  # nothing but articles and punctuation: compare what was written
        return float(prediction.strip().lower() in {answer.strip().lower() for answer in answers})
    return float(said in {_normalise(answer) for answer in answers})


def contains(prediction: str, answers: Sequence[str]) -> float:
    """1 when an accepted answer stands in the response as whole words."""
    return float(any(_contains(_normalise(prediction), _normalise(answer)) for answer in answers))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy (Antol et al. 2015): a prediction is right when three of the annotators gave it.

    Averaged over leaving each annotator out in turn, as the official scorer does; with fewer than four answers
    it is an exact match.
    """
    given = [_normalise(answer) for answer in answers]
    if len(given) < 4:
        return exact_match(prediction, answers)
    said = _normalise(prediction)
    num_equal = given.count(said)
    return sum(min(1.0, (num_equal - (answer == said)) / 3) for answer in given) / len(given)


def relaxed_number(prediction: str, answers: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy: numbers may be off by 5%, other answers must match exactly."""
    said = _number(prediction)
    for answer in answers:
        expected = _number(answer)
        if said is not None and expected is not None and abs(said - expected) <= 0.05 * abs(expected):
            return 1.0
    return exact_match(prediction, answers)


def read_yes_no(response: str) -> str:
    """Return the first word of a response that is "yes" or "no", or "" when there is none."""
    found = re.search(r"(?<!\w)(?<!\w-)(?:yes|no)(?!\w|-\w)", response.casefold())
    return found[0] if found else ""


def yes_no(prediction: str, answers: Sequence[str]) -> float:
    """1 when the first "yes" or "no" is the answer (POPE, Li et al. 2023)."""
    return float(read_yes_no(prediction) in {read_yes_no(answer) for answer in answers} - {""})


@dataclass(frozen=True)
class Metric:
    """How a response is scored, and how the question is asked."""

    score: Callable[[str, Sequence[str], Sequence[str]], float]
    """0 to 1, of (prediction, answers, vocabulary)."""
    read: Callable[[str, Sequence[str]], str] = lambda response, vocabulary: response
    """Reads the prediction out of (response, vocabulary)."""
    higher_is_better: bool = True
    is_open: bool = False
    """Asks for a text, in which the objects of a vocabulary are looked for."""


def _closed(score: Callable[[str, Sequence[str]], float]) -> Metric:
    return Metric(lambda prediction, answers, _: score(prediction, answers))


def _of_objects(score: Callable[[str, Sequence[str], Sequence[str]], float], *, higher_is_better: bool) -> Metric:
    def read(response: str, vocabulary: Sequence[str]) -> str:
        return ", ".join(named_objects(response, vocabulary))

    return Metric(score, read, higher_is_better, is_open=True)


METRICS: dict[str, Metric] = {
    "multiple_choice": _closed(multiple_choice),
    "exact_match": _closed(exact_match),
    "contains": _closed(contains),
    "vqa_accuracy": _closed(vqa_accuracy),
    "relaxed_number": _closed(relaxed_number),
    "yes_no": replace(_closed(yes_no), read=lambda response, _: read_yes_no(response)),
    "object_f1": _of_objects(object_f1, higher_is_better=True),
    "hallucinated_share": _of_objects(hallucinated_share, higher_is_better=False),
    "any_hallucination": _of_objects(any_hallucination, higher_is_better=False),
}
"""The metrics that a benchmark row may name."""


def _normalise(text: str) -> str:
    words = re.sub(r"[^\w\s.%-]|\.(?!\d)", " ", text.lower()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _contains(text: str, part: str) -> bool:
    return bool(part) and f" {part} " in f" {text} "


def _number(text: str) -> float | None:
    cleaned = text.strip().rstrip(".%").replace(",", "").lstrip("$")
    try:
        number = float(cleaned)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
