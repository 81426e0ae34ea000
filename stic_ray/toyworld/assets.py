"""Everything the demo reads, as files: pictures, instruction data, benchmarks and a tiny model."""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stic_ray.toyworld.language import (
    DESCRIPTION_REQUESTS,
    QUESTION_KINDS,
    SHORT_ANSWER_HINT,
    QuestionKind,
    ask_choice,
    ask_short,
    describe,
)
from stic_ray.toyworld.model import build_tiny_llava
from stic_ray.toyworld.scenes import Scene, draw_scene, sample_scene

# Scenes of different uses come from index ranges that cannot meet.
POOL_FIRST_INDEX = 1_000_000_000
INSTRUCTIONS_FIRST_INDEX = 2_000_000_000
BENCHMARKS_FIRST_INDEX = 3_000_000_000
MAX_NUM_SCENES = 1_000_000_000

_JPEG_QUALITY = 90


def write_assets(directory: Path, *, seed: int, num_pictures: int, num_instructions: int, num_questions: int) -> None:
    """Write the toy world into ``directory``, or do nothing if it exists: it is complete or absent.

    Below ``directory``: ``pictures/`` holds the unlabeled pool; ``instructions/instructions.json`` is
    instruction data in LLaVA's format, beside its ``images/``; ``benchmarks/`` has ``toy_choice.jsonl`` and
    ``toy_short.jsonl`` of ``num_questions`` rows each, beside their ``images/``; ``model/`` is a tiny model.
    The same arguments give the same bytes.

    Raises:
        ValueError: if a number is negative or larger than ``MAX_NUM_SCENES``.
        OSError: if the files cannot be written; nothing is left behind then.
    """
    numbers = {
        "num_pictures": num_pictures,
        "num_instructions": num_instructions,
        "num_questions": num_questions,
    }
    for name, number in numbers.items():
        if not 0 <= number <= MAX_NUM_SCENES:
            raise ValueError(f"{name} is {number}; it must be between 0 and {MAX_NUM_SCENES}")
    if directory.exists():
        return
    unfinished = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    try:
        _write_pictures(unfinished / "pictures", _scenes(seed, POOL_FIRST_INDEX, num_pictures))
        _write_instructions(unfinished / "instructions", seed, num_instructions)
        _write_benchmarks(unfinished / "benchmarks", seed, num_questions)
        build_tiny_llava(unfinished / "model", seed)
        _publish(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _publish(unfinished: Path, directory: Path) -> None:
    try:
        os.replace(unfinished, directory)
    except OSError:
        if not directory.exists():  # if it does, another process was faster, with the same files
            raise


def _scenes(seed: int, first_index: int, num_scenes: int) -> list[Scene]:
    return [sample_scene(seed, first_index + offset) for offset in range(num_scenes)]


def _write_pictures(directory: Path, scenes: Iterable[Scene]) -> None:
    directory.mkdir(parents=True)
    for number, scene in enumerate(scenes):
        draw_scene(scene).save(directory / _file_name(number), quality=_JPEG_QUALITY)


def _write_instructions(directory: Path, seed: int, num_rows: int) -> None:
    scenes = _scenes(seed, INSTRUCTIONS_FIRST_INDEX, num_rows)
    _write_pictures(directory / "images", scenes)
    rows = [
        {
            "id": f"toy_instruction_{number:06d}",
            "image": f"images/{_file_name(number)}",
            "conversations": _conversation(scene, number),
        }
        for number, scene in enumerate(scenes)
    ]
    (directory / "instructions.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _conversation(scene: Scene, number: int) -> list[dict[str, str]]:
    """In turn: a description, one question, a description and two questions."""
    first_kind = QUESTION_KINDS[number // 3 % len(QUESTION_KINDS)]
    second_kind = QUESTION_KINDS[(number // 3 + 1) % len(QUESTION_KINDS)]
    description = (DESCRIPTION_REQUESTS[number % len(DESCRIPTION_REQUESTS)], describe(scene))
    exchanges = (
        [description],
        [_exchange(scene, first_kind)],
        [description, _exchange(scene, first_kind), _exchange(scene, second_kind)],
    )[number % 3]
    turns: list[dict[str, str]] = []
    for request, answer in exchanges:
        image_mark = "" if turns else "<image>\n"
        turns.append({"from": "human", "value": image_mark + request})
        turns.append({"from": "gpt", "value": answer})
    return turns


def _exchange(scene: Scene, kind: QuestionKind) -> tuple[str, str]:
    question = ask_short(scene, kind)
    return f"{question.text} {SHORT_ANSWER_HINT}", question.answers[0]


def _write_benchmarks(directory: Path, seed: int, num_questions: int) -> None:
    scenes = _scenes(seed, BENCHMARKS_FIRST_INDEX, num_questions)
    _write_pictures(directory / "images", scenes)
    choice_rows = [_choice_row(number, scene) for number, scene in enumerate(scenes)]
    short_rows = [_short_row(number, scene) for number, scene in enumerate(scenes)]
    _write_json_lines(directory / "toy_choice.jsonl", choice_rows)
    _write_json_lines(directory / "toy_short.jsonl", short_rows)


def _choice_row(number: int, scene: Scene) -> dict[str, Any]:
    question = ask_choice(scene, QUESTION_KINDS[number % len(QUESTION_KINDS)])
    return {
        "id": f"toy_choice_{number:06d}",
        "image": f"images/{_file_name(number)}",
        "question": question.text,
        "choices": list(question.choices),
        "answer": "ABCD"[question.answer_index],
        "answers": None,
        "metric": "multiple_choice",
    }


def _short_row(number: int, scene: Scene) -> dict[str, Any]:
    question = ask_short(scene, QUESTION_KINDS[number % len(QUESTION_KINDS)])
    return {
        "id": f"toy_short_{number:06d}",
        "image": f"images/{_file_name(number)}",
        "question": question.text,
        "choices": None,
        "answer": None,
        "answers": list(question.answers),
        "metric": "exact_match",
    }


def _write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _file_name(number: int) -> str:
    return f"{number:06d}.jpg"
