"""The toy world as files (pictures, instruction data, benchmarks), and as what a configuration calls `toyworld`.

Every function that writes a folder writes the whole folder or none, does nothing where the folder exists, and gives
the same bytes for the same arguments. Scenes of different uses come from index ranges that cannot meet.
"""

import io
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial, wraps
from itertools import chain, count, islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec

import pyarrow as pa
import pyarrow.parquet as pq

from stic_ray.core.config import TOYWORLD, PoolConfig, RunConfig, is_toy
from stic_ray.core.errors import ConfigError, SourceError, nearest
from stic_ray.core.overrides import apply_values
from stic_ray.core.rundir import RunDir
from stic_ray.toyworld import WEIGHTS, language
from stic_ray.toyworld.language import PROMPTS, PROMPTS_FILE, brief, caption_of, name_of
from stic_ray.toyworld.scenes import COMPANIONS, KIND_WEIGHTS, WILD_NOISE, Scene, draw_scene, random_for, sample_scene

# Pretraining takes its scenes from 0 on.
POOL_FIRST_INDEX = 1_000_000_000
INSTRUCTIONS_FIRST_INDEX = 2_000_000_000
BENCHMARKS_FIRST_INDEX = {"test": 3_000_000_000, "tuning": 4_000_000_000}
MAX_NUM_SCENES = 1_000_000_000

BENCHMARKS: tuple[str, ...] = ("toy_describe", "toy_step_by_step", "toy_questions") + tuple(
    f"toy_pope_{distractor}" for distractor in language.DISTRACTORS
)
"""The benchmarks by name; the file is the name with `.jsonl`."""

_BENCHMARK_SEED = 0  # the same questions whatever the seed of the run, or seeds could not be compared
_JPEG_QUALITY = 90
_CAPTION_ENDING = "txt"
_PER_TASK = 2000  # pictures that a process draws at a time; one Parquet file each


_Given = ParamSpec("_Given")


def _whole_folder(fill: Callable[Concatenate[Path, _Given], None]) -> Callable[Concatenate[Path, _Given], None]:
    """Have a function fill a folder of another name, which becomes the one asked for at the end."""

    @wraps(fill)
    def write(directory: Path, *args: _Given.args, **settings: _Given.kwargs) -> None:
        if directory.exists():
            return
        unfinished = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}")
        unfinished.mkdir(parents=True)
        try:
            fill(unfinished, *args, **settings)
            os.replace(unfinished, directory)
        except OSError:
            if not directory.exists():  # if it does, another process was faster, with the same files
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    return write


@_whole_folder
def write_pool(
    directory: Path,
    *,
    seed: int,
    num_pictures: int,
    form: Literal["jpeg", "parquet"] = "jpeg",
    captions: bool = False,
    num_processes: int = 1,
) -> None:
    """Write unlabeled pictures as JPEG files, 1,000 to a folder, or as Parquet files with a column `image`.

    With `captions` there is `caption_of` each, in a .txt beside the file or in a column `caption`.
    """
    _check_number("num_pictures", num_pictures)
    starts = range(0, num_pictures, _PER_TASK)
    tasks = [range(start, min(start + _PER_TASK, num_pictures)) for start in starts]
    draw = partial(_draw_files if form == "jpeg" else _draw_table, directory, seed, captions)
    if num_processes == 1 or len(tasks) <= 1:
        list(map(draw, tasks))
        return
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as processes:
        list(processes.map(draw, tasks))


