"""Reading benchmarks; their format is described in docs/evaluation.md."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import pyarrow as pa

from stic_ray.core.errors import Rejected, SourceError, nearest, one_line, type_and_message
from stic_ray.core.json_stream import literal
from stic_ray.core.storage import Location
from stic_ray.method.choices import LETTERS, Choice, letter_of, read_choices, shown
from stic_ray.method.media import check_placeholders, is_absent, is_null, without_placeholder
from stic_ray.method.scoring import METRICS, phrases_of, read_yes_no
from stic_ray.stages.records import Row, image_place, load_records, plain_text, read_rows, row_id
from stic_ray.stages.shards import ShardTask

_LISTS = ("choices", "answers", "metrics", "vocabulary")
_QUESTIONS = pa.schema(
    [(name, pa.string()) for name in ("benchmark", "id", "path", "column", "question")]
    + [("row", pa.int64())]
    + [(name, pa.list_(pa.string())) for name in _LISTS]
)
_FIELDS = ("id", "question", "answer", "answers", "choices", "metric", "vocabulary")
_MISNAMED = {
    re.compile(r"A|(?i:(.*[\W_])?(options?|choices?|candidates)([\W_].*)?)"): ("choices",),
    re.compile(r"(?i)labels?|targets?|answer_?(key|index)|gold|ground_?truth|gt"): ("answer", "answers"),
    re.compile(r"(?i)vocab"): ("vocabulary",),
}
"""Names that other benchmarks have for a field."""
_ENDINGS = re.compile(r"(\.(jsonl?|ndjson|parquet|gz|gzip|bz2|zst))+$", re.IGNORECASE)


def read_benchmarks(uris: Sequence[str]) -> list[dict[str, Any]]:
    """Return the questions of all benchmarks. Raises SourceError when two have the same name."""
    questions: list[dict[str, Any]] = []
    for uri in uris:
        found = read_benchmark(uri)
        if any(question["benchmark"] == found[0]["benchmark"] for question in questions):
            raise SourceError(f"evaluation.benchmarks: two files are called '{found[0]['benchmark']}'; rename one.")
        questions += found
    return questions


def read_benchmark(uri: str) -> list[dict[str, Any]]:
    """Return the questions of a benchmark file, checked and in one form.

    Raises SourceError naming the row and the field at fault.
    """
    source, rows = read_rows(uri, "evaluation.benchmarks")
    questions = [_question(row, source) for row in rows]
    given = {question["id"] for question in questions}
    for number, question in enumerate(questions):
        if question["id"] is None:
            question["id"] = str(number) if str(number) not in given else f"row {number}"
    [(name, times)] = Counter(question["id"] for question in questions).most_common(1)
    if times > 1:
        raise SourceError(f"evaluation.benchmarks: '{uri}' uses the id '{name}' more than once.")
    return questions


def load_questions(task: ShardTask, max_bytes: int) -> pa.Table:
    """Return the questions of a shard with their images of at most `max_bytes`."""
    return load_records(task.payload["rows"], _QUESTIONS, max_bytes)


def _question(row: Row, source: Location) -> dict[str, Any]:
    try:
        if row.value is None:
            raise ValueError(f"cannot be read: {row.problem}. A benchmark is a list of rows, each a JSON object.")
        return _checked(row.value, source)
    except Rejected as why:
        problem = why.message
    except Exception as error:  # whatever a stranger's row makes Python raise
        problem = str(error) if type(error) is ValueError else type_and_message(error)
    raise SourceError(f"evaluation.benchmarks: '{source.uri}', {row.place}: {one_line(problem)}")


def _checked(row: Mapping[str, Any], source: Location) -> dict[str, Any]:
    """Return a question in one form. Raises ValueError and Rejected, saying what is wrong with it."""
    for name in (name for name, value in row.items() if name not in _FIELDS and not is_absent(value)):
        alike = get_close_matches(name.lower(), _FIELDS[1:], n=1, cutoff=0.8)
        fields = next((fields for names, fields in _MISNAMED.items() if names.fullmatch(name)), alike)
        if fields and all(is_null(row.get(field)) for field in fields):
            raise ValueError(f"it has '{name}', but no '{fields[0]}'; name the field '{fields[0]}'.")
    choices = read_choices(row.get("choices"))
    metrics = _list_of(row.get("metric")) or ["multiple_choice" if choices else "exact_match"]
    answers = _answers(row, metrics)
    if problem := _problem(row, choices, answers, metrics):
        raise ValueError(problem)
    place = image_place(row, _FIELDS, source, source.folder)
    check_placeholders([row["question"], *shown(choices)], has_image=place["path"] is not None)
    return {
        "benchmark": _ENDINGS.sub("", source.name),
        "id": row_id(row.get("id")),
        **place,
        "question": without_placeholder(row["question"]).strip(),
        "choices": shown(choices) or None,
        "answers": [letter_of(answer, choices) if choices else plain_text(answer) for answer in answers],
        "metrics": list(dict.fromkeys(metrics)),
        "vocabulary": _list_of(row.get("vocabulary")) if METRICS[metrics[0]].is_open else None,
    }


def _answers(row: Mapping[str, Any], metrics: list[Any]) -> list[Any]:
    """Return the accepted answers as they are given: a value, a list, its text, or VQA's list of objects."""
    given = row.get("answers")
    if isinstance(given, str) and isinstance(spelled := literal(given), list):
        given = spelled
    answers = [each.get("answer") if isinstance(each, Mapping) else each for each in _list_of(given)]
    answers = answers or _list_of(row.get("answer"))
    return [("no", "yes")[each] if isinstance(each, bool) and metrics == ["yes_no"] else each for each in answers]


