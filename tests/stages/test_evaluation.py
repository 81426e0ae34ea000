"""Stage `evaluation`: both modes, every metric's row, paired differences, benchmarks that are wrong."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stic_ray.core.config import EvaluationConfig
from stic_ray.core.errors import SourceError
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import PREDICTIONS
from stic_ray.engines.base import Answer, Request, Sampling
from stic_ray.method.prompts import load_prompts
from stic_ray.stages.benchmarks import load_questions, read_benchmark, read_benchmarks
from stic_ray.stages.evaluation import Respondent, evaluate, summarise
from stic_ray.stages.shards import ShardTask
from tests.stages.builders import draw_pictures, fake_config

QUESTIONS: list[dict[str, Any]] = [
    {"id": "a", "image": "000.jpg", "question": "Which?", "choices": ["red", "blue"], "answer": "B"},
    {"id": "b", "image": "001.jpg", "question": "Which?", "choices": ["red", "blue"], "answer": 0},
    {"id": "c", "image": "002.jpg", "question": "Name it.", "answers": ["a blue thing", "blue"], "metric": "contains"},
    {"id": "d", "question": "Without image?", "answer": "no"},
    {"id": "e", "image": "missing.jpg", "question": "Gone?", "answer": "no"},
]
OBJECTS: dict[str, Any] = {
    "image": "000.jpg",
    "question": "What is there?",
    "metric": ["object_f1", "hallucinated_share", "any_hallucination"],
    "vocabulary": ["dog|puppy", "cat", "bus"],
    "answers": ["dog", "cat"],
}
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
    scores = {(row["metric"], row["mode"]): row for row in output.read_json("scores.json")}
    direct, described = (scores["multiple_choice", mode] for mode in ("direct", "describe_and_respond"))
    assert direct["score"] == pytest.approx(1 / 2) and direct["num_questions"] == 2
    assert direct["difference"] is None and direct["higher_is_better"] is True
    assert described["difference"] == pytest.approx(0.5 - 0.5)
    assert scores["contains", "describe_and_respond"]["difference"] == pytest.approx(1.0)


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
        {
            "benchmark": "b",
            "metric": "contains",
            "model": "base",
            "mode": "direct",
            "id": str(i),
            "image": None,
            "score": float(i < 5),
        }
        for i in range(10)
    ]
    sft = [{**row, "model": "sft", "score": float(int(row["id"]) < 7)} for row in reversed(base)]
    summary = {row["model"]: row for row in summarise(base + sft, EvaluationConfig(), seed=0)}
    assert summary["sft"]["difference"] == pytest.approx(0.2)
    assert 0 <= summary["sft"]["difference_low"] <= 0.2 <= summary["sft"]["difference_high"] <= 0.5
    assert summary["base"]["low"] < 0.5 < summary["base"]["high"]


def test_metrics_of_a_question_are_compared_each_with_its_own(tmp_path: Path) -> None:
    rows = [
        {"benchmark": "b", "metric": metric, "model": model, "mode": "direct", "id": "1", "image": None, "score": score}
        for metric, base, sft in (("object_f1", 0.5, 0.75), ("hallucinated_share", 0.25, 0.0))
        for model, score in (("base", base), ("sft", sft))
    ]
    summary = {(row["metric"], row["model"]): row for row in summarise(rows, EvaluationConfig(), seed=0)}
    assert len(summary) == 4
    found = {metric: summary[metric, "sft"] for metric in ("object_f1", "hallucinated_share")}
    assert {metric: row["difference"] for metric, row in found.items()} == {
        "object_f1": 0.25,
        "hallucinated_share": -0.25,
    }
    assert [row["higher_is_better"] for row in found.values()] == [True, False]
    alone = summarise([row for row in rows if row["model"] == "sft"], EvaluationConfig(), seed=0)
    assert [row["difference"] for row in alone] == [None, None], "without the base model there is nothing to compare"


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
    same = ("benchmark", "id", "question", "choices", "answers", "metrics", "vocabulary")
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
        ({"question": "q", "answer": "a", "metric": ["contains", "exact"]}, "unknown metric 'exact'. Did you mean"),
        ({"question": "q", "answer": "a", "metric": [["contains"]]}, "unknown metric"),
        (
            {"question": "q", "answer": "A", "choices": ["x", "y"], "metric": ["multiple_choice", "contains"]},
            "together",
        ),
        ({"question": "q", "answer": "a", "metric": ["contains", "object_f1"]}, "'object_f1' and 'contains' need diff"),
        ({"question": "q", "answer": "maybe", "metric": "yes_no"}, "'maybe' is neither 'yes' nor 'no'"),
        ({"question": "q", "answers": [], "metric": "contains"}, "neither 'answer' nor 'answers'"),
        ({"question": "q", "metric": "object_f1", "vocabulary": ["cat"]}, "neither 'answer' nor 'answers'"),
        ({"question": "q", "answers": [], "metric": "object_f1"}, "metric object_f1 needs 'vocabulary'"),
        ({"question": "q", "answers": [], "metric": "object_f1", "vocabulary": []}, "needs 'vocabulary'"),
        ({"question": "q", "answers": [], "metric": "object_f1", "vocabulary": ["cat", "dog| "]}, "none of them empty"),
        ({"question": "q", "answers": [], "metric": "object_f1", "vocabulary": [1]}, "needs 'vocabulary'"),
        ({**OBJECTS, "answers": ["cats"]}, "'cats' is no name in 'vocabulary'. Did you mean 'cat'"),
        ({**OBJECTS, "answers": ["puppy"]}, "'puppy' is no name in 'vocabulary'"),
        ({**OBJECTS, "vocabulary": ["dog|Pet", "cat|pet"]}, "'pet' stands in more than one entry"),
    ],
)
def test_a_wrong_row_is_named_in_one_line(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": "q", "answer": "a"}) + "\n" + json.dumps(row))
    with pytest.raises(SourceError, match=message) as caught:
        read_benchmark(str(tmp_path / "b.jsonl"))
    assert "row 1" in str(caught.value) and "\n" not in str(caught.value)


def test_the_rows_that_the_documentation_shows_are_read(tmp_path: Path) -> None:
    documented = (Path(__file__).parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")
    (tmp_path / "shown.jsonl").write_text(documented.partition("```json\n")[2].partition("```")[0])
    metrics = [question["metrics"] for question in read_benchmark(str(tmp_path / "shown.jsonl"))]
    assert metrics == [["multiple_choice"], ["exact_match"], ["yes_no"], OBJECTS["metric"]]


def test_ids_must_be_unique(tmp_path: Path) -> None:
    line = json.dumps({"id": 1, "question": "q", "answer": "a"})
    (tmp_path / "b.jsonl").write_text(f"{line}\n{line}")
    with pytest.raises(SourceError, match="id '1' more than once"):
        read_benchmark(str(tmp_path / "b.jsonl"))


LOOKING = """
rules:
  - {prompt: "Is there", answer: "No, there is none."}
  - {prompt: "Image description", answer: "A puppy sits beside a cat and nothing else."}
  - {prompt: "What is there", answer: "Two dogs and a bus."}
