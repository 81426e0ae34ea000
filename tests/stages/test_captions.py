"""Stages `captions` and `corpus`: what models write of the pool, and what of it is trained on."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import SourceError
from stic_ray.core.overrides import apply_values
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import CAPTIONS, INDEX, INFUSED, PROVENANCE
from stic_ray.core.steps import Step
from stic_ray.estimate.steps import estimate_run
from stic_ray.method.prompts import load_prompts
from stic_ray.pipeline import run_pipeline
from stic_ray.stages.captions import CAPTIONS_STAGE
from stic_ray.stages.corpus import CORPUS_STAGE
from stic_ray.stages.pool import POOL
from tests.stages.builders import draw_pictures, fake_config, rejected_of

NUM, WITH_CAPTION = 10, 8
SCRIPT = """
rules:
  - {prompt: Work through, answer: 'new {seed}'}
  - {prompt: How many, answer: '3'}
  - {prompt: Which, answer: 'no number'}
default: 'other {seed}'
"""
SECOND = {"seed": 77, "captions.round": 2}
COUNTS = {"captions.kind": "specialist:counts", "captions.questions": ["How many are there?", "Which are there?"]}
STEPS = (
    Step(POOL),
    Step(CAPTIONS_STAGE, inputs={"index": "pool"}),
    Step(CAPTIONS_STAGE, "captions_2", {"index": "pool"}, SECOND),
    Step(
        CAPTIONS_STAGE, "counts", {"index": "pool"}, {**COUNTS, "captions.pattern": "[0-9]", "rounds.image_share": 1.0}
    ),
    Step(CORPUS_STAGE, inputs={"index": "pool", "captions:1": "captions"}),
    Step(CORPUS_STAGE, "corpus_2", {"index": "pool", "captions:1": "captions", "captions:2": "captions_2"}),
    Step(CORPUS_STAGE, "shuffled", {"index": "pool", "captions:1": "captions"}, {"corpus.shuffle": True}),
    Step(CORPUS_STAGE, "with_turns", {"index": "pool", "captions": "captions_2", "captions:counts": "counts"}),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, of which the first have captions beside them."""
    folder = draw_pictures(tmp_path_factory.mktemp("drawn") / "pictures", NUM)
    for number in range(WITH_CAPTION):
        (folder / f"{number:03d}.txt").write_text(f"old {number}")
    return folder


def config_of(folder: Path, pictures: Path, script: str = SCRIPT, **sections: dict[str, Any]) -> RunConfig:
    folder.mkdir(exist_ok=True, parents=True)
    pool = {"caption_member": "txt", "captions": "optional"}
    return fake_config(folder, pictures, script, pool=pool, rounds={"image_share": 0.7}, **sections)


def ran(config: RunConfig, folder: Path, *names: str) -> RunDir:
    run = RunDir.of(str(folder))
    run_pipeline(config, STEPS, run, names or [step.name for step in STEPS], {"recipe": "test", "overrides": []})
    return run


