"""The toy world as files: unlabeled pictures, instruction data and benchmarks.

Every function writes a whole folder or none, does nothing where the folder exists, and gives the same bytes for the
same arguments. Scenes of different uses come from index ranges that cannot meet.
"""

import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from stic_ray.toyworld.language import (
    DISTRACTORS,
    QUESTION_KINDS,
    Distractor,
    QuestionKind,
    absent_kind,
    ask,
    ask_presence,
    name_of,
)
from stic_ray.toyworld.model import PROMPTS, brief
from stic_ray.toyworld.scenes import COMPANIONS, KIND_WEIGHTS, WILD_NOISE, Scene, draw_scene, random_for, sample_scene

# Pretraining takes its scenes from 0 on.
POOL_FIRST_INDEX = 1_000_000_000
INSTRUCTIONS_FIRST_INDEX = 2_000_000_000
BENCHMARKS_FIRST_INDEX = {"test": 3_000_000_000, "tuning": 4_000_000_000}
MAX_NUM_SCENES = 1_000_000_000

BENCHMARKS: tuple[str, ...] = ("toy_describe", "toy_step_by_step", "toy_questions") + tuple(
    f"toy_pope_{distractor}" for distractor in DISTRACTORS
)
"""The benchmarks by name; the file is the name with `.jsonl`."""

_DESCRIPTION_METRICS = ["object_f1", "hallucinated_share", "any_hallucination"]
_VOCABULARY = [name_of(kind) for kind in KIND_WEIGHTS]
_BENCHMARK_SEED = 0  # the same questions whatever the seed of the run, or seeds could not be compared
_JPEG_QUALITY = 90
_PER_TASK = 2000  # pictures that a process draws at a time; one Parquet file each


def write_pool(
    directory: Path, *, seed: int, num_pictures: int, form: Literal["jpeg", "parquet"] = "jpeg", num_processes: int = 1
) -> None:
    """Write unlabeled pictures as JPEG files, 1,000 to a folder, or as Parquet files with a column `image`."""
    _check_number("num_pictures", num_pictures)
    draw = _draw_files if form == "jpeg" else _draw_table
    with _whole(directory) as unfinished:
        if unfinished is None:
            return
        starts = range(0, num_pictures, _PER_TASK)
        tasks = [(unfinished, seed, start, min(_PER_TASK, num_pictures - start)) for start in starts]
        if num_processes == 1 or len(tasks) <= 1:
            for task in tasks:
                draw(*task)
            return
        with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as processes:
            list(processes.map(draw, *zip(*tasks, strict=True)))


