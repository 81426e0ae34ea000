"""Multiple choice: the choices and the right one as a benchmark gives them, and the one that a response chooses."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from stic_ray.core.json_stream import literal
from stic_ray.method.media import is_null
from stic_ray.method.scoring import has_words, normalise

Choice = str | int | float | None

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CLOSED = r"""[\s"'()\[\]{}<>.:,;!]*"""
_NARROW = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)}
"""From the letters and signs of Chinese and Japanese text, which are as wide as their characters, to ASCII."""
_ENGLISH_WORDS = "AI"
"""Letters that stand in English sentences, too."""
_MARKUP = re.compile(
    r"</\w+>|<\w\w+>|[*`$\"“”]|__|\\(?:text|textbf|mathrm|mathbf)\b|(?<!\w)'(?=\w'(?!\w))|(?<=(?<!\w)\w)'(?!\w)"
)


def read_choices(given: Any) -> list[Choice]:
    """Return the choices of a benchmark's row; None keeps the place of one that is null, as in tables of four columns.

    They are given as a list, as an object by letter ({"A": ...} or {"label": [...], "text": [...]}), or as the text
    of either in JSON or Python. Raises ValueError saying what else they are.
    """
    value = literal(given) if isinstance(given, str) else given
    if isinstance(value, list) and value and all(isinstance(each, tuple) for each in value):  # a map of Arrow
        value = dict(value)
    if isinstance(value, Mapping) and {"label", "text"} <= value.keys():
        value = dict(zip(value["label"], value["text"], strict=False))
    if isinstance(value, Mapping):
        by_letter = {str(key).strip().upper(): each for key, each in value.items()}
        if "".join(sorted(by_letter)) != LETTERS[: len(by_letter)]:
            raise ValueError(f"'choices' has the keys {', '.join(map(str, value))}; write a list, or keys A, B, ...")
        value = [by_letter[letter] for letter in sorted(by_letter)]
    if is_null(value):
        return []
    if not isinstance(value, list | tuple):
        raise ValueError(f"'choices' is {given!r:.80}; write a list")
    choices = [_plain(each) for each in value]
    if not shown(choices):
        return []
    with_letters = zip(LETTERS, choices, strict=False)
    texts = [re.fullmatch(rf"[(\[]?{letter}[)\].:]\s+(\S.*)", str(each), re.DOTALL) for letter, each in with_letters]
    found: list[Choice] = [match[1] for match in texts if match]
    return found if len(found) == len(choices) else choices  # the letters are ours to show


def shown(choices: Sequence[Choice]) -> list[str]:
    """Return the texts of the choices that there are."""
    return [str(choice) for choice in choices if choice is not None]


