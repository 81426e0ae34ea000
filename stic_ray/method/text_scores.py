"""What a text says of itself, and how far texts agree: scores of answers that need no model."""

import re
from collections import Counter
from collections.abc import Sequence

from stic_ray.method.scoring import normalise

Ngrams = Counter[tuple[str, ...]]


def word_ngrams(text: str, size: int) -> Ngrams:
    """Return how often each run of `size` words occurs, case, punctuation and articles aside.

    A text of fewer words is one run of all that it has.
    """
    words = normalise(text).split()
    if len(words) < size:
        return Counter([tuple(words)] if words else [])
    return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))


def ngram_f1(first: Ngrams, second: Ngrams) -> float:
    """Return F1 between the runs of words of two texts, repeated ones counted; 1 where neither has any."""
    total = first.total() + second.total()
    return 2 * (first & second).total() / total if total else 1.0


def agreement(texts: Sequence[str], size: int) -> list[float | None]:
    """Return each text's mean similarity to the others, by runs of `size` words: the negative Bayes risk.

    The text with the highest value is the minimum-Bayes-risk choice (SIcog, arXiv 2503.12303). None without others.
    """
    runs = [word_ngrams(text, size) for text in texts]
    return mean_to_others([[ngram_f1(own, other) for other in runs] for own in runs])


def mean_to_others(similarities: Sequence[Sequence[float]]) -> list[float | None]:
    """Return the mean of each row of a square matrix without its diagonal; None for a matrix of one."""
    num_others = len(similarities) - 1
    return [
        sum(value for place, value in enumerate(row) if place != own) / num_others if num_others else None
        for own, row in enumerate(similarities)
    ]


def num_words(text: str) -> int:
    """Return the number of words between spaces."""
    return len(text.split())


def repeated_share(text: str, size: int) -> float:
    """Return which share of the runs of `size` words were there before; 0 in a text of fewer words."""
    runs = word_ngrams(text, size)
    return 1 - len(runs) / runs.total() if runs else 0.0


def num_matches(text: str, pattern: re.Pattern[str]) -> int:
    """Return how often a pattern occurs in a text."""
    return sum(1 for _ in pattern.finditer(text))


def sentences(text: str) -> list[str]:
    """Return the sentences of a text: cut behind ".", "!" and "?" before a space, and at the ends of lines."""
    return [part for part in (part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", text)) if part]