default: "A picture."
"""


@pytest.mark.usefixtures("ray_session")
def test_one_response_is_scored_by_several_metrics(tmp_path: Path) -> None:
    """The response has more words than an answer may have, fewer than a description may."""
    pictures = draw_pictures(tmp_path / "pictures", 1)
    rows = [OBJECTS, {**OBJECTS, "answers": []}, {**OBJECTS, "image": "missing.jpg"}]
    rows.append({"image": "000.jpg", "question": "Is there a bus?", "answer": "no", "metric": "yes_no"})
    (pictures / "objects.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    settings = {"benchmarks": [str(pictures / "objects.jsonl")], "max_answer_tokens": 3}
    config = fake_config(tmp_path, pictures, LOOKING, evaluation=settings)
    output = RunDir.of(str(tmp_path / "run")) / "evaluation"
    accounts = evaluate(config, output, {"base": None})

    found = output.read_table("predictions-base", PREDICTIONS).to_pylist()
    by_key = {(row["id"], row["metric"], row["mode"]): row for row in found}
    assert len(by_key) == len(found) == (2 * 3 + 1) * 2
    assert accounts["num_rows_in"] == (3 * 3 + 1) * 2 and accounts["rejected_by_reason"] == {"unreadable_file": 6}
    direct, described = (by_key["0", "object_f1", mode] for mode in ("direct", "describe_and_respond"))
    assert direct["prompt"] == "What is there?" and described["prompt"].endswith("A picture.\n\nWhat is there?")
    assert (direct["prediction"], direct["response"]) == ("dog, bus", "Two dogs and a bus.")
    assert (direct["score"], described["score"]) == (0.5, 1.0)
    assert by_key["0", "hallucinated_share", "direct"]["score"] == 0.5
    assert by_key["1", "any_hallucination", "direct"]["answers"] == []
    asked = by_key["3", "yes_no", "direct"]
    assert "\nAnswer with a single word" in asked["prompt"]
    assert (asked["response"], asked["prediction"], asked["score"]) == ("No, there is", "no", 1.0)
    scores = {(row["metric"], row["mode"]): row for row in output.read_json("scores.json")}
    assert len(scores) == 4 * 2
    assert scores["any_hallucination", "direct"]["score"] == 1.0
    assert scores["any_hallucination", "describe_and_respond"]["score"] == 0.5
    assert scores["any_hallucination", "describe_and_respond"]["higher_is_better"] is False


@pytest.mark.usefixtures("ray_session")
def test_modes_that_are_not_asked_for_cost_nothing(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 3)
    settings = {"benchmarks": [str(write_benchmark(pictures))], "modes": ["direct"]}
    config = fake_config(tmp_path, pictures, SCRIPT, evaluation=settings)
    output = RunDir.of(str(tmp_path / "run")) / "evaluation"
    accounts = evaluate(config, output, {"base": None})
    rows = output.read_table("predictions-base", PREDICTIONS).to_pylist()
    assert {row["mode"] for row in rows} == {"direct"} and {row["description"] for row in rows} == {None}
    assert accounts["num_rows_in"] == 5 and len(rows) == 4 and accounts["rejected_by_reason"] == {"unreadable_file": 1}
    assert {row["mode"] for row in output.read_json("scores.json")} == {"direct"}


class CountingEngine:
    """Answers with the number of the request."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, int]] = []

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        start = len(self.requests)
        self.requests += [(request.prompt, sampling.max_new_tokens) for request in requests]
        return [Answer(f"answer {start + i}", 2, "stop", 0, 0) for i in range(len(requests))]