@pytest.fixture(scope="module")
def made(ray_session: None, tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> RunDir:
    folder = tmp_path_factory.mktemp("made")
    return ran(config_of(folder, pictures), folder / "run")


def captions_of(run: RunDir, step: str = "captions") -> list[dict[str, Any]]:
    return (run / step).read_table("captions", CAPTIONS).to_pylist()


def texts_of(run: RunDir, step: str) -> dict[str, str]:
    rows = (run / step).read_table("rows", INFUSED).to_pylist()
    return {row["id"]: row["messages"][1]["content"] for row in rows}


def test_each_round_writes_of_another_share_of_the_images_and_says_where_a_caption_is_from(made: RunDir) -> None:
    first, second = captions_of(made), captions_of(made, "captions_2")
    assert {row["round"] for row in first} == {1} and {row["round"] for row in second} == {2}
    drawn, later = ({row["image_id"] for row in rows} for rows in (first, second))
    assert 0 < len(drawn) == len(first) < NUM and drawn != later
    for row in (*first, *second):
        assert (
            row["kind"] == "self"
            and row["text"].startswith("new ")
            and row["prompt"] in load_prompts(None).step_by_step
        )
        assert row["model"] and row["model_revision"] and row["finish_reason"] == "stop"
    assert len({row["text"] for row in first}) == len(first), "each has a seed of its own"
    manifest = (made / "captions").manifest
    assert manifest and manifest["num_rows_in"] == manifest["num_rows_written"] == len(first)


def test_what_a_specialist_says_must_match_and_what_does_not_is_counted(made: RunDir) -> None:
    rows, manifest = captions_of(made, "counts"), (made / "counts").manifest
    assert {(row["kind"], row["prompt"], row["text"]) for row in rows} == {
        ("specialist:counts", "How many are there?", "3")
    }
    assert manifest and manifest["num_rows_in"] == 2 * NUM and manifest["rejected_by_reason"] == {"no_match": NUM}
    assert "captions.pattern='[0-9]' is not found in 'no number'" in rejected_of(made, "counts")[0]["message"]


def test_a_corpus_has_both_captions_side_by_side_and_counts_what_has_one_or_none(made: RunDir) -> None:
    own = {row["image_id"]: row["text"] for row in captions_of(made)}
    sources = (made / "corpus").read_table("provenance", PROVENANCE).to_pylist()
    manifest, texts = (made / "corpus").manifest, texts_of(made, "corpus")
    index = {row["image_id"]: row["caption"] for row in (made / "pool").read_table("index", INDEX).to_pylist()}
    for row in sources:
        image, old = row["image_id"], index[row["image_id"]]
        expected = {"both": f"{old} {own.get(image)}", "original": old, "recaption": own.get(image)}[row["source"]]
        assert texts[image] == expected and row["num_words"] == len(expected.split())
    counts = {name: sum(row["source"] == name for row in sources) for name in ("original", "recaption", "both")}
    num_without = sum(old is None and image not in own for image, old in index.items())
    assert manifest and manifest["num_by_source"] == counts and min(counts["original"], counts["both"]) > 0
    assert manifest["rejected_by_reason"] == ({"no_caption": num_without} if num_without else {})
    assert manifest["num_words_per_text"] == pytest.approx(sum(row["num_words"] for row in sources) / len(sources))


def test_rows_are_trained_under_the_plain_prompt_of_their_image(made: RunDir) -> None:
    for row in (made / "corpus").read_table("rows", INFUSED).to_pylist():
        assert row["messages"][0]["content"] in load_prompts(None).plain and row["num_sequence_tokens"] > 0
        assert row["image"]["bytes"]


def test_of_several_rounds_the_last_caption_of_an_image_counts(made: RunDir) -> None:
    newest = {row["image_id"]: row["text"] for row in (*captions_of(made), *captions_of(made, "captions_2"))}
    texts = texts_of(made, "corpus_2")
    assert {image for image, text in texts.items() if "new" in text} == newest.keys()
    assert all(texts[image].endswith(text) for image, text in newest.items())


def test_shuffled_captions_belong_to_other_images(made: RunDir) -> None:
    own, texts = {row["image_id"]: row["text"] for row in captions_of(made)}, texts_of(made, "shuffled")
    given = {image: text[text.index("new") :] for image, text in texts.items() if "new" in text}
    assert given and {*given.values()} <= {*own.values()} and all(own[image] != text for image, text in given.items())


def test_answers_of_a_specialist_are_further_turns(made: RunDir) -> None:
    rows = (made / "with_turns").read_table("rows", INFUSED).to_pylist()
    assert {tuple(turn["content"] for turn in row["messages"][2:]) for row in rows} == {("How many are there?", "3")}
    manifest = (made / "with_turns").manifest
    assert manifest and manifest["num_specialist_turns"] == len(rows)


def test_captions_and_corpora_are_the_same_however_the_work_is_cut_and_broken_off(
    made: RunDir, tmp_path: Path, pictures: Path
) -> None:
    config = config_of(tmp_path, pictures, actors={"num_actors": 1, "batch_size": 3})
    names = ("pool", "captions", "captions_2", "corpus_2")
    run = ran(config, tmp_path / "run", *names)
    for step, family in (("captions_2", "captions"), ("corpus_2", "rows")):
        place = run / step
        (place.location / "manifest.json").delete()
        for shard in place.shards(family)[:2]:
            shard.delete()
        for left in ("record-000000.json", "record-000001.json"):
            (place.location / left).delete()
    run = ran(config, tmp_path / "run", *names)
    own, expected = ({row["image_id"]: row["text"] for row in captions_of(each, "captions_2")} for each in (run, made))
    assert own == expected
    assert texts_of(run, "corpus_2") == texts_of(made, "corpus_2")


def test_of_several_answers_the_most_frequent_is_kept(ray_session: None, tmp_path: Path, pictures: Path) -> None:
    settings = {"captions.num_answers": 3, "captions.temperature": 1.0, "captions.majority": 0.9}
    config = apply_values(config_of(tmp_path, pictures), settings)
    run = ran(apply_values(config, {"pool.shard_size": 10}), tmp_path / "run", "pool", "counts")
    assert {row["text"] for row in captions_of(run, "counts")} == {"3"}
    with pytest.raises(SourceError, match="'no_majority'"):
        ran(config, tmp_path / "other", "pool", "captions")


def test_an_empty_caption_and_one_that_is_cut_off_are_rejected(
    ray_session: None, tmp_path: Path, pictures: Path
) -> None:
    with pytest.raises(SourceError, match="Not one of .* has a caption: {'empty_answer'"):
        ran(config_of(tmp_path / "a", pictures, "default: ''"), tmp_path / "a" / "run", "pool", "captions")
    cut_off = apply_values(
        config_of(tmp_path / "b", pictures, "default: one two three"), {"captions.max_new_tokens": 2}
    )
    with pytest.raises(SourceError, match="'truncated_answer'"):
        ran(cut_off, tmp_path / "b" / "run", "pool", "captions")
    shutil.rmtree(tmp_path / "b")
    kept = apply_values(config_of(tmp_path / "b", pictures, "default: one two three"), {"captions.max_new_tokens": 2})
    run = ran(apply_values(kept, {"captions.allow_truncated": True}), tmp_path / "b" / "run", "pool", "captions")
    assert {row["finish_reason"] for row in captions_of(run)} == {"length"}


def test_the_estimate_prices_the_share_of_a_round(tmp_path: Path, pictures: Path) -> None:
    settings = {"estimate.num_images": 1000, "estimate.num_parameters": 10**9}
    config = apply_values(config_of(tmp_path, pictures), settings)
    priced = {each.stage: each for each in estimate_run(config, STEPS, None, [step.name for step in STEPS])}
    assert priced["captions"].num_images == 700 and priced["counts"].num_images == 1000
    assert priced["corpus"].num_images == 1000
