"""Reading benchmarks; their format is described in docs/evaluation.md."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from stic_ray.core.errors import SourceError, nearest
from stic_ray.core.storage import Location
from stic_ray.method.objects import phrases_of
from stic_ray.method.scoring import MAX_CHOICES, METRICS, letter_of, read_yes_no
from stic_ray.stages.records import folder_of, image_place, load_records, read_records
from stic_ray.stages.shards import ShardTask

_TEXT = ("benchmark", "id", "path", "question")
_LISTS = ("choices", "answers", "metrics", "vocabulary")
_QUESTIONS = pa.schema(
    [(name, pa.string()) for name in _TEXT] + [("row", pa.int64())] + [(name, pa.list_(pa.string())) for name in _LISTS]
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
    metrics = _list_of(row.get("metric")) or ["multiple_choice" if choices else "exact_match"]
    place = image_place(row, source, folder_of(source))
    problem = _problem(row, choices, given, metrics) or place.pop("problem")
    if problem:
        raise SourceError(f"evaluation.benchmarks: '{source.uri}', row {number}: {problem}")
    return {
        "benchmark": source.name.rsplit(".", 1)[0],
        "id": str(row.get("id", number)),
        **place,
        "question": row["question"],
        "choices": choices or None,
        "answers": [letter_of(answer, choices) if choices else str(answer) for answer in given],
        "metrics": list(dict.fromkeys(metrics)),
        "vocabulary": _list_of(row.get("vocabulary")) if METRICS[metrics[0]].is_open else None,
    }


def _list_of(value: Any) -> list[Any]:
    """Return one value or several as a list; None is none."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def _problem(row: Mapping[str, Any], choices: list[str], answers: list[Any], metrics: list[Any]) -> str | None:
    """Say what is wrong with a row, if anything is."""
    question = row.get("question")
    if not isinstance(question, str) or not question.strip():
        return "no 'question'."
    unknown = [metric for metric in metrics if not isinstance(metric, str) or metric not in METRICS]
    if unknown:
        return f"unknown metric '{unknown[0]}'.{nearest(str(unknown[0]), METRICS)} Valid: {', '.join(METRICS)}."
    are_open = [metric for metric in metrics if METRICS[metric].is_open]
    if any(not isinstance(answer, str | int | float) or isinstance(answer, bool) for answer in answers) or (
        not answers and not (are_open and row.get("answers") is not None)
    ):
        return "neither 'answer' nor 'answers' with text or numbers."
    if are_open and len(are_open) < len(metrics):
        closed = next(metric for metric in metrics if metric not in are_open)
        return f"the metrics '{are_open[0]}' and '{closed}' need different prompts; make two rows of them."
    if any((metric == "multiple_choice") != bool(choices) for metric in metrics):
        return "'choices' and the metric multiple_choice go together."
    if are_open:
        return _problem_of_objects(_list_of(row.get("vocabulary")), answers, are_open[0])
    return _problem_of_answers(choices, answers, metrics)


def _problem_of_answers(choices: list[str], answers: list[Any], metrics: list[str]) -> str | None:
    """Say which answer no response could give."""
    if choices and not 2 <= len(choices) <= MAX_CHOICES:
        return f"{len(choices)} choices; from 2 to {MAX_CHOICES} can be asked."
    unknown = [answer for answer in answers if choices and letter_of(answer, choices) is None]
    if unknown:
        return f"the answer {unknown[0]!r} is none of the {len(choices)} choices, as letter, number or text."
    if "yes_no" in metrics:
        neither = [answer for answer in answers if read_yes_no(str(answer)) != str(answer).strip().casefold()]
        return f"the answer {neither[0]!r} is neither 'yes' nor 'no', as the metric yes_no asks." if neither else None
    return None


def _problem_of_objects(vocabulary: list[Any], answers: list[Any], metric: str) -> str | None:
    """Say what is wrong with a vocabulary, or with the objects that are there by it."""
    if not vocabulary or any(not isinstance(entry, str) or not all(phrases_of(entry)) for entry in vocabulary):
        return f"the metric {metric} needs 'vocabulary': a list of phrases, synonyms apart by '|', none of them empty."
    times = Counter(phrase for entry in vocabulary for phrase in {each.casefold() for each in phrases_of(entry)})
    repeated = [phrase for phrase, number in times.items() if number > 1]
    if repeated:
        return f"'{repeated[0]}' stands in more than one entry of 'vocabulary'; keep one of them."
    names = [phrases_of(entry)[0] for entry in vocabulary]
    unknown = [answer for answer in answers if answer not in names]
    return (
        f"the answer {unknown[0]!r} is no name in 'vocabulary'.{nearest(str(unknown[0]), names)} "
        "A name is what stands before the first '|'."
        if unknown
        else None
    )
