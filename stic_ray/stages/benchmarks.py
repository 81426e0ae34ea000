"""Reading benchmarks; their format is described in docs/evaluation.md."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from stic_ray.core.errors import SourceError, nearest
from stic_ray.core.storage import Location
from stic_ray.method.scoring import MAX_CHOICES, METRICS, letter_of
from stic_ray.stages.records import folder_of, image_place, load_records, read_records
from stic_ray.stages.shards import ShardTask

_TEXT = ("benchmark", "id", "path", "question", "metric")
_QUESTIONS = pa.schema(
    [(name, pa.string()) for name in _TEXT]
    + [("row", pa.int64()), ("choices", pa.list_(pa.string())), ("answers", pa.list_(pa.string()))]
)


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
    source, rows = read_records(uri, "evaluation.benchmarks")
    questions = [_question(number, row, source) for number, row in enumerate(rows)]
    repeated = [name for name, times in Counter(question["id"] for question in questions).items() if times > 1]
    if repeated:
        raise SourceError(f"evaluation.benchmarks: '{uri}' uses the id '{repeated[0]}' more than once.")
    return questions


def load_questions(task: ShardTask) -> pa.Table:
    """Return the questions of a shard with their images."""
    return load_records(task.payload["rows"], _QUESTIONS)


def _question(number: int, row: Mapping[str, Any], source: Location) -> dict[str, Any]:
    choices = [str(choice) for choice in _list_of(row.get("choices"))]
    given = _list_of(row.get("answers")) or _list_of(row.get("answer"))
    metric = row.get("metric") or ("multiple_choice" if choices else "exact_match")
    place = image_place(row, source, folder_of(source))
    problem = _problem(row.get("question"), choices, given, metric) or place.pop("problem")
    if problem:
        raise SourceError(f"evaluation.benchmarks: '{source.uri}', row {number}: {problem}")
    return {
        "benchmark": source.name.rsplit(".", 1)[0],
        "id": str(row.get("id", number)),
        **place,
        "question": row["question"],
        "choices": choices or None,
        "answers": [letter_of(answer, choices) if choices else str(answer) for answer in given],
        "metric": metric,
    }


def _list_of(value: Any) -> list[Any]:
    """Return one value or several as a list; None is none."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _problem(question: Any, choices: list[str], answers: Any, metric: Any) -> str | None:
    """Say what is wrong with a row, if anything is."""
    if not isinstance(question, str) or not question.strip():
        return "no 'question'."
    if not answers or any(not isinstance(answer, str | int | float) or isinstance(answer, bool) for answer in answers):
        return "neither 'answer' nor 'answers' with text or numbers."
    if not isinstance(metric, str) or metric not in METRICS:
        return f"unknown metric '{metric}'.{nearest(str(metric), METRICS)} Valid: {', '.join(METRICS)}."
    if (metric == "multiple_choice") != bool(choices):
        return "'choices' and the metric multiple_choice go together."
    if choices and not 2 <= len(choices) <= MAX_CHOICES:
        return f"{len(choices)} choices; from 2 to {MAX_CHOICES} can be asked."
    unknown = [answer for answer in answers if choices and letter_of(answer, choices) is None]
    return (
        f"the answer {unknown[0]!r} is none of the {len(choices)} choices, as letter, number or text."
        if unknown
        else None
    )
