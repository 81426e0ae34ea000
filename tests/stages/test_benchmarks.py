"""Benchmarks in the forms that authors publish: taken where they have one meaning, refused in a line elsewhere."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from stic_ray.core.errors import SourceError
from stic_ray.stages.benchmarks import read_benchmark


def read_one(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    (folder / "b.jsonl").write_text(json.dumps(row))
    (question,) = read_benchmark(str(folder / "b.jsonl"))
    return question


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"choices": ["sun", "moon", None, None], "answer": "A"}, (["sun", "moon"], ["A"])),
        ({"choices": {"A": "sun", "B": "moon"}, "answer": "B"}, (["sun", "moon"], ["B"])),
        ({"choices": "['sun', 'moon']", "answer": "2.0"}, None),
        ({"choices": "['sun', 'moon']", "answer": "1"}, (["sun", "moon"], ["B"])),
        ({"choices": ["3", "2", "1", "4"], "answer": 2}, (["3", "2", "1", "4"], ["C"])),
        ({"choices": ["sun", "moon"], "answers": ["A", "moon"]}, (["sun", "moon"], ["A", "B"])),
        ({"choices": None, "answer": 2.0}, (None, ["2"])),
        ({"choices": [None, None], "answer": "two"}, (None, ["two"])),
        ({"answers": [{"answer": "net", "answer_id": 1}, {"answer": "nets", "answer_id": 2}]}, (None, ["net", "nets"])),
        ({"answers": "['2', 'two']"}, (None, ["2", "two"])),
        ({"answers": ["two", None]}, (None, ["two"])),
        ({"answers": None, "answer": 0}, (None, ["0"])),
        ({"answer": True, "metric": "yes_no"}, (None, ["yes"])),
        ({"answer": "No.", "metric": "yes_no"}, (None, ["No."])),
    ],
)
def test_the_forms_of_choices_and_answers(row: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    if expected is None:
        with pytest.raises(SourceError, match="'2.0' is none of the 2 choices"):
            read_one({"question": "q", **row}, tmp_path)
        return
    question = read_one({"question": "q", **row}, tmp_path)
    assert (question["choices"], question["answers"]) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"img": "a.jpg"}, "names a picture as 'img'.*the field is 'image'"),
        ({"image_path": "a.jpg"}, "'image_path'"),
        ({"meta": {"file": "x/a.jpg"}}, "'meta'"),
        ({"video": "a.mp4"}, "only images can be shown"),
        ({"image": ["a.jpg", "b.jpg"]}, "2 images"),
        ({"image": 5}, "the image is 5, not the path"),
        ({"image": "../private/passport.png"}, "'../private/passport.png' is not below"),
        ({"question": "<image>\nWhat?"}, "the text has <image>, but the row has no image"),
        ({"image": "a.jpg", "question": "<image><image>Which?"}, "2 image placeholders"),
        ({"image": "a.jpg", "question": "<image>"}, "no 'question'"),
        ({"question": "<video>What?"}, "<video>"),
        ({"answer": None}, "neither 'answer' nor 'answers'"),
        ({"answer": ""}, "the answer is an empty text"),
        ({"answer": None, "label": "yes"}, "'label', but no 'answer'"),
        ({"options": ["a", "b"]}, "'options', but no 'choices'"),
        ({"A": "sun", "B": "moon"}, "'A', but no 'choices'"),
        ({"option_a": "sun", "option_b": "moon"}, "'option_a', but no 'choices'"),
        ({"multi-choice options": "A. sun B. moon"}, "'multi-choice options', but no 'choices'"),
        ({"metrics": ["contains"]}, "'metrics', but no 'metric'"),
        ({"Metric": "contains"}, "'Metric', but no 'metric'"),
        ({"metirc": "contains"}, "'metirc', but no 'metric'"),
        ({"choices": ["3", "2", "1"], "answer": "2"}, "can mean '2' as text, '1' as place from 0; write the letter"),
        ({"choices": [3, 2, 1], "answer": 2}, "can mean 1 as place from 0, 2 as value"),
        ({"choices": ["sun", "sun"], "answer": "sun"}, "more than once"),
        ({"choices": "sun or moon"}, "'choices' is 'sun or moon'; write a list"),
        ({"choices": {"1": "sun", "2": "moon"}}, "the keys 1, 2"),
        ({"choices": {"label": 5, "text": 6}}, "TypeError"),
        ({"choices": ["sun", None], "answer": "A"}, "1 choices; from 2"),
    ],
)
def test_what_has_no_meaning_or_two_is_refused_in_one_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        read_one({"question": "q", "answer": "a", **row}, tmp_path)
    assert "row 0 (line 1)" in str(caught.value) and "b.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_bad_line_is_refused_with_its_number(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"question": "q", "answer": "a"}\n{"question": "q", "answer"')
    with pytest.raises(SourceError, match=r"row 1 \(line 2\): cannot be read: Expecting ':' delimiter"):
        read_benchmark(str(tmp_path / "b.jsonl"))


def test_placeholders_and_half_characters_do_not_reach_the_question(tmp_path: Path) -> None:
    row = {"id": "a\ud83d", "image": "a.jpg", "question": "<image>\nWhat \ud83d?", "answer": "x\ud83d"}
    question = read_one(row, tmp_path)
    assert (question["id"], question["question"], question["answers"]) == ("a\ufffd", "What \ufffd?", ["x\ufffd"])
    assert question["path"] == str(tmp_path / "a.jpg")


def test_rows_without_id_have_their_number(tmp_path: Path) -> None:
    rows = [{"id": name, "question": "q", "answer": "a"} for name in (None, float("nan"), "", "1")]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [question["id"] for question in read_benchmark(str(tmp_path / "b.jsonl"))] == ["0", "row 1", "2", "1"]


@pytest.mark.parametrize("name", ["b.jsonl", "b.JSONL", "b.json", "b.ndjson", "b.parquet"])
def test_a_benchmark_is_called_as_its_file_without_the_ending(name: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"question": ["q", "r"], "choices": [["x", "y"], None], "answer": [1.0, 2.0]})
    if name.endswith("parquet"):
        frame.to_parquet(tmp_path / name)
    else:
        frame.to_json(tmp_path / name, orient="records", lines=True)
    questions = read_benchmark(str(tmp_path / name))
    assert {question["benchmark"] for question in questions} == {"b"}
    assert [question["answers"] for question in questions] == [["B"], ["2"]]
