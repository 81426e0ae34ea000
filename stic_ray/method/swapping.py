"""An answer with two of its words exchanged: dispreferred text without a request (ViLTA, Structure-CLIP).

Those papers parse sentences into objects and attributes. Here no parser and no lexicon is asked, so any language with
words between spaces will do: words that follow the same word ("a red ... a blue") mostly are of the same sort.
"""

import random
import re
from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

from stic_ray.core.errors import Rejected
from stic_ray.core.schemas import Reason

_LIST_WORDS = frozenset(["a", "an", "and", "or", "the"])
"""Words between two others make these a list, where order says nothing."""
_OTHERS = """
about above across after against all along also among another any are around as at be because been before behind
below beneath beside besides between both but by can could did do does each either else every few for from had
has have he her here his how i if in inside into is it its many may might more most much near next no not of off
on one's only onto other our out outside over own per she should since so some such than that their them then
there these they this those through to too toward towards under until up upon very was we were what when where
which while who whose will with within without would you your
"""
_SMALL_WORDS = _LIST_WORDS.union(_OTHERS.split())
_WORD = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*")
_BEGINS_SENTENCE = re.compile(r"(?:^|[.!?:;\n])[^\w\n]*$")


class _Word(NamedTuple):
    """A word that something is said with, and its place in the text."""

    text: str
    start: int
    end: int
    number: int
    before: str
    """The word in front of it, in lower case; empty where something else than a space is between."""


def swap_words(text: str, generator: random.Random) -> str:
    """Return the text with two of its content words exchanged, of the same sort where there are such.

    First words of sentences stay, as do neighbours and what "and" or "or" alone joins to a list. Raises Rejected where
    nothing can be exchanged.
    """
    matches = [*_WORD.finditer(text)]
    words = [*_content_words(text, matches)]
    pairs = [
        (first, second)
        for first, second in combinations(words, 2)
        if first.text.casefold() != second.text.casefold()
        and not _LIST_WORDS.issuperset(m[0].casefold() for m in matches[first.number + 1 : second.number])
    ]
    alike = [(first, second) for first, second in pairs if first.before and first.before == second.before]
    if not pairs:
        raise Rejected(Reason.IDENTICAL_ANSWERS, f"no two words to exchange in {text.strip()[:80]!r}")
    first, second = generator.choice(alike or pairs)
    return "".join((text[: first.start], second.text, text[first.end : second.start], first.text, text[second.end :]))


def _content_words(text: str, matches: list[re.Match[str]]) -> Iterator[_Word]:
    """Yield the words of a text that are no small words, and begin no sentence: their capital would give them away."""
    for number, match in enumerate(matches):
        if match[0].casefold() in _SMALL_WORDS or _BEGINS_SENTENCE.search(
            text, max(0, match.start() - 9), match.start()
        ):
            continue
        previous = matches[number - 1] if number else None
        joined = previous is not None and text[previous.end() : match.start()].isspace()
        yield _Word(match[0], *match.span(), number, previous[0].casefold() if previous and joined else "")