def _list_of(value: Any) -> list[Any]:
    """Return one value or several as a list, without nulls."""
    return [each for each in (value if isinstance(value, list | tuple) else [value]) if not is_null(each)]


def _problem(row: Mapping[str, Any], choices: list[Choice], answers: list[Any], metrics: list[Any]) -> str | None:
    """Say what is wrong with a row, if anything is."""
    question = row.get("question")
    if not isinstance(question, str) or not without_placeholder(question).strip():
        return "no 'question'."
    unknown = [metric for metric in metrics if not isinstance(metric, str) or metric not in METRICS]
    if unknown:
        return f"unknown metric '{unknown[0]}'.{nearest(str(unknown[0]), METRICS)} Valid: {', '.join(METRICS)}."
    are_open = [metric for metric in metrics if METRICS[metric].is_open]
    are_plain = all(isinstance(answer, str | int | float) and not isinstance(answer, bool) for answer in answers)
    if not are_plain or not (answers or (are_open and row.get("answers") is not None)):
        return "neither 'answer' nor 'answers' with text or numbers."
    if not all(answer.strip() for answer in answers if isinstance(answer, str)):
        return "the answer is an empty text."
    if are_open and len(are_open) < len(metrics):
        closed = next(metric for metric in metrics if metric not in are_open)
        return f"the metrics '{are_open[0]}' and '{closed}' need different prompts; make two rows of them."
    if any((metric == "multiple_choice") != bool(choices) for metric in metrics):
        return "'choices' and the metric multiple_choice go together."
    if are_open:
        return _problem_of_objects(_list_of(row.get("vocabulary")), answers, are_open[0])
    return _problem_of_answers(choices, answers, metrics)


def _problem_of_answers(choices: list[Choice], answers: list[Any], metrics: list[str]) -> str | None:
    """Say which answer no response could give."""
    num_choices = len(shown(choices))
    if choices and not 2 <= num_choices <= len(LETTERS):
        return f"{num_choices} choices; from 2 to {len(LETTERS)} can be asked."
    for answer in answers:
        if choices and letter_of(answer, choices) is None:
            return f"the answer {answer!r} is none of the {num_choices} choices, as letter, number or text."
        if "yes_no" in metrics and read_yes_no(str(answer)) != str(answer).strip(" .!").casefold():
            return f"the answer {answer!r} is neither 'yes' nor 'no', as the metric yes_no asks."
    return None


def _problem_of_objects(vocabulary: list[Any], answers: list[Any], metric: str) -> str | None:
    """Say what is wrong with a vocabulary, or with the objects that are there by it."""
    if not vocabulary or any(not isinstance(entry, str) or not all(phrases_of(entry)) for entry in vocabulary):
        return f"the metric {metric} needs 'vocabulary': a list of phrases, synonyms apart by '|', none of them empty."
    times = Counter(phrase for entry in vocabulary for phrase in {each.casefold() for each in phrases_of(entry)})
    phrase, number = times.most_common(1)[0]
    if number > 1:
        return f"'{phrase}' stands in more than one entry of 'vocabulary'; keep one of them."
    names = [phrases_of(entry)[0] for entry in vocabulary]
    for answer in answers:
        if answer not in names:
            alike = nearest(str(answer), names)
            return f"the answer {answer!r} is no name in 'vocabulary'.{alike} A name stands before the first '|'."
    return None