def write_instructions(directory: Path, *, seed: int, num_rows: int) -> None:
    """Write `instructions.json` in LLaVA's format, one to three questions a row, beside its `images/`."""
    _check_number("num_rows", num_rows)
    with _whole(directory) as unfinished:
        if unfinished is None:
            return
        rows = []
        for number in range(num_rows):
            scene = sample_scene(seed, INSTRUCTIONS_FIRST_INDEX + number)
            _save(scene, unfinished / "images" / _file_name(number))
            rows.append(
                {
                    "id": f"toy_instruction_{number:06d}",
                    "image": f"images/{_file_name(number)}",
                    "conversations": _conversation(scene),
                }
            )
        (unfinished / "instructions.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def write_benchmarks(directory: Path, *, num_scenes: int, split: Literal["test", "tuning"]) -> None:
    """Write every benchmark with `num_scenes` questions each (docs/evaluation.md), beside their `images/`."""
    _check_number("num_scenes", num_scenes)
    with _whole(directory) as unfinished:
        if unfinished is None:
            return
        first = BENCHMARKS_FIRST_INDEX[split]
        every = [sample_scene(_BENCHMARK_SEED, first + number) for number in range(num_scenes)]
        endless = (sample_scene(_BENCHMARK_SEED, first + number) for number in count())
        tempting = list(islice((scene for scene in endless if _has_absent_companion(scene)), num_scenes))
        rows = {
            "toy_describe": [_describe_row(scene, PROMPTS["plain"], number) for number, scene in enumerate(every)],
            "toy_step_by_step": [_describe_row(s, PROMPTS["step_by_step"], number) for number, s in enumerate(every)],
            "toy_questions": [_question_row(scene, number) for number, scene in enumerate(every)],
        }
        for distractor in DISTRACTORS:
            scenes = tempting if distractor == "adversarial" else every
            rows[f"toy_pope_{distractor}"] = [_pope_row(s, distractor, n) for n, s in enumerate(scenes)]
        for scene in {scene.index: scene for scene in [*every, *tempting]}.values():
            _save(scene, unfinished / _image_of(scene))
        for name in BENCHMARKS:
            text = "".join(json.dumps(row) + "\n" for row in rows[name])
            (unfinished / f"{name}.jsonl").write_text(text, encoding="utf-8")


@contextmanager
def _whole(directory: Path) -> Iterator[Path | None]:
    """Give a folder to fill, which becomes `directory` at the end; None where that is there already."""
    if directory.exists():
        yield None
        return
    unfinished = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        try:
            os.replace(unfinished, directory)
        except OSError:
            if not directory.exists():  # if it does, another process was faster, with the same files
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _check_number(name: str, number: int) -> None:
    if not 0 <= number <= MAX_NUM_SCENES:
        raise ValueError(f"{name} is {number}; it must be between 0 and {MAX_NUM_SCENES}")


def _draw_files(directory: Path, seed: int, start: int, number: int) -> None:
    for place in range(start, start + number):
        path = directory / f"{place // 1000:06d}" / _file_name(place)
        _save(sample_scene(seed, POOL_FIRST_INDEX + place), path)


def _draw_table(directory: Path, seed: int, start: int, number: int) -> None:
    images = [
        {"bytes": _encoded(sample_scene(seed, POOL_FIRST_INDEX + place)), "path": _file_name(place)}
        for place in range(start, start + number)
    ]
    column = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": column}), directory / f"pictures-{start // _PER_TASK:06d}.parquet")


def _save(scene: Scene, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(_encoded(scene))


def _encoded(scene: Scene) -> bytes:
    buffer = io.BytesIO()
    draw_scene(scene, max_noise=WILD_NOISE).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return buffer.getvalue()


def _conversation(scene: Scene) -> list[dict[str, str]]:
    generator = random_for(scene.seed, scene.index, "conversation")
    turns: list[dict[str, str]] = []
    for kind in generator.sample(QUESTION_KINDS, generator.randint(1, 3)):
        question = ask(scene, kind, generator)
        mark = "" if turns else "<image>\n"
        turns.append({"from": "human", "value": mark + brief(question.text)})
        turns.append({"from": "gpt", "value": question.answers[0]})
    return turns


def _describe_row(scene: Scene, requests: Sequence[str], number: int) -> dict[str, Any]:
    names = [name_of(item.kind) for item in scene.objects]
    return {
        **_place(scene, number),
        "question": requests[number % len(requests)],
        "answers": names,
        "vocabulary": _VOCABULARY,
        "metric": _DESCRIPTION_METRICS,
    }


def _question_row(scene: Scene, number: int) -> dict[str, Any]:
    asked: list[QuestionKind] = [kind for kind in QUESTION_KINDS if kind != "is_there"]  # POPE asks that
    question = ask(scene, asked[number % len(asked)], random_for(scene.seed, scene.index, "question"))
    row = {"question": question.text, "answers": list(question.answers), "metric": "exact_match"}
    return {**_place(scene, number), **row}


def _pope_row(scene: Scene, distractor: Distractor, number: int) -> dict[str, Any]:
    """In turn about what is there and what is not, so that saying always the same is worth one half."""
    generator = random_for(scene.seed, scene.index, f"pope {distractor}")
    present = generator.choice(scene.objects).kind
    question = ask_presence(present if number % 2 else absent_kind(scene, distractor, generator), scene)
    row = {"question": question.text, "answers": list(question.answers), "metric": "yes_no"}
    return {**_place(scene, number), **row}


def _has_absent_companion(scene: Scene) -> bool:
    return any(COMPANIONS[kind] not in scene.kinds for kind in scene.kinds & COMPANIONS.keys())


def _place(scene: Scene, number: int) -> dict[str, str]:
    return {"id": f"{number:06d}", "image": _image_of(scene)}


def _image_of(scene: Scene) -> str:
    return f"images/{scene.index}.jpg"


def _file_name(number: int) -> str:
    return f"{number:06d}.jpg"
