"""Stage `candidates`: several answers of each image, the same ones whatever happens on the way."""

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from stic_ray.core.config import CandidatesConfig, RunConfig
from stic_ray.core.errors import ConfigError, Rejected, SourceError
from stic_ray.core.overrides import apply_values, build_config
from stic_ray.core.randomness import seed_for
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import CANDIDATES as TABLE
from stic_ray.core.schemas import PAIRS
from stic_ray.core.steps import Step, StepRun
from stic_ray.engines.base import Request
from stic_ray.estimate.steps import estimate_run
from stic_ray.method.candidates import candidate_prompts, usable
from stic_ray.method.preferences import AnswerText
from stic_ray.method.prompts import load_prompts
from stic_ray.pipeline import run_pipeline
from stic_ray.stages.candidates import CANDIDATES, Answerer
from stic_ray.stages.pool import POOL
from stic_ray.stages.preferences import PREFERENCES
from stic_ray.toyworld import WEIGHTS
from tests.stages.builders import draw_pictures, fake_config, rejected_of

STEPS = (Step(POOL), Step(CANDIDATES, inputs={"index": "pool"}), Step(PREFERENCES, inputs={"index": "pool"}))
SCRIPT = """
rules:
  - {prompt: Work through, answer: 'answer {seed} of {size}'}
  - {prompt: '.', answer: 'plain {seed}'}
default: 'other {seed}'
"""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("drawn") / "pictures", 10)


def config_of(folder: Path, pictures: Path, script: str = SCRIPT, **settings: Any) -> RunConfig:
    folder.mkdir(exist_ok=True)
    return fake_config(folder, pictures, script, candidates={"num_candidates": 4, **settings})


def answered(config: RunConfig, folder: Path, *names: str) -> RunDir:
    run = RunDir.of(str(folder))
    run_pipeline(config, STEPS, run, names or ("pool", "candidates"), {"recipe": "test", "overrides": []})
    return run


