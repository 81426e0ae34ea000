"""Stage `scores`: what scorers say of candidates, whatever dies, and what is refused before work."""

import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError, ModelError, SourceError, StageError
from stic_ray.core.overrides import apply_overrides, apply_values
from stic_ray.core.rundir import MANIFEST, RunDir
from stic_ray.core.steps import Step, prepare_step
from stic_ray.estimate.steps import estimate_run
from stic_ray.preparation import check_before_work
from stic_ray.stages.pool import POOL
from stic_ray.stages.scorers import find_scorers
from stic_ray.stages.scores import SCORES, ScoreWorker, model_of
from tests.stages.builders import rejected_of
from tests.stages.own_scorers import KILLED
from tests.stages.scoring import TEXTS, Scene, make_scene, scores_of, values_by_image, write_candidates

OWN = "tests.stages.own_scorers"
NUM_PICTURES = 6


@pytest.fixture(scope="module")
def scene(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"), NUM_PICTURES)


@pytest.fixture
def nowhere(tmp_path: Path) -> Scene:
    """Of what is refused before anything is read."""
    return Scene(tmp_path / "nowhere")


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((folder / "scores").glob("*.parquet"))}


def check(scene: Scene, config: RunConfig) -> None:
    run = RunDir.of("run")
    check_before_work([(scene.step(), prepare_step(scene.step(), config, run, config))])


def test_scorers_of_texts_need_no_model_and_no_gpu(scene: Scene, tmp_path: Path) -> None:
    names = ["consistency", "length", "repetition", "pattern", f"{OWN}:num_letters"]
    config = scene.config(tmp_path, scorers=names, pattern="(?i)red", repetition_ngram=1)
    config = apply_values(config, {"actors.num_gpus": 1, "model.path": "/none"})
    assert not SCORES.loads_model(config) and SCORES.need(config).each["GPU"] == 0
    run = scene.run(config, tmp_path / "run")

    rows = scores_of(run)
    assert [row["number"] for row in rows] == [0, 1, 2] * 5 * NUM_PICTURES
    assert [row["scorer"] for row in rows[:15:3]] == ["consistency", "length", "repetition", "pattern", "num_letters"]
    expected = {
        "consistency": [0.45, 0.25, 0.2],
        "length": [7, 7, 3],
        "repetition": [0, 0, 0],  # articles aside, no word comes twice
        "pattern": [-1, -1, 0],
        "num_letters": [24, 25, 13],
    }
    for scorer, values in expected.items():
        assert list(values_by_image(run, scorer).values()) == [pytest.approx(values, abs=1e-6)] * NUM_PICTURES
    manifest = (run / "scores").manifest or {}
    assert manifest["num_rows_in"] == manifest["num_rows_written"] == 3 * 5 * NUM_PICTURES
    assert not (run / "scores").shards("statements")


def test_a_rerun_does_nothing_and_what_was_killed_is_done_again_with_the_same_bytes(
    scene: Scene, tmp_path: Path
) -> None:
    config = scene.config(tmp_path, scorers=[f"{OWN}:deadly", "consistency"])
    run = scene.run(config, tmp_path / "run")
    assert (scene.folder / KILLED).exists(), "an actor was killed on the way"
    assert (len(scores_of(run)), rejected_of(run, "scores")) == (NUM_PICTURES * 2 * 3, [])
    first, before = files_of(tmp_path / "run"), (run / "scores").manifest
    scene.run(config, tmp_path / "run")
    assert (run / "scores").manifest == before

    (tmp_path / "run" / "scores" / MANIFEST).unlink()
    (tmp_path / "run" / "scores" / "shard-000001.json").unlink()
    (tmp_path / "run" / "scores" / "scores-000001.parquet").write_bytes(b"")
    scene.run(config, tmp_path / "run")
    assert (run / "scores").manifest and files_of(tmp_path / "run") == first


def test_images_without_candidates_have_no_scores_and_answers_without_a_score_are_told(
    scene: Scene, tmp_path: Path
) -> None:
    some = write_candidates(RunDir.of(str(scene.folder)), tmp_path, lambda image: TEXTS[: image["position"] % 3])
    run = scene.run(scene.config(tmp_path), tmp_path / "run", some)
    # Positions 0 to 5 have 0, 1, 2, 0, 1 and 2 answers: an answer alone agrees with nobody.
    assert [row["number"] for row in scores_of(run)] == [0, 1] * 2
    alone = rejected_of(run, "scores")
    assert [row["reason"] for row in alone] == ["no_score"] * 2
    assert alone[0]["message"] == "consistency, answer 0: the image has no other answer to compare it with"
    manifest = (run / "scores").manifest or {}
    assert (manifest["num_rows_in"], manifest["rejected_by_reason"]) == (6, {"no_score": 2})