def choice_lines(choices: Sequence[str]) -> str:
    """Return the choices as "A. red" lines."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def letter_of(answer: str | float, choices: Sequence[Choice]) -> str | None:
    """Return the letter, among the choices that there are, of a right answer; None when it is none of them.

    A number is a place from 0. A text is the text of a choice, a letter ("B", "(b)", "B. red") or a place ("1").
    Raises ValueError where it means one choice as this and another as that.
    """
    meanings: dict[str, int] = {}
    if isinstance(answer, str):
        meanings = _meanings(answer.strip(), choices)
    else:
        if answer in range(len(choices)):
            meanings["as place from 0"] = int(answer)
        if answer in choices and not any(isinstance(choice, str) for choice in choices):
            meanings["as value"] = choices.index(answer)
    places = {place for place in meanings.values() if choices[place] is not None}
    if len(places) > 1:
        ways = ", ".join(f"{choices[place]!r} {how}" for how, place in meanings.items())
        raise ValueError(f"the answer {answer!r} can mean {ways}; write the letter, or choices without such texts")
    if not places:
        return None
    place = places.pop()
    return LETTERS[sum(choice is not None for choice in choices[:place])]


def read_choice(response: str, choices: Sequence[str]) -> str:
    """Return the letter that a response chooses, or "" when it chooses none or several.

    Markup aside ("**B**", "$B$"), taken in this order: a letter in a LaTeX box, a letter alone or with punctuation at
    the start ("B", "(b).", "[B] red"), the letter that "is correct", one behind "answer", "option" or "choose" (also
    "option b"), one on a line of its own, the text of exactly one choice. "A red ball" is no choice of A, and "Not A,
    but B" none at all, as in the extraction of VLMEvalKit: only one letter may be named.
    """
    letters = LETTERS[: len(choices)]
    text = _MARKUP.sub("", response.translate(_NARROW)).strip()
    boxed = re.findall(rf"\\(?:boxed|fbox)\s*\{{(?:\\\w+\s*\{{)?{_CLOSED}([{letters}]){_CLOSED}\}}", response)
    start = _start(text, letters)
    if boxed or start is not None:
        return boxed[0] if len(set(boxed)) == 1 else start or ""
    correct = re.findall(
        rf"(?<![\w'-])[(\[]?([{letters}])[)\]]?\s+(?:is|would\s+be|must\s+be)\s+(?:the\s+)?(?:best\s+|most\s+\w+\s+)?"
        r"(?:correct|right|true|answer|choice|option|best)\b",
        text,
    )
    alone = re.findall(rf"^{_CLOSED}([{letters}]){_CLOSED}$", text, re.MULTILINE)
    for found in (correct, _named(text, letters), alone):
        if len(set(found)) == 1:
            return str(found[0])
    words, texts = normalise(text), dict(zip(letters, map(normalise, choices), strict=True))
    exact = [letter for letter, choice in texts.items() if choice == words]
    inside = exact or [letter for letter, choice in texts.items() if has_words(words, choice)]
    return inside[0] if len(inside) == 1 else ""


def _start(text: str, letters: str) -> str | None:
    """Return the letter that a response begins with, "" when another follows, None when it begins with none."""
    start = re.match(rf"[(\[{{<]*([{letters}{letters.lower()}])(?:[)\]}}>.:,;!。、]+|\s*(?:\n|$)|\s+[-–—]\s)", text)
    if start is None or re.match(r"\s*is(?:n't|\s+(?:not|wrong|incorrect|false))\b", text[start.end() :]):
        return None
    if len(set(re.findall(rf"^[(\[]?([{letters}])[)\].:]", text, re.MULTILINE))) > 1:  # the choices, repeated
        return None
    another = rf"\s*(?:,|;|/|&|and|or)?\s*(?:\(?[{letters}]\b(?!\s+\w)|\([{letters.lower()}]\))"
    return "" if re.match(another, text[start.end() :]) else start[1].upper()


def _named(text: str, letters: str) -> list[str]:
    """Return the letters that stand behind a word which announces one, and is not denied itself."""
    found = []
    for match in re.finditer(
        rf"(?i:(?<!\bnot\s)\b(answer|option|choice|letter|choose|pick|select|go\s+with|correct(?=\s*:))"
        rf"(?:\s+to\s+(?:the|this|your)\s+\w+)?(?:\s+(?:is|would\s+be|must\s+be))?"
        rf"\s*[:=–-]?\s*(?:(option|choice|letter)\s+)?[(\[{{<]*([{letters}])(?![\w'-]))",
        text,
    ):
        word, letter, rest = (match[2] or match[1]).lower(), match[3], text[match.end() :]
        if letter in _ENGLISH_WORDS.lower():  # a word unless the sentence ends
            is_letter = re.match(r"\s*(?:[)\].,:;!]|$)", rest)
        elif letter in _ENGLISH_WORDS and word not in ("option", "choice", "letter"):
            is_letter = not re.match(r"\s+(?!is\b|because\b|since\b|as\b|and\b|or\b)[a-z]", rest)
        else:
            is_letter = True
        if is_letter:
            found.append(letter.upper())
    return found + re.findall(rf"(?i:\bit(?:'s|\s+is))\s+[(\[]?([{letters}])[)\]]?\s*(?:[.,;!]|$)", text)


def _meanings(answer: str, choices: Sequence[Choice]) -> dict[str, int]:
    """Return which choice a text means, by the way in which it does. Raises ValueError for one that stands twice."""
    texts = [None if choice is None else str(choice).strip() for choice in choices]
    equal = [i for i, text in enumerate(texts) if text == answer]
    equal = equal or [i for i, text in enumerate(texts) if text is not None and _folded(text) == _folded(answer)]
    if len(equal) > 1:
        raise ValueError(f"the answer {answer!r} stands more than once among the choices; write the letter")
    meanings = {"as text": equal[0]} if equal else {}
    letter = re.fullmatch(r"[(\[]?([A-Za-z])(?:[)\].:]+(?:\s+(?P<text>\S.*))?)?", answer)
    place = LETTERS.index(letter[1].upper()) if letter else len(choices)
    if letter and place < len(choices) and letter["text"] in (None, texts[place]):
        meanings["as letter"] = place
    if re.fullmatch(r"[0-9]{1,2}(\.0)?", answer) and float(answer) < len(choices):
        meanings["as place from 0"] = int(float(answer))
    return meanings


def _plain(value: Any) -> Choice:
    """Return a choice or answer as text or number, whole floats as integers. Raises ValueError for anything else."""
    if is_null(value) or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"a choice is {value!r:.60}, neither text nor number")
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _folded(text: str) -> str:
    return " ".join(re.sub(r"[^\w\s%-]", " ", text.casefold()).split())
