"""Reading the answer out of a response, and scoring it."""

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from stic_ray.method.objects import any_hallucination, hallucinated_share, named_objects, object_f1

_ARTICLES = ("a", "an", "the")
_UP_TO_TEN = "zero one two three four five six seven eight nine ten"
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_UP_TO_TEN.split())}
_NEGATED = "ai are ca could did does do had has have is might must need ought sha should was were wo would"
_SHORTENED = """
i'm i've you'd you'll you're you've he'd he's she's it'd it'll we've they'd they'll they're they've that's there'd
there're there's what'll what're what's what've where'd where's when's who'd who'll who's who've why's how'd how'll
how's somebody's someone's something's could've might've must've should've would've ma'am o'clock y'all
"""
_CONTRACTIONS = {f"{verb}nt": f"{verb}n't" for verb in _NEGATED.split()} | {
    word.replace("'", ""): word for word in _SHORTENED.split()
}
"""Contractions by what is left without the apostrophe, but for those that are another word then ("well", "its")."""


def multiple_choice(prediction: str, answers: Sequence[str]) -> float:
    """1 when the chosen letter is an accepted one."""
    return float(prediction.upper() in {answer.strip().upper() for answer in answers})


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 when the response equals an accepted answer, case, punctuation and articles aside."""
    said = normalise(prediction)
    if not said:  # nothing but articles and punctuation: compare what was written
        return float(prediction.strip().lower() in {answer.strip().lower() for answer in answers})
    return float(said in {normalise(answer) for answer in answers})


def contains(prediction: str, answers: Sequence[str]) -> float:
    """1 when an accepted answer stands in the response as whole words."""
    return float(any(has_words(normalise(prediction), normalise(answer)) for answer in answers))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy (Antol et al. 2015): a prediction is right when three of the annotators gave it.

    Averaged over leaving each annotator out in turn; with fewer than four answers it must be one of them. Both sides
    are normalised as the evaluation page of visualqa.org describes it.
    """
    said, given = _vqa_text(prediction), [_vqa_text(answer) for answer in answers]
    if len(given) < 4:
        return float(said in given)
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


def normalise(text: str) -> str:
    """Return a text in lower case and Unicode's NFC, without punctuation, articles, and the commas of thousands."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", unicodedata.normalize("NFC", text).lower())
    words = re.sub(r"[^\w\s.%-]|\.(?!\d)", " ", text).split()
    return " ".join(word for word in words if word not in _ARTICLES)


def has_words(text: str, part: str) -> bool:
    """Say whether a text has another in it as whole words."""
    return bool(part) and f" {part} " in f" {text} "


def _vqa_text(text: str) -> str:
    """Return an answer as VQA compares it; one of nothing but articles and punctuation stays as it is."""
    text = text.lower().strip()
    plain = re.sub(r"(?<=\d),(?=\d)|\.(?!\d)", "", text)
    words = re.sub(r"[^\w\s.':]|_", " ", plain).split()
    words = [_NUMBERS.get(word, _CONTRACTIONS.get(word, word)) for word in words if word not in _ARTICLES]
    return " ".join(words) or text


def _number(text: str) -> float | None:
    cleaned = text.strip().rstrip(".%").replace(",", "").lstrip("$")
    try:
        number = float(cleaned)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