def test_a_scorer_of_ones_own_may_look_and_an_image_that_is_gone_has_no_score_of_any(
    scene: Scene, tmp_path: Path
) -> None:
    config = scene.config(tmp_path, scorers=[f"{OWN}:redness", "length"])
    gone = scene.pictures / "001.jpg"
    shutil.move(gone, tmp_path / "kept")
    try:
        run = scene.run(config, tmp_path / "run")
    finally:
        shutil.move(tmp_path / "kept", gone)
    values = values_by_image(run, "redness")
    assert all(len(set(own)) == 1 for own in values.values()) and len({own[0] for own in values.values()}) > 1
    manifest = (run / "scores").manifest or {}
    assert manifest["num_rows_written"] == (NUM_PICTURES - 1) * 6
    assert manifest["rejected_by_reason"] == {"unreadable_file": 6}


class TestColumn:
    """Scores from outside."""

    def test_scores_of_answers_are_joined_by_image_and_number(self, scene: Scene, tmp_path: Path) -> None:
        ids = scene.image_ids
        rows = [{"image_id": i, "number": n, "mine": len(i) + n / 7} for i in [*ids[1:], "ab"] for n in (2, 1, 0)]
        rows[0]["mine"], rows[1]["mine"] = None, math.nan
        for number, half in enumerate((rows[:7], rows[7:])):
            (tmp_path / "outside").mkdir(exist_ok=True)
            pq.write_table(pa.Table.from_pylist(half), tmp_path / "outside" / f"{number}.parquet")
        config = scene.config(tmp_path, scorers="column", column_source=str(tmp_path / "outside"), column="mine")
        run = scene.run(config, tmp_path / "run")
        expected = {i: pytest.approx([32 + n / 7 for n in (0, 1, 2)]) for i in ids[2:]}
        assert values_by_image(run, "column") == {ids[1]: [32.0], **expected}
        rejected = rejected_of(run, "scores")
        assert [row["image_id"] for row in rejected] == [ids[0]] * 3 + [ids[1]] * 2
        assert all(row["message"].endswith("has no 'mine' for it") for row in rejected)

    def test_without_a_number_they_are_scores_of_images(self, scene: Scene, tmp_path: Path) -> None:
        pq.write_table(pa.table({"image_id": scene.image_ids, "score": range(6)}), tmp_path / "outside.parquet")
        config = scene.config(tmp_path, scorers="column", column_source=str(tmp_path / "outside.parquet"))
        found = [
            (row["image_id"], row["number"], row["value"]) for row in scores_of(scene.run(config, tmp_path / "run"))
        ]
        assert found == [(name, None, place) for place, name in enumerate(scene.image_ids)]

    def test_two_scores_of_one_answer_are_refused(self, tmp_path: Path, nowhere: Scene) -> None:
        pq.write_table(pa.table({"image_id": ["a", "b", "a"], "score": [1, 2, 3]}), tmp_path / "outside.parquet")
        config = nowhere.config(tmp_path, scorers="column", column_source=str(tmp_path / "outside.parquet"))
        read = find_scorers(config.scores)["column"].read
        assert read and read(config, ["b"]) == {"b": {None: 2.0}}
        with pytest.raises(SourceError, match="has two scores of image a"):
            read(config, ["a"])

    @pytest.mark.parametrize(
        ("settings", "kind", "message"),
        [
            ({}, ConfigError, "needs scores.column_source"),
            ({"column_source": "good.parquet"}, SourceError, "has no column 'score'. Did you mean 'scores'"),
            ({"column_source": "good.parquet", "column": "text"}, SourceError, "is string; scores are numbers"),
            ({"column_source": "gone.parquet"}, SourceError, "is no Parquet file"),
            ({"column_source": "bad.parquet"}, SourceError, "cannot be read"),
        ],
    )
    def test_a_table_that_cannot_be_joined_is_told_before_work(
        self, tmp_path: Path, nowhere: Scene, settings: Any, kind: type[Exception], message: str
    ) -> None:
        pq.write_table(pa.table({"image_id": ["a"], "scores": [1.0], "text": ["x"]}), tmp_path / "good.parquet")
        (tmp_path / "bad.parquet").write_text("x")
        if "column_source" in settings:
            settings = {**settings, "column_source": str(tmp_path / settings["column_source"])}
        with pytest.raises(kind, match=message):
            check(nowhere, nowhere.config(tmp_path, scorers="column", **settings))


