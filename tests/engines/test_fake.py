"""The scripted engine that tests and benchmarks of the data plane share."""

from pathlib import Path

import pytest
import yaml
from PIL import Image

from stic_ray.core.config import ActorsConfig, ModelConfig
from stic_ray.core.errors import EngineError, ModelError
from stic_ray.engines.base import Answer, AnsweredPrompt, Request, Sampling
from stic_ray.engines.opening import check_engine, open_engine

RED = Image.new("RGB", (30, 20), (255, 0, 0))


def fake(folder: Path, script: str) -> ModelConfig:
    file = folder / "script.yaml"
    file.write_text(script, encoding="utf-8")
    return ModelConfig(engine="fake", path=str(file))


def answers(model: ModelConfig, requests: list[Request], max_new_tokens: int = 100) -> list[Answer]:
    return open_engine(model, ActorsConfig(batch_size=2)).generate(requests, Sampling(max_new_tokens))


def test_the_first_rule_that_fits_answers(tmp_path: Path) -> None:
    script = {
        "rules": [{"prompt": "colour", "answer": "It is {colour}."}, {"prompt": "What", "answer": "Number {seed}."}],
        "default": "A picture of {size}.",
    }
    model = fake(tmp_path, yaml.safe_dump(script))
    requests = [Request("What colour?", RED), Request("What?", RED, seed=7), Request("Describe.", RED)]
    assert [answer.text for answer in answers(model, requests)] == [
        "It is #ff0000.",
        "Number 7.",
        "A picture of 30x20.",
    ]


def test_tokens_are_words_and_answers_are_cut_off_at_the_limit(tmp_path: Path) -> None:
    model = fake(tmp_path, "default: one two three\nnum_image_tokens: 5\n")
    requests = [Request("x", RED), Request("x", None)]
    assert answers(model, requests, 3) == [
        Answer("one two three", 3, "stop", 5, 5),
        Answer("one two three", 3, "stop", 0, 0),
    ]
    assert answers(model, requests[:1], 2) == [Answer("one two", 2, "length", 5, 5)]
    conversation = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three"}]
    assert open_engine(model, ActorsConfig()).count_text_tokens(conversation, with_image=True) == 3


def test_an_empty_script_describes_the_picture(tmp_path: Path) -> None:
    assert "30x20" in answers(fake(tmp_path, ""), [Request("x", RED)])[0].text


def test_the_revision_is_that_of_the_script(tmp_path: Path) -> None:
    revisions = [open_engine(fake(tmp_path, text), ActorsConfig()).revision for text in ("default: a", "default: b")]
    again = open_engine(fake(tmp_path, "# a comment\ndefault: a"), ActorsConfig()).revision
    assert revisions[0] != revisions[1]
    assert revisions[0] == again
    trouble = "default: a\nseconds_per_batch: 1\nfaults: [{happens: kill}]"
    assert open_engine(fake(tmp_path, trouble), ActorsConfig()).revision == revisions[0], "it says the same"


@pytest.mark.parametrize("script", ["rules: [", "defualt: x", "- a\n- b", "rules:\n- prompt: x\n", "default: 3"])
def test_a_wrong_script_is_refused_in_one_line(script: str, tmp_path: Path) -> None:
    model = fake(tmp_path, script)
    with pytest.raises(ModelError, match=model.path) as caught:
        check_engine(model)
    assert "\n" not in str(caught.value)


def test_faults_happen_to_the_prompt_and_the_size_they_name_only(tmp_path: Path) -> None:
    model = fake(
        tmp_path, "faults: [{prompt: bad, size: 30x20, happens: raise}]\njournal: " + str(tmp_path / "journal")
    )
    small = Image.new("RGB", (3, 2))
    assert len(answers(model, [Request("bad", small), Request("bad", None), Request("good", RED)])) == 3
    with pytest.raises(EngineError, match="the script raises at 30x20"):
        answers(model, [Request("good", small), Request("so bad", RED)])
    assert (tmp_path / "journal").read_text() == "2\n1\n", "batches"


def test_looking_at_a_deadly_script_is_safe(tmp_path: Path) -> None:
    check_engine(fake(tmp_path, "dies_while_loading: true"))


def test_a_missing_script_is_refused_with_its_setting(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"model\.path='{tmp_path}/none\.yaml'"):
        check_engine(ModelConfig(engine="fake", path=f"{tmp_path}/none.yaml"))


def test_answers_have_scores_that_depend_on_all_that_is_given(tmp_path: Path) -> None:
    engine = open_engine(fake(tmp_path, "{}"), ActorsConfig())
    red, blue = Image.new("RGB", (4, 4), "red"), Image.new("RGB", (4, 4), "blue")
    asked = [
        AnsweredPrompt("?", image, ("One.", "Two."), (False, cut_off))
        for image, cut_off in ((red, True), (blue, False))
    ]
    asked.append(AnsweredPrompt("Well?", None, ("One.",)))
    found = engine.score_answers(asked)
    assert found == engine.score_answers(asked) and len({logp for own in found for logp in own}) == 5
    assert all(-4 <= logp <= -1 for own in found for logp in own)
    talk = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "One dog."}]
    (one, two) = engine.score_tokens([talk[:1], talk])
    assert one == [] and len(two) == 3 and all(-2 <= logp <= -1 for logp in two)