@pytest.fixture(scope="module")
def made(ray_session: None, tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> RunDir:
    folder = tmp_path_factory.mktemp("made")
    config = config_of(folder, pictures, prompts=["step_by_step", "plain"])
    return answered(config, folder / "run", "pool", "candidates", "preferences")


def rows_of(run: RunDir) -> list[dict[str, Any]]:
    return (run / "candidates").read_table("candidates", TABLE).to_pylist()


def test_every_image_has_its_answers_to_the_parts_of_the_prompt_set_in_turn(made: RunDir) -> None:
    manifest, prompts = (made / "candidates").manifest, load_prompts(None)
    by_image = defaultdict(list)
    for row in rows_of(made):
        by_image[row["image_id"]].append(row)
    assert manifest and manifest["num_rows_written"] == len(by_image) == 10 and manifest["num_candidates"] == 40
    for rows in by_image.values():
        assert [row["number"] for row in rows] == [0, 1, 2, 3]
        assert {row["prompt"] for row in rows[::2]} == {*prompts.step_by_step}
        assert len({row["prompt"] for row in rows[1::2]}) == 1 and rows[1]["prompt"] in prompts.plain
        assert len({row["text"] for row in rows}) == 4, "each is drawn with a seed of its own"


def test_the_answers_are_filed_under_the_prompt_of_the_images_preference_pair(made: RunDir) -> None:
    pairs = (made / "preferences").read_table("pairs", PAIRS, ["image_id", "prompt"]).to_pylist()
    expected = {pair["image_id"]: pair["prompt"][0]["content"] for pair in pairs}
    assert {row["image_id"]: row["filed_under"] for row in rows_of(made)} == expected


@pytest.mark.usefixtures("ray_session")
def test_shards_that_are_there_stay_and_others_are_made_as_they_were(
    made: RunDir, tmp_path: Path, pictures: Path
) -> None:
    run = answered(config_of(tmp_path, pictures, prompts=["step_by_step", "plain"]), tmp_path / "run")
    folder = Path((run / "candidates").location.path)
    first, *others = sorted(folder.glob("candidates-*.parquet"))
    before = first.stat().st_mtime_ns
    for file in [
        *others,
        folder / "manifest.json",
        *[each for each in folder.glob("shard-*") if "000000" not in each.name],
    ]:
        file.unlink()
    answered(config_of(tmp_path, pictures, prompts=["step_by_step", "plain"]), tmp_path / "run")
    assert others and first.stat().st_mtime_ns == before
    assert [{**row, "model": ""} for row in rows_of(run)] == [{**row, "model": ""} for row in rows_of(made)]


@pytest.mark.usefixtures("ray_session")
def test_an_image_that_kills_its_actor_costs_itself_alone(made: RunDir, tmp_path: Path, pictures: Path) -> None:
    shutil.copytree(pictures, tmp_path / "pictures")
    Image.new("RGB", (31, 33), "red").save(tmp_path / "pictures" / "deadly.png")
    script = f"{SCRIPT}\nfaults: [{{size: 31x33, happens: kill}}]"
    config = config_of(tmp_path, tmp_path / "pictures", script, prompts=["step_by_step", "plain"])
    config = apply_values(config, {"actors.max_retries": 1})
    run = answered(config, tmp_path / "run")
    changes = {"model": "", "model_revision": "", "position": 0}  # the deadly one stands between them
    found, expected = ([{**row, **changes} for row in rows_of(each)] for each in (run, made))
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert [(Path(row["path"]).name, row["reason"]) for row in rejected_of(run, "candidates")] == [
        ("deadly.png", "engine_failed")
    ]


def test_answers_of_a_model_are_those_of_separate_requests(pictures: Path, tiny_llava: Path) -> None:
    """Whatever shares a batch with them, and what is read once for several."""
    settings = {"num_candidates": 4, "prompts": ["plain", "step_by_step"], "temperature": 2, "max_new_tokens": 32}
    config = build_config({"name": "test", "model": {"path": str(tiny_llava)}, "candidates": settings})
    fetched = {"fetch_reason": None, "fetch_error": None}
    rows = [
        {"image_id": path.stem, "position": number, "path": path.name, "encoded": path.read_bytes(), **fetched}
        for number, path in enumerate(sorted(pictures.glob("*.jpg"))[:3])
    ]
    worker = Answerer(config, load_prompts(None), None)
    prepared = [worker.prepare(row) for row in rows]
    together = [[answer.text for answer in answers] for answers in worker.answer(prepared)]
    for each, texts in zip(prepared, together, strict=True):
        asked = [
            Request(prompt, each.picture, seed_for(config.seed, each.row["image_id"], f"candidate {number}"))
            for number, prompt in enumerate(each.prompts)
        ]
        assert texts == [worker.engine.generate([request], worker.sampling)[0].text for request in asked]
        assert len(set(texts)) > 1


@pytest.mark.usefixtures("ray_session")
def test_an_image_without_two_answers_is_rejected(tmp_path: Path, pictures: Path) -> None:
    config = config_of(tmp_path, pictures, "default: '{seed} two three'", max_new_tokens=2)
    with pytest.raises(SourceError, match="Not one of 10 images has candidates: {'truncated_answer': 10}"):
        answered(config, tmp_path / "run")
    messages = {row["message"] for row in rejected_of(RunDir.of(str(tmp_path / "run")), "candidates")}
    assert messages == {
        "0 of 4 answers can be used: 0 are empty, 4 were cut off at candidates.max_new_tokens=2",
    }


def test_answers_that_say_nothing_are_dropped() -> None:
    settings = CandidatesConfig(max_new_tokens=9)
    good, empty, cut = AnswerText("A.", 1, "stop"), AnswerText(" ", 1, "stop"), AnswerText("A", 9, "length")
    assert usable([good, empty, good, cut], settings) == [0, 2]
    assert usable([good, cut], CandidatesConfig(allow_truncated=True)) == [0, 1]
    with pytest.raises(Rejected, match="1 of 3 answers can be used: 2 are empty, 0 were cut off"):
        usable([empty, good, empty], settings)


def test_prompts_are_of_the_seed_and_the_image() -> None:
    prompts, settings = load_prompts(None), CandidatesConfig(num_candidates=3, prompts=("hallucination", "plain"))
    drawn = {candidate_prompts(str(image), 0, settings, prompts)[0] for image in range(100)}
    assert drawn == {*prompts.hallucination}
    assert candidate_prompts("a", 0, settings, prompts) == candidate_prompts("a", 0, settings, prompts)
    first, second, third = candidate_prompts("a", 0, settings, prompts)
    assert first == third and second in prompts.plain


def test_greedy_answers_to_one_prompt_are_refused(tmp_path: Path, pictures: Path) -> None:
    def check(**settings: Any) -> None:
        CANDIDATES.check(StepRun("candidates", config_of(tmp_path, pictures, **settings), RunDir.of(str(tmp_path))))

    with pytest.raises(ConfigError, match="temperature=0 gives equal answers .* and 4 candidates share 1 prompts"):
        check(temperature=0)
    check(temperature=0, num_candidates=2, prompts=["plain", "step_by_step"])


def test_the_estimate_counts_every_answer(tmp_path: Path, pictures: Path) -> None:
    toy = {"estimate.num_images": 100, "model.engine": "transformers", "model.path": str(WEIGHTS)}
    config = apply_values(config_of(tmp_path, pictures), toy)
    (found,) = estimate_run(config, STEPS, None, ["candidates"])
    (pairs,) = estimate_run(config, STEPS, None, ["preferences"])
    assert (found.num_images, pairs.num_images) == (100, 100)
    assert (found.num_tokens or 0) > 1.5 * (pairs.num_tokens or 0) > 0, "four answers, and the prompt once"
