"""Reading the answer out of a response, and scoring it.

Objects that a response names are compared with those that are there (CHAIR, Rohrbach et al. 2018). A vocabulary lists
what counts as an object: an entry is its name, with synonyms behind "|" ("couch|sofa").
"""

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

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
    predicted = normalise(prediction)
    if not predicted:  # nothing but articles and punctuation: compare what was written
        return float(prediction.strip().lower() in {answer.strip().lower() for answer in answers})
    return float(predicted in {normalise(answer) for answer in answers})


def contains(prediction: str, answers: Sequence[str]) -> float:
    """1 when an accepted answer stands in the response as whole words."""
    return float(any(has_words(normalise(prediction), normalise(answer)) for answer in answers))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy (Antol et al. 2015): a prediction is right when three of the annotators gave it.

    Averaged over leaving each annotator out in turn; with fewer than four answers it must be one of them. Both sides
    are normalised as the evaluation page of visualqa.org describes it.
    """
    predicted, given = _vqa_text(prediction), [_vqa_text(answer) for answer in answers]
    if len(given) < 4:
        return float(predicted in given)
    num_equal = given.count(predicted)
    return sum(min(1.0, (num_equal - (answer == predicted)) / 3) for answer in given) / len(given)


def relaxed_number(prediction: str, answers: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy: numbers may be off by 5%, other answers must match exactly."""
    predicted = _number(prediction)
    for answer in answers:
        expected = _number(answer)
        if predicted is not None and expected is not None and abs(predicted - expected) <= 0.05 * abs(expected):
            return 1.0
    return exact_match(prediction, answers)


def read_yes_no(response: str) -> str:
    """Return the first word of a response that is "yes" or "no", or "" when there is none."""
    found = re.search(r"(?<!\w)(?<!\w-)(?:yes|no)(?!\w|-\w)", response.casefold())
    return found[0] if found else ""


def yes_no(prediction: str, answers: Sequence[str]) -> float:
    """1 when the first "yes" or "no" is the answer (POPE, Li et al. 2023)."""
    return float(read_yes_no(prediction) in {read_yes_no(answer) for answer in answers} - {""})


def phrases_of(entry: str) -> list[str]:
    """Return the phrases of a vocabulary's entry, the object's name first."""
    return [phrase.strip() for phrase in entry.split("|")]


def named_objects(response: str, vocabulary: Sequence[str]) -> list[str]:
    """Return the names of the objects that a response mentions, each once, in the order of their mention.

    A mention is a phrase of the vocabulary in singular or plural as whole words. Of two phrases at one place the
    longer holds, so that a "hot dog" is no dog where the vocabulary knows both. "There is no dog" mentions one.
    """
    mention, names = _finder(tuple(vocabulary))
    found = (names[_spaced(match[0])] for match in mention.finditer(response.casefold()))
    return list(dict.fromkeys(found))


def object_f1(response: str, answers: Sequence[str], vocabulary: Sequence[str]) -> float:
    """F1 between the objects named and those that are there; 1 where there are none and none is named."""
    named, present = set(named_objects(response, vocabulary)), set(answers)
    return 2 * len(named & present) / (len(named) + len(present)) if named or present else 1.0


def hallucinated_share(response: str, answers: Sequence[str], vocabulary: Sequence[str]) -> float:
    """Share of the named objects that are not there (CHAIR_i of one description); 0 where none is named."""
    named = set(named_objects(response, vocabulary))
    return len(named - set(answers)) / len(named) if named else 0.0


def any_hallucination(response: str, answers: Sequence[str], vocabulary: Sequence[str]) -> float:
    """1 when at least one named object is not there (CHAIR_s)."""
    return float(hallucinated_share(response, answers, vocabulary) > 0)


@dataclass(frozen=True)
class Metric:
    """How a response is scored, and how the question is asked."""

    function: Callable[..., float]
    """0 to 1, of prediction and answers, and of the vocabulary when it is open."""
    is_open: bool = False
    """Asks for a text, in which the objects of a vocabulary are looked for."""
    higher_is_better: bool = True

    def read(self, response: str, vocabulary: Sequence[str]) -> str:
        """Return the prediction that a response holds."""
        if self.is_open:
            return ", ".join(named_objects(response, vocabulary))
        return read_yes_no(response) if self.function is yes_no else response

    def score(self, prediction: str, answers: Sequence[str], vocabulary: Sequence[str]) -> float:
        """Return the score of a prediction, 0 to 1."""
        return self.function(prediction, answers, vocabulary) if self.is_open else self.function(prediction, answers)


METRICS: dict[str, Metric] = {
    "multiple_choice": Metric(multiple_choice),
    "exact_match": Metric(exact_match),
    "contains": Metric(contains),
    "vqa_accuracy": Metric(vqa_accuracy),
    "relaxed_number": Metric(relaxed_number),
    "yes_no": Metric(yes_no),
    "object_f1": Metric(object_f1, is_open=True),
    "hallucinated_share": Metric(hallucinated_share, is_open=True, higher_is_better=False),
    "any_hallucination": Metric(any_hallucination, is_open=True, higher_is_better=False),
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


@lru_cache(maxsize=64)
def _finder(vocabulary: tuple[str, ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """Return an expression for every form of every phrase, and the object's name by form."""
    entries = [(phrases_of(entry)[0], [_spaced(each.casefold()) for each in phrases_of(entry)]) for entry in vocabulary]
    names = {phrase: name for name, phrases in entries for phrase in phrases}
    for name, phrases in entries:
        for plural in (plural for phrase in phrases for plural in _plurals(phrase)):
            names.setdefault(plural, name)  # what the vocabulary itself says goes before a plural that we make
    # No groups, for speed. A hyphen may stand for a space, but "dog-friendly" and "sheep-dog" name no dog.
    forms = (re.escape(form).replace(r"\ ", r"[\s-]+") for form in sorted(names, key=len, reverse=True))
    return re.compile(rf"(?<!\w)(?<!\w-)(?:{'|'.join(forms)})(?!\w|-\w)"), names


def _spaced(phrase: str) -> str:
    return " ".join(re.split(r"[\s-]+", phrase))


def _plurals(phrase: str) -> list[str]:
    # Not "es" behind everything: "cares" is no plural of "car".
    return [f"{phrase}s", f"{phrase}es"] if phrase.endswith(("s", "x", "z", "ch", "sh", "o")) else [f"{phrase}s"]
