"""Stage `evaluation`: both modes, every metric's row, paired differences, benchmarks that are wrong."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stic_ray.core.config import EvaluationConfig
from stic_ray.core.errors import SourceError
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import PREDICTIONS
from stic_ray.stages.benchmarks import read_benchmark, read_benchmarks
from stic_ray.stages.evaluation import evaluate, summarise
from tests.stages.builders import draw_pictures, fake_config

QUESTIONS: list[dict[str, Any]] = [
    {"id": "a", "image": "000.jpg", "question": "Which?", "choices": ["red", "blue"], "answer": "B"},
    {"id": "b", "image": "001.jpg", "question": "Which?", "choices": ["red", "blue"], "answer": 0},
    {"id": "c", "image": "002.jpg", "question": "Name it.", "answers": ["a blue thing", "blue"], "metric": "contains"},
    {"id": "d", "question": "Without image?", "answer": "no"},
    {"id": "e", "image": "missing.jpg", "question": "Gone?", "answer": "no"},
]
SCRIPT = """
rules:
  - {prompt: "Image description", answer: "It is blue."}
  - {prompt: "Describe", answer: "A {colour} description."}
default: "red"
"""


def write_benchmark(folder: Path, name: str = "mine") -> Path:
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(question) for question in QUESTIONS))
    return path


@pytest.mark.usefixtures("ray_session")
def test_questions_are_answered_directly_and_with_a_description(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 3)
    config = fake_config(tmp_path, pictures, SCRIPT, evaluation={"benchmarks": [str(write_benchmark(pictures))]})
    output = RunDir.of(str(tmp_path / "run")) / "evaluation"
    accounts = evaluate(config, output, {"base": None})

    rows = {(r["id"], r["mode"]): r for r in output.read_table("predictions-base", PREDICTIONS).to_pylist()}
    assert len(rows) == 8
    direct, described = rows["a", "direct"], rows["a", "describe_and_respond"]
    assert direct["prompt"].startswith("Which?\nA. red\nB. blue") and direct["description"] is None
    assert described["prompt"] == f"Image description:\n{described['description']}\n\n{direct['prompt']}"
    assert described["description"].startswith("A #")
    assert (direct["prediction"], direct["score"]) == ("A", 0.0)
    assert (described["prediction"], described["score"]) == ("B", 1.0)
    assert rows["b", "direct"]["score"] == 1.0
    assert rows["c", "describe_and_respond"]["score"] == 1.0
    assert rows["d", "describe_and_respond"]["description"] is None
    assert accounts["num_rows_in"] == 10 and accounts["rejected_by_reason"] == {"unreadable_file": 2}
    scores = {row["mode"]: row for row in output.read_json("scores.json")}
    assert scores["direct"]["score"] == pytest.approx(1 / 4) and scores["direct"]["num_questions"] == 4
    assert scores["direct"]["difference"] is None
    assert scores["describe_and_respond"]["difference"] == pytest.approx(0.5 - 0.25)


@pytest.mark.usefixtures("ray_session")
def test_questions_without_ids_of_two_files_stay_apart(tmp_path: Path) -> None:
    """Both files number their rows from 0, and their questions share a batch."""
    for name in ("one", "two"):
        rows = [{"question": f"Say {name} {i}", "answer": f"{name} {i}"} for i in range(2)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    script = "rules:\n" + "".join(
        f"  - {{prompt: Say {name} {i}, answer: {name} {i}}}\n" for name in ("one", "two") for i in range(2)
    )
    benchmarks = [str(tmp_path / f"{name}.jsonl") for name in ("one", "two")]
    config = fake_config(tmp_path, tmp_path, script, evaluation={"benchmarks": benchmarks})
    output = RunDir.of(str(tmp_path / "run")) / "evaluation"
    evaluate(config, output, {"base": None})
    scores = output.read_json("scores.json")
    assert [(row["benchmark"], row["score"]) for row in scores] == [("one", 1.0)] * 2 + [("two", 1.0)] * 2


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}))
    with pytest.raises(SourceError, match="two files are called 'same'"):
        read_benchmarks([str(tmp_path / folder / "same.jsonl") for folder in ("a", "b")])


def test_differences_are_paired_by_question() -> None:
    """The trained model is right on two more questions of ten; the unpaired intervals would overlap widely."""
    base = [
        {"benchmark": "b", "model": "base", "mode": "direct", "id": str(i), "score": float(i < 5)} for i in range(10)
    ]
    sft = [{**row, "model": "sft", "score": float(int(row["id"]) < 7)} for row in reversed(base)]
    summary = {row["model"]: row for row in summarise(base + sft, EvaluationConfig(), seed=0)}
    assert summary["sft"]["difference"] == pytest.approx(0.2)
    assert 0 <= summary["sft"]["difference_low"] <= 0.2 <= summary["sft"]["difference_high"] <= 0.5
    assert summary["base"]["low"] < 0.5 < summary["base"]["high"]


def test_parquet_and_jsonl_hold_the_same_questions(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 3)
    in_table = [
        {
            "id": q["id"],
            "image": {"bytes": (pictures / q["image"]).read_bytes()} if q.get("image", "m")[0] == "0" else None,
            "question": q["question"],
            "choices": q.get("choices"),
            "answers": q.get("answers") or [str(q["answer"]) if q["answer"] != 0 else "red"],
            "metric": q.get("metric"),
        }
        for q in QUESTIONS
    ]
    pq.write_table(pa.Table.from_pylist(in_table), tmp_path / "mine.parquet")
    from_parquet, from_lines = (
        read_benchmark(str(tmp_path / "mine.parquet")),
        read_benchmark(str(write_benchmark(pictures))),
    )
    same = ("benchmark", "id", "question", "choices", "answers", "metric")
    assert [[q[k] for k in same] for q in from_parquet] == [[q[k] for k in same] for q in from_lines]
    assert [q["row"] for q in from_parquet] == [0, 1, 2, None, None]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, "neither 'answer' nor 'answers'"),
        ({"answer": "a"}, "no 'question'"),
        ({"question": "q", "answer": "a", "metric": "exact"}, "unknown metric 'exact'. Did you mean 'exact_match'"),
        ({"question": "q", "answer": "C", "choices": ["x", "y"]}, "'C' is none of the 2 choices"),
        ({"question": "q", "answer": "A", "choices": ["x"]}, "1 choices; from 2"),
        ({"question": "q", "answer": "A", "metric": "multiple_choice"}, "go together"),
        ({"question": "q", "answer": 1.5, "choices": ["x", "y"]}, "1.5 is none of the 2 choices"),
        ({"question": "q", "answers": [None]}, "with text or numbers"),
        ({"question": "q", "answer": "a", "metric": ["a"]}, "unknown metric"),
    ],
)
def test_a_wrong_row_is_named_in_one_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}) + "\n" + json.dumps(row))
    with pytest.raises(SourceError, match=message) as caught:
        read_benchmark(str(tmp_path / "b.jsonl"))
    assert "row 1" in str(caught.value) and "\n" not in str(caught.value)


def test_ids_must_be_unique(tmp_path: Path) -> None:
    line = json.dumps({"id": 1, "question": "q", "answer": "a"})
    (tmp_path / "b.jsonl").write_text(f"{line}\n{line}")
    with pytest.raises(SourceError, match="id '1' more than once"):
        read_benchmark(str(tmp_path / "b.jsonl"))
