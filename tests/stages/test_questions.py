"""Stage `questions`: what the model asks itself, which questions are kept, and who can read them."""

import io
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import load_dataset
from PIL import Image

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError, SourceError
from stic_ray.core.overrides import apply_values
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import INFUSED, QUESTIONS
from stic_ray.estimate.steps import estimate_run
from stic_ray.pipeline import run_pipeline
from stic_ray.recipes import self_questions, with_own_questions
from tests.stages.builders import conversations_in, draw_pictures, fake_config, rejected_of

SCRIPT = """
rules:
  - {prompt: Write one short question, answer: 'Question: What is {seed} in {size}?'}
  - {prompt: What could somebody be asked, answer: A picture without a question.}
  - {prompt: What is 1, answer: '{seed}'}
  - {prompt: What is 2, answer: 'one two three four five six'}
default: 'The Red.'
"""
"""Of an image's questions by the first prompt, those whose seed begins with 1 get answers that never agree."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("drawn") / "pictures", 12)


def asked(config: RunConfig, folder: Path, *stages: str) -> RunDir:
    run = RunDir.of(str(folder))
    names = stages or ("pool", "questions")
    run_pipeline(config, with_own_questions(config), run, names, {"recipe": "test", "overrides": []})
    return run


def config_of(folder: Path, pictures: Path, script: str = SCRIPT, **sections: dict[str, Any]) -> RunConfig:
    folder.mkdir(exist_ok=True)
    defaults = {"num_questions": 3, "num_answers": 4, "max_new_tokens": 5, "export": True}
    questions = {**defaults, **sections.pop("questions", {})}
    evaluation = {"models": ["base", "sft"]}
    return fake_config(folder, pictures, script, questions=questions, evaluation=evaluation, **sections)


@pytest.fixture(scope="module")
def made(ray_session: None, tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> RunDir:
    folder = tmp_path_factory.mktemp("made")
    return asked(config_of(folder, pictures), folder / "run")


def test_kept_rows_are_questions_with_the_majoritys_answer(made: RunDir) -> None:
    rows = (made / "questions").read_table("rows", INFUSED).to_pylist()
    told = {f"{row['image_id']}-{row['number']}": row for row in questions_of(made) if row["reason"] is None}
    assert rows and {row["id"] for row in rows} == {*told}
    for row in rows:
        question, answer = row["messages"]
        of_it = told[row["id"]]
        assert question["content"] == f"{of_it['question']}\nAnswer with a single word or a short phrase."
        assert of_it["question"].startswith("What is ") and of_it["question"].endswith(" in 64x64?")
        assert answer["content"] == of_it["answer"] == "The Red." and of_it["answers"] == ["The Red."] * 4
        assert row["num_sequence_tokens"] == len(question["content"].split()) + 2 + 16
        assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (64, 64)


def questions_of(run: RunDir) -> list[dict[str, Any]]:
    return (run / "questions").read_table("questions", QUESTIONS).to_pylist()


def test_every_question_is_accounted_for_by_reason(made: RunDir) -> None:
    manifest, rows = (made / "questions").manifest, questions_of(made)
    assert manifest and len(rows) == manifest["num_rows_in"] == 36
    reasons = Counter(row["reason"] for row in rows)
    assert manifest["num_rows_written"] == reasons.pop(None) > 0
    assert (
        manifest["rejected_by_reason"]
        == dict(reasons)
        == Counter(row["reason"] for row in rejected_of(made, "questions"))
    )
    assert {*reasons} == {"no_question", "no_majority"}
    assert manifest["throughput"]["num_rows"] == 36, "a row of work is a question, in whatever tables it stands"
    for row in rows:
        begins = row["question"].removeprefix("What is ")[0]
        if row["reason"] == "no_question":
            assert (row["question"], row["answers"]) == ("A picture without a question.", [])
        elif row["reason"] == "no_majority":
            assert begins in "12" and len(row["answers"]) == 4
            assert row["share"] == (0.25 if begins == "1" else 0.0), "answers that are cut off agree with nothing"


def test_the_export_reads_as_verl_and_easyr1_read_it(made: RunDir) -> None:
    """verl: messages whose text has <image>, split there. EasyR1: a text, and the answer in a column of its own."""
    kept = {row["question"]: row for row in questions_of(made) if row["reason"] is None}
    exported: Any = load_dataset("parquet", data_files=f"{made.uri}/questions/export-*.parquet", split="train")
    assert exported.num_rows == len(kept)
    for row in exported:
        of_it = kept[row["extra_info"]["question"]]
        (message,) = row["prompt"]
        before, text = message["content"].split("<image>")
        assert message["role"] == "user" and before == "" and text.strip().startswith(of_it["question"])
        assert [picture.size for picture in row["images"]] == [(64, 64)]
        assert row["reward_model"] == {"style": "rule", "ground_truth": "The Red."}
        assert (row["problem"], row["answer"]) == (message["content"], "The Red.")
        assert row["extra_info"]["index"] == of_it["position"] * 3 + of_it["number"]
        assert row["data_source"] == "stic_ray/questions" and row["extra_info"]["split"] == "train"


def test_sft_takes_the_rows(made: RunDir, pictures: Path, tmp_path: Path) -> None:
    files = [Path(shard.path) for shard in (made / "questions").shards("rows")]
    rows = conversations_in(config_of(tmp_path, pictures), *files)
    manifest = (made / "questions").manifest
    assert manifest and rows.num_trained + rows.num_held_out == manifest["num_rows_written"]


@pytest.mark.usefixtures("ray_session")
def test_only_the_missing_shard_is_asked_again_and_actors_do_not_matter(
    made: RunDir, pictures: Path, tmp_path: Path
) -> None:
    before = {family: (made / "questions").read_table(family, schema) for family, schema in TABLES.items()}
    config = apply_values(config_of(tmp_path, pictures), {"actors.num_actors": 1, "actors.batch_size": 3})
    config = apply_values(config, {"model.path": path_of(made)})
    run = asked(config, tmp_path / "run")
    for shard in ("rows", "questions", "export"):
        (run / "questions").shards(shard)[0].delete()
    ((run / "questions").location / "manifest.json").delete()
    asked(config, tmp_path / "run", "questions")
    for family, schema in TABLES.items():
        assert (run / "questions").read_table(family, schema).equals(before[family])


TABLES = {"rows": INFUSED, "questions": QUESTIONS}


def path_of(run: RunDir) -> str:
    return questions_of(run)[0]["model"]


@pytest.mark.usefixtures("ray_session")
def test_what_the_model_always_answers_alike_can_be_left_out(tmp_path: Path, pictures: Path) -> None:
    config = config_of(tmp_path, pictures, questions={"majority": 0.5, "max_share": 0.9})
    with pytest.raises(SourceError, match="Not one of 36 questions was kept.*too_easy"):
        asked(config, tmp_path / "run")
    with pytest.raises(ConfigError, match="max_share=0.4 is below majority=0.6"):
        config_of(tmp_path, pictures, questions={"max_share": 0.4})


@pytest.mark.usefixtures("ray_session")
def test_an_image_that_cannot_be_read_loses_all_its_questions(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 4)
    config = config_of(tmp_path / "c", pictures)
    run = asked(config, tmp_path / "run", "pool")
    (pictures / "002.jpg").write_bytes(b"gone")
    asked(config, tmp_path / "run", "questions")
    manifest = (run / "questions").manifest
    assert manifest and manifest["num_rows_in"] == 12
    lost = [row for row in rejected_of(run, "questions") if row["path"].endswith("002.jpg")]
    assert len(lost) == 3 and {row["reason"] for row in lost} == {"unreadable_file"}


def test_the_estimate_counts_answers_and_reads_their_prompt_once() -> None:
    def tokens(**questions: Any) -> float:
        values = {f"questions.{name}": value for name, value in questions.items()}
        config = apply_values(self_questions().config, values)
        found = {each.stage: each for each in estimate_run(config, with_own_questions(config), None, ["questions"])}
        assert found["questions"].num_tokens
        return found["questions"].num_tokens

    one, more = tokens(num_questions=1, num_answers=4), tokens(num_questions=1, num_answers=8)
    assert tokens(num_questions=2, num_answers=4) == pytest.approx(2 * one)
    assert more - one == pytest.approx(1000 * 4 * 16), "1,000 pictures, 4 further answers of 16 tokens"
