"""The prompt set: complete, replaceable by a user's own, wrong ones refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from stic_ray.core.errors import ConfigError
from stic_ray.method.prompts import PromptSet, fill, load_prompts

OWN: dict[str, Any] = {
    "step_by_step": ["Look closely."],
    "plain": ["Describe it.", "What is it?"],
    "hallucination": ["Make it up."],
    "describe": "Tell me all.",
    "infuse": "{description} / {question}",
    "choose": "{question}\n{choices}",
    "answer_briefly": "{question} Shortly.",
}


def written(folder: Path, content: str | bytes) -> str:
    file = folder / "prompts.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


def refusal(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_prompts(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_built_in_set_is_complete_and_without_repetition() -> None:
    """The numbers are the paper's: eight plain and eight hallucination prompts (reference/methods.md 1.2)."""
    prompts = load_prompts(None)
    assert (len(prompts.plain), len(prompts.hallucination)) == (8, 8)
    said = [*prompts.step_by_step, *prompts.plain, *prompts.hallucination]
    assert len(set(said)) == len(said)
    assert all(text.strip() == text and "{" not in text and "<image>" not in text for text in [*said, prompts.describe])


def test_a_users_own_set_is_read(tmp_path: Path) -> None:
    prompts = load_prompts(written(tmp_path, yaml.safe_dump(OWN)))
    assert {name: prompts.model_dump(mode="json")[name] for name in OWN} == OWN
    built_in = load_prompts(None)
    assert (prompts.split, prompts.confirm, prompts.ask) == (built_in.split, built_in.confirm, built_in.ask)
    assert prompts.infused("A cat.", "Colour?") == "A cat. / Colour?"


def test_a_set_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_prompts(None).describe = "x"  # type: ignore[misc]


@pytest.mark.parametrize("part", OWN)
def test_a_set_that_lacks_a_part_is_refused_by_name(part: str, tmp_path: Path) -> None:
    rest = {name: value for name, value in OWN.items() if name != part}
    assert part in refusal(written(tmp_path, yaml.safe_dump(rest)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"plain": []}, "plain"),
        ({"plain": "Describe it."}, "plain"),
        ({"plain": ["Describe it.", ""]}, "plain.1"),
        ({"plain": [5]}, "plain.0"),
        ({"describe": ["a", "b"]}, "describe"),
        ({"infuse": "only {question}"}, "{description}"),
        ({"choose": "{question} without them"}, "{choices}"),
        ({"answer_briefly": "nothing"}, "{question}"),
        ({"plane": ["x"]}, "Did you mean 'plain'?"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_part_is_refused_by_name(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    assert told in refusal(written(tmp_path, yaml.safe_dump(OWN | changes)))


@pytest.mark.parametrize(
    "content", ["plain: [", "- a\n- b\n", "", b"\xff\xfe\x00"], ids=["syntax", "list", "no", "bytes"]
)
def test_a_file_that_is_no_prompt_set_is_refused(content: str | bytes, tmp_path: Path) -> None:
    refusal(written(tmp_path, content))


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_cannot_be_read_is_refused(name: str, tmp_path: Path) -> None:
    refusal(str(tmp_path / name))


@pytest.mark.parametrize(
    ("template", "values", "expected"),
    [
        ("{a} and {b}", {"a": "1", "b": "2"}, "1 and 2"),
        ("{a} and {a}", {"a": "x"}, "x and x"),
        ("{a}{b}", {"a": "{b}", "b": "{a}"}, "{b}{a}"),
        ("{a}", {"a": "code: {x: {y}} \\1 %s"}, "code: {x: {y}} \\1 %s"),
        ("{a} {other} {} {{a}}", {"a": "1"}, "1 {other} {} {1}"),
        ("nothing", {"a": "1"}, "nothing"),
    ],
)
def test_only_the_named_places_are_filled(template: str, values: dict[str, str], expected: str) -> None:
    assert fill(template, **values) == expected


def test_an_infused_question_has_the_description_in_front() -> None:
    """The layout of STIC's released data (reference/methods.md 1.6)."""
    infused = load_prompts(None).infused("A {red} cat.\nAsleep.", "What is {it}?")
    assert infused == "Image description:\nA {red} cat.\nAsleep.\n\nWhat is {it}?"


def test_a_prompt_set_is_data_that_travels() -> None:
    assert PromptSet.model_validate(load_prompts(None).model_dump()) == load_prompts(None)
