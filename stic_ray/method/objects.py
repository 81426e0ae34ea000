"""The objects that a response names, compared with those that are there (CHAIR, Rohrbach et al. 2018).

A vocabulary lists what counts as an object: an entry is its name, with synonyms behind "|" ("couch|sofa").
"""

import re
from collections.abc import Sequence
from functools import lru_cache


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