def test_a_scorer_that_fails_on_every_image_stops_the_stage_with_its_error(scene: Scene, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="TypeError"):
        scene.run(scene.config(tmp_path, scorers="math:fsum"), tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"scorers": "consistancy"}, ConfigError, r"there is no 'consistancy'. Did you mean 'consistency'\? Valid: "),
        ({"scorers": "no.module:x"}, ConfigError, "'no.module:x' cannot be imported: ModuleNotFoundError"),
        ({"scorers": f"{OWN}:gone"}, ConfigError, "cannot be imported: AttributeError"),
        ({"scorers": f"{OWN}:no_scorer"}, ConfigError, "is int; give a function or a Scorer"),
        ({"scorers": ["length", f"{OWN}:length"]}, ConfigError, "two scorers 'length'"),
        ({"scorers": "pattern"}, ConfigError, "needs scores.pattern"),
        ({"scorers": "image_text"}, ConfigError, "needs scores.image_text_model"),
        ({"scorers": "implicit_reward"}, ConfigError, "compares two models, and both are the run's own"),
        (
            {"scorers": "image_text", "image_text_model": "/none"},
            ModelError,
            r"scores\.image_text_model='/none' is no directory here",
        ),
        ({"similarity_model": "/none"}, ModelError, r"scores\.similarity_model='/none' is no directory here"),
        ({"scorers": "log_p", "model": "/none"}, ModelError, "/none"),
    ],
)
def test_mistakes_are_told_before_work(
    nowhere: Scene, tmp_path: Path, settings: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        check(nowhere, nowhere.config(tmp_path, **settings))


def test_log_probabilities_are_taken_under_the_prompt_that_is_asked_for(nowhere: Scene, tmp_path: Path) -> None:
    answer = {"number": 0, "text": "a", "prompt": "asked?", "filed_under": "plain?", "num_tokens": 1}
    row = {"image_id": "i", "path": "p", "answers": [{**answer, "finish_reason": "length"}], "outside": []}
    for setting, prompt in (("asked", "asked?"), ("filed_under", "plain?")):
        worker = ScoreWorker(nowhere.config(tmp_path, prompt=setting), {})
        [found] = worker.prepare(row).answers
        assert (found.prompt, found.num_tokens, found.cut_off) == (prompt, 1, True)


def test_the_model_may_be_another_and_never_answers_through_vllm(nowhere: Scene, tmp_path: Path) -> None:
    config = nowhere.config(tmp_path, model="org/other", reference=str(tmp_path / "adapter"))
    config = apply_values(config, {"model.engine": "vllm", "model.path": "org/own", "model.chat_template": "{{ x }}"})
    other = model_of(config, "model")
    assert (other.engine, other.path, other.chat_template) == ("transformers", "org/other", None)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "config.json").touch()
    full = model_of(config, "reference")
    assert (full.path, full.adapter, full.chat_template) == (str(tmp_path / "adapter"), None, None)
    (tmp_path / "adapter" / "adapter_config.json").touch()
    adapted = model_of(config, "reference")
    assert (adapted.path, adapted.adapter, adapted.chat_template) == ("org/own", str(tmp_path / "adapter"), "{{ x }}")
    assert model_of(apply_values(config, {"scores.model": None}), "model").path == "org/own"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("scores.pattern=a(", "is no regular expression of Python: missing"),
        ("scores.scorers=[length, length]", "name each of them once"),
        ("scores.per_token=[length]", "scores.per_token"),
        ("scores.scorers=[]", "scores.scorers"),
    ],
)
def test_settings_that_cannot_be(nowhere: Scene, tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_overrides(nowhere.config(tmp_path), [setting])


def test_the_estimate_counts_what_the_model_is_asked(nowhere: Scene, tmp_path: Path) -> None:
    known = {"num_images": 100, "num_parameters": 7e9, "num_prompt_tokens": 24, "num_image_tokens": 576}
    known["num_answer_tokens"] = 150
    config = nowhere.config(tmp_path, scorers=["claims", "image_logratio"])
    config = apply_values(config, {f"estimate.{name}": value for name, value in known.items()})
    steps = (Step(POOL), Step(SCORES, inputs={"index": "pool", "candidates": "/c"}))
    [found] = estimate_run(config, steps, None, ["scores"])
    # Of an image: 8 splits of 600 + 150 and 150 written, 80 questions, and 8 answers of 150 behind two prompts.
    tokens = 8 * (600 + 150 + 150) + 80 * 600 + 2 * (600 + 8 * 150)
    assert found.num_images == 100 * 8 * 2 and found.num_tokens == pytest.approx(100 * tokens)
