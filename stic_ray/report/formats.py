"""Values as words: how numbers, moments and untrusted text are put on the page."""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import yaml

UNKNOWN = "–"
"""Stands where the run holds no value; never a zero."""

_MINUS = "\u2212"
_INVISIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_LABELS = {
    "describe_and_respond": "describe and respond",
    "multiple_choice": "multiple choice",
    "exact_match": "exact match",
    "contains": "contains the answer",
    "vqa_accuracy": "VQA accuracy",
    "relaxed_number": "numbers within 5%",
    "yes_no": "yes or no",
    "object_f1": "object F1",
    "hallucinated_share": "hallucinated objects",
    "any_hallucination": "descriptions with a hallucination",
    "hallucination_prompt": "hallucination prompt",
    "corrupted_image": "corrupted image",
    "low_resolution": "low resolution",
    "colour_jitter": "colour jitter",
    "worse_candidate": "worse candidate",
    "random_candidate": "random candidate",
    "no_score": "no score",
    "gap_too_small": "gap too small",
    "below_threshold": "past a threshold",
    "not_in_top_share": "not in the top share",
    "no_majority": "no majority",
    "unbalanced_lengths": "unbalanced lengths",
    "identical_answers": "identical answers",
    "empty_answer": "empty answer",
    "truncated_answer": "cut off",
    "too_long": "too long to train on",
}
_MAX_LIST_ITEMS = 20


def visible(text: str) -> str:
    """Return text that any browser shows: control characters as "\\x07", what UTF-8 lacks as U+FFFD."""

    def named(match: re.Match[str]) -> str:
        code = ord(match[0])
        return f"\\x{code:02x}" if code < 0x100 else "\ufffd"

    return _INVISIBLE.sub(named, text.replace("\r\n", "\n").replace("\r", "\n"))


def shortened(text: str, max_characters: int) -> str:
    """Return at most `max_characters` of a text, and how many more there were."""
    rest = len(text) - max_characters
    return text if rest <= 0 else f"{text[:max_characters]}… [{rest:,} more characters]"


def label(word: str) -> str:
    """Return a table's word in plain English: "low_resolution" is "low resolution"."""
    return _LABELS.get(word, word)


def percent(share: float | None) -> str:
    """Return a share of 1 as a percentage without its sign: 0.625 is "62.5"."""
    return UNKNOWN if share is None else f"{100 * share:.1f}"


def points(difference: float | None) -> str:
    """Return a difference of shares in percentage points, always signed: 0.042 is "+4.2"."""
    return UNKNOWN if difference is None else signed(100 * difference, 1)


def signed(value: float, digits: int) -> str:
    """Return a number with its sign and so many decimals."""
    return f"{value:+.{digits}f}".replace("-", _MINUS)


def number(value: float | None) -> str:
    """Return a count in full with thousands apart, any other number in four significant digits."""
    if value is None:
        return UNKNOWN
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", _MINUS)
    text = f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("-", _MINUS)


def duration(seconds: float | None) -> str:
    """Return seconds as a person would say them: "0.42 s", "43.2 s", "4 min 03 s", "26 h 05 min"."""
    if seconds is None:
        return UNKNOWN
    if seconds < 1:
        return f"{seconds:.2g} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def moment(text: str | None) -> str:
    """Return an ISO date and time to the minute with its zone; what is no date is returned as it is."""
    if text is None:
        return UNKNOWN
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    return f"{when:%Y-%m-%d %H:%M} {when.tzname() or ''}".rstrip()


def fact(value: Any) -> str:
    """Return any value of a flat JSON object on one line."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {fact(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        more = len(value) - _MAX_LIST_ITEMS
        items = ", ".join(fact(item) for item in value[:_MAX_LIST_ITEMS])
        return f"{items} and {more:,} more" if more > 0 else items or "none"
    return UNKNOWN if value is None else str(value)


def yaml_text(value: Any) -> str:
    """Return nested plain data as YAML, keys in their own order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
