"""Instruction data: rejected row by row, sampled by the seed, with ids of their own, in little memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stic_ray.core.config import InfusionConfig, RunConfig
from stic_ray.core.errors import SourceError
from stic_ray.core.rundir import RunDir
from stic_ray.stages.instructions import index_instructions, load_instructions, read_instructions
from tests.stages.builders import draw_pictures


def turns(question: str = "q", answer: str = "a") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def row(name: Any = "x", question: str = "q", **fields: Any) -> dict[str, Any]:
    return {"id": name, "conversations": turns(question), **fields}


def written(folder: Path, rows: list[Any]) -> Path:
    (folder / "rows.jsonl").write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in rows))
    return folder / "rows.jsonl"


def read(source: Path) -> list[dict[str, Any]]:
    return list(read_instructions(InfusionConfig(source=str(source))))


def test_rows_that_name_a_picture_and_have_none_are_rejected_each_with_its_reason(tmp_path: Path) -> None:
    rows = [
        row("text"),
        row("image", "<image>\nq", image="a.jpg"),
        row("images", "<image>\nq", images=["a.jpg"]),
        row("no token", image="a.jpg"),
        row("token", "<image>\nq"),
        row("null", "<image>\nq", image=None),
        row("misnamed", img="a.jpg"),
        row("several", "<image><image>", images=["a.jpg", "b.jpg"]),
        row("video", video="a.mp4"),
        row("video token", "<video>\nq"),
        row("audio", audio="a.wav"),
        row("inline", "<image>", image="data:image/png;base64,AAAA"),
        row("above", image="../private/passport.png"),
        row("elsewhere", image="/etc/passwd"),
        row("server", image="s3://bucket/a.png?endpoint_override=127.0.0.1:9"),
        '{"id": "cut off", "conver',
        "[]",
        {"id": "no turns", "conversations": "soon"},
        {"id": "deep", "conversations": [[[[[]]]]]},
    ]
    found = {each["id"]: (each["reason"], each["path"]) for each in read(written(tmp_path, rows))}
    picture = str(tmp_path / "a.jpg")
    assert found == {
        "text": (None, None),
        **{name: (None, picture) for name in ("image", "images", "no token")},
        **{name: ("no_image", None) for name in ("token", "null", "misnamed", "inline")},
        "several": ("several_images", None),
        "video": ("video", None),
        "video token": ("video", None),
        "audio": ("audio", None),
        **{name: ("unreadable_file", None) for name in ("above", "elsewhere", "server")},
        "15": ("unreadable_row", None),
        "16": ("unreadable_row", None),
        "no turns": ("bad_conversation", None),
        "deep": ("bad_conversation", None),
    }


def test_a_problem_says_where_it_is(tmp_path: Path) -> None:
    problems = [each["problem"] for each in read(written(tmp_path, [row(), "{", row("y", "<image>")]))]
    assert problems[0] is None and problems[1].startswith("row 1 (line 2): Expecting property name")
    assert problems[2] == "row 2 (line 3): the text has <image>, but the row has no image"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(img="a.jpg"), row(img="b.jpg")], "names no picture.*'img'.*the field is 'image'"),
        ([row(image_path="a.jpg")] * 3, "'image_path'"),
        ([row("x", "<image>\nq")] * 3, "the text has <image>, but the row has no image"),
        ([row(video="a.mp4")] * 3, "only images can be shown"),
        (["nonsense"] * 3, "row 0 .line 1.: Expecting value.*list of rows"),
    ],
)
def test_a_file_of_such_rows_only_is_refused_before_anything_is_spent(
    rows: list[Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        read_instructions(InfusionConfig(source=str(written(tmp_path, rows))))
    assert "\n" not in str(caught.value)


def test_conversations_as_text_in_parquet_are_read(tmp_path: Path) -> None:
    spelled = [json.dumps(turns()), str(turns()), "nothing", json.dumps(turns(answer="\ud83d"))]
    pq.write_table(pa.table({"conversations": spelled}), tmp_path / "rows.parquet")
    found = read(tmp_path / "rows.parquet")
    assert [each["id"] for each in found] == ["0", "1", "2", "3"]
    assert (
        found[0]["messages"]
        == found[1]["messages"]
        == [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
        ]
    )
    assert found[2]["reason"] == "bad_conversation" and "'nothing'" in found[2]["problem"]
    assert found[3]["messages"][1]["content"] == "\ufffd"


def config_of(source: Path, num_rows: int | None = None, seed: int = 0) -> RunConfig:
    return RunConfig(name="x", seed=seed, infusion=InfusionConfig(source=str(source), num_rows=num_rows))


def indexed(config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    tasks, num_rows = index_instructions(config, RunDir.of(str(folder)))
    rows = [each for task in tasks for each in load_instructions(task, 10**6).to_pylist()]
    assert len(rows) == num_rows
    return rows


def test_ids_that_repeat_stay_apart(tmp_path: Path) -> None:
    names = ["a", None, float("nan"), "a", "", "a#3", "a", 1, "1"]
    found = [
        each["id"] for each in indexed(config_of(written(tmp_path, [row(name) for name in names])), tmp_path / "i")
    ]
    assert found == ["a", "1", "2", "a#3", "4", "a#3#5", "a#6", "1#7", "1#8"]


@pytest.mark.parametrize("num_rows", [1, 7, 30, 50])
def test_a_sample_is_the_seeds_alone_and_in_the_order_of_the_source(num_rows: int, tmp_path: Path) -> None:
    source = written(tmp_path, [row(number) for number in range(30)])
    drawn = [[int(each["id"]) for each in indexed(config_of(source, num_rows), tmp_path / name)] for name in "ab"]
    assert drawn[0] == drawn[1] == sorted(drawn[0]) and len(set(drawn[0])) == min(num_rows, 30)
    assert set(drawn[0]) >= {int(each["id"]) for each in indexed(config_of(source, 1), tmp_path / "one")}
    other = [int(each["id"]) for each in indexed(config_of(source, num_rows, seed=1), tmp_path / "c")]
    assert (other == drawn[0]) == (num_rows >= 30)


def test_the_source_is_read_once(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 2)
    source = written(pictures, [row("a", "<image>\nq", image="000.jpg"), row("b"), "{"])
    before = indexed(config_of(source), tmp_path / "index")
    source.unlink()
    assert indexed(config_of(source), tmp_path / "index") == before
    assert before[0]["encoded"] == (pictures / "000.jpg").read_bytes() and before[1]["encoded"] is None


READ = """
import sys
import pandas  # as pyarrow does when it makes its first table
from stic_ray.core.rundir import RunDir
from tests.stages.test_instructions import config_of, index_instructions
from pathlib import Path
peak = lambda: int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak()
print(index_instructions(config_of(Path(sys.argv[1]), eval(sys.argv[2])), RunDir.of(sys.argv[3]))[1])
print((peak() - before) / 1024)
"""


def test_a_large_file_is_not_held_in_memory(tmp_path: Path) -> None:
    """32 MiB in a list, of which the parsed rows would take several times as much."""
    some = json.dumps([row(number, "word " * 100, notes=["more"] * 20) for number in range(1000)])[1:-1]
    with (tmp_path / "rows.json").open("w") as file:
        file.write(f"[{', '.join([some] * (2**25 // len(some)))}]")
    command = [sys.executable, "-c", READ, str(tmp_path / "rows.json"), "10_000", str(tmp_path / "index")]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(found[0]) >= 10_000 and float(found[1]) < 48, "MiB more than before"