def test_what_is_asked_twice_of_a_picture_is_generated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The two rows of a Parquet file share its path, but not their picture."""
    pictures = draw_pictures(tmp_path / "pictures", 2)
    engine = CountingEngine()
    monkeypatch.setattr("stic_ray.stages.evaluation.open_trained", lambda *_: engine)
    config = fake_config(tmp_path, pictures)
    in_table = [
        {"image": {"bytes": (pictures / f"{number}.jpg").read_bytes()}, "question": question, "answer": "yes"}
        for number, question in (("000", "One?"), ("000", "Two?"), ("001", "One?"))
    ]
    pq.write_table(pa.Table.from_pylist(in_table), tmp_path / "in_table.parquet")
    rows = [
        {"image": "000.jpg", "question": question, "answer": "yes"} for question in ("One?", "Two?", "One?", "Three?")
    ]
    (pictures / "beside.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    num_generated = []
    for benchmark in (pictures / "beside.jsonl", tmp_path / "in_table.parquet"):
        shard = load_questions(ShardTask(0, {"rows": read_benchmark(str(benchmark))}), 10**6)
        engine.requests.clear()
        worker = Respondent(config, load_prompts(None), "base", None)
        questions = [worker.prepare(row) for row in shard.to_pylist()]
        answers = worker.answer(questions)
        num_generated.append(len(engine.requests))
        found = [
            row
            for question, answer in zip(questions, answers, strict=True)
            for row in worker.finish(question, answer)["predictions"]
        ]
        assert len(found) == 2 * shard.num_rows
        for row in found:
            assert engine.requests[int(row["response"].split()[1])][0] == row["prompt"]
    assert num_generated == [1 + 2 * 3, 3 + 3 + 3]


@pytest.mark.usefixtures("ray_session")
def test_questions_about_an_image_meet_wherever_they_stand(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 4)
    names = [f"{number:03d}.jpg" for number in (2, 0, 3, 1)] * 2
    rows = [{"image": name, "question": f"Question {n}?", "answer": "no"} for n, name in enumerate(names)]
    (pictures / "apart.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    settings = {"benchmarks": [str(pictures / "apart.jsonl")]}
    config = fake_config(tmp_path, pictures, SCRIPT, evaluation=settings)
    output = RunDir.of(str(tmp_path / "run")) / "evaluation"
    evaluate(config, output, {"base": None})
    ids = [row["id"] for row in output.read_table("predictions-base", PREDICTIONS).to_pylist()[::2]]
    assert [names[int(each)] for each in ids] == sorted(names)