@_whole_folder
def write_instructions(directory: Path, *, seed: int, num_rows: int) -> None:
    """Write `instructions.json` in LLaVA's format, one to three questions a row, beside its `images/`."""
    _check_number("num_rows", num_rows)
    rows = []
    for number in range(num_rows):
        scene, image = sample_scene(seed, INSTRUCTIONS_FIRST_INDEX + number), f"images/{_file_name(number)}"
        _save(scene, directory / image)
        rows.append({"id": f"toy_instruction_{number:06d}", "image": image, "conversations": _conversation(scene)})
    (directory / "instructions.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


@_whole_folder
def write_benchmarks(directory: Path, *, num_scenes: int, split: Literal["test", "tuning"]) -> None:
    """Write every benchmark with `num_scenes` questions each (docs/evaluation.md), beside their `images/`."""
    _check_number("num_scenes", num_scenes)
    all_scenes = (sample_scene(_BENCHMARK_SEED, index) for index in count(BENCHMARKS_FIRST_INDEX[split]))
    every = list(islice(all_scenes, num_scenes))
    tempting = list(islice(filter(_has_absent_companion, chain(every, all_scenes)), num_scenes))
    rows = {
        "toy_describe": [_describe_row(scene, PROMPTS["plain"], number) for number, scene in enumerate(every)],
        "toy_step_by_step": [_describe_row(s, PROMPTS["step_by_step"], number) for number, s in enumerate(every)],
        "toy_questions": [_question_row(scene, number) for number, scene in enumerate(every)],
    }
    for distractor in language.DISTRACTORS:
        scenes = tempting if distractor == "adversarial" else every
        rows[f"toy_pope_{distractor}"] = [_pope_row(s, distractor, n) for n, s in enumerate(scenes)]
    for scene in {scene.index: scene for scene in [*every, *tempting]}.values():
        _save(scene, directory / _image_of(scene))
    for name in BENCHMARKS:
        text = "".join(json.dumps(row) + "\n" for row in rows[name])
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _check_number(name: str, number: int) -> None:
    if not 0 <= number <= MAX_NUM_SCENES:
        raise ValueError(f"{name} is {number}; it must be between 0 and {MAX_NUM_SCENES}")


def _draw_files(directory: Path, seed: int, captions: bool, numbers: range) -> None:
    for number in numbers:
        path = directory / f"{number // 1000:06d}" / _file_name(number)
        scene = sample_scene(seed, POOL_FIRST_INDEX + number)
        _save(scene, path)
        if captions:
            path.with_suffix(f".{_CAPTION_ENDING}").write_text(f"{caption_of(scene)}\n", encoding="utf-8")


def _draw_table(directory: Path, seed: int, captions: bool, numbers: range) -> None:
    scenes = [sample_scene(seed, POOL_FIRST_INDEX + number) for number in numbers]
    images = [
        {"bytes": _encoded(scene), "path": _file_name(number)} for scene, number in zip(scenes, numbers, strict=True)
    ]
    columns = {"image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))}
    if captions:
        columns["caption"] = pa.array(map(caption_of, scenes), pa.string())
    pq.write_table(pa.table(columns), directory / f"pictures-{numbers.start // _PER_TASK:06d}.parquet")


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
    for kind in generator.sample(language.QUESTION_KINDS, generator.randint(1, 3)):
        question = language.ask(scene, kind, generator)
        mark = "" if turns else "<image>\n"
        turns.append({"from": "human", "value": mark + brief(question.text)})
        turns.append({"from": "gpt", "value": question.answers[0]})
    return turns


def _describe_row(scene: Scene, requests: Sequence[str], number: int) -> dict[str, Any]:
    return {
        **_place(scene, number),
        "question": requests[number % len(requests)],
        "answers": [name_of(item.kind) for item in scene.objects],
        "vocabulary": [name_of(kind) for kind in KIND_WEIGHTS],
        "metric": ["object_f1", "hallucinated_share", "any_hallucination"],
    }


def _question_row(scene: Scene, number: int) -> dict[str, Any]:
    asked: list[language.QuestionKind] = [
        kind for kind in language.QUESTION_KINDS if kind != "is_there"
    ]  # POPE asks that
    question = language.ask(scene, asked[number % len(asked)], random_for(scene.seed, scene.index, "question"))
    return _asked(question, scene, number, "exact_match")


def _pope_row(scene: Scene, distractor: language.Distractor, number: int) -> dict[str, Any]:
    """Ask in turn about what is there and what is not, so that always saying the same is worth one half."""
    generator = random_for(scene.seed, scene.index, f"pope {distractor}")
    present = generator.choice(scene.objects).kind
    question = language.ask_presence(
        present if number % 2 else language.absent_kind(scene, distractor, generator), scene
    )
    return _asked(question, scene, number, "yes_no")


def _asked(question: language.Question, scene: Scene, number: int, metric: str) -> dict[str, Any]:
    answers = list(question.answers)
    return {**_place(scene, number), "question": question.text, "answers": answers, "metric": metric}


def _has_absent_companion(scene: Scene) -> bool:
    return any(COMPANIONS[kind] not in scene.kinds for kind in scene.kinds & COMPANIONS.keys())


def _place(scene: Scene, number: int) -> dict[str, str]:
    return {"id": f"{number:06d}", "image": _image_of(scene)}


def _image_of(scene: Scene) -> str:
    return f"images/{scene.index}.jpg"


def _file_name(number: int) -> str:
    return f"{number:06d}.jpg"


def resolve_toyworld(config: RunConfig, run: RunDir) -> RunConfig:
    """Return the configuration with the places of the toy world's files instead of its name.

    Raises ConfigError for a benchmark, and for a place of captions, that the toy world does not have.
    """
    places = {field: f"{run.uri}/{TOYWORLD}/{name}" for field, (name, _) in _folders(config).items()}
    changes: dict[str, Any] = {}
    if config.model.path == TOYWORLD:
        changes = {"model.path": str(WEIGHTS), "prompts": config.prompts or str(PROMPTS_FILE)}
    if is_toy(config.pool.source):
        _check_captions(config.pool)
        changes["pool.source"] = places["pool.source"]
    if is_toy(config.infusion.source):
        changes["infusion.source"] = f"{places['infusion.source']}/instructions.json"
    benchmarks = [_benchmark_files(given, places["evaluation.benchmarks"]) for given in config.evaluation.benchmarks]
    return apply_values(config, {**changes, "evaluation.benchmarks": [*chain(*benchmarks)]})


def _check_captions(pool: PoolConfig) -> None:
    if pool.caption_column is not None or pool.caption_member not in (None, _CAPTION_ENDING):
        name = "caption_member" if pool.caption_column is None else "caption_column"
        raise ConfigError(
            f"pool.{name}={getattr(pool, name)}: the toy world writes captions in files beside its pictures. Set "
            f"pool.caption_member={_CAPTION_ENDING} alone, or none for pictures without."
        )


def make_toyworld(fields: Collection[str], config: RunConfig, run: RunDir) -> None:
    """Make what these fields of the configuration take from the toy world: pictures, instruction data, benchmarks.

    Raises SourceError when it would have to be made in a run directory that is not local.
    """
    for field, (name, write) in _folders(config).items():
        if field in fields and any(map(is_toy, config.sources(field))):
            if not run.location.is_local:
                raise SourceError(f"The toy world's files need a local --run, not '{run.uri}'; set {field} instead.")
            write(Path(run.uri) / TOYWORLD / name)


def _folders(config: RunConfig) -> dict[str, tuple[str, Callable[[Path], None]]]:
    """Return by field the name of its folder, which says what it is made with, and the function that makes it."""
    toy, seed, num_processes = config.toyworld, config.seed, os.cpu_count() or 1
    num_pictures, num_rows, num_scenes = toy.num_pictures, toy.num_instructions, toy.num_scenes
    captions = config.pool.has_captions
    pool = partial(write_pool, seed=seed, num_pictures=num_pictures, captions=captions, num_processes=num_processes)
    instructions = partial(write_instructions, seed=seed, num_rows=num_rows)
    benchmarks = partial(write_benchmarks, num_scenes=num_scenes, split=toy.split)
    return {
        "pool.source": (f"pictures-seed{seed}-{num_pictures}{'-captions' if captions else ''}", pool),
        "infusion.source": (f"instructions-seed{seed}-{num_rows}", instructions),
        "evaluation.benchmarks": (f"benchmarks-{toy.split}-{num_scenes}", benchmarks),
    }


def _benchmark_files(given: str, folder: str) -> list[str]:
    """Return the files that a benchmark of the configuration stands for."""
    if not is_toy(given):
        return [given]
    name = given.partition(":")[2]
    if name and name not in BENCHMARKS:
        raise ConfigError(
            f"evaluation.benchmarks: no '{given}'.{nearest(name, BENCHMARKS)} Valid: {', '.join(BENCHMARKS)}."
        )
    return [f"{folder}/{each}.jsonl" for each in BENCHMARKS if name in ("", each)]
