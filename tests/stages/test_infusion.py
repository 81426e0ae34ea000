"""Stage `infusion`: rows conserved, descriptions in front of the first question, text-only rows passed through."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import SourceError
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import INFUSED
from stic_ray.stages.infusion import build_infusion
from stic_ray.stages.instructions import read_instructions
from tests.stages.builders import draw_pictures, fake_config, rejected_of, step_of

pytestmark = pytest.mark.usefixtures("ray_session")


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def rows_of(run: RunDir, family: str) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in (run / "infusion").read_table(family, INFUSED).to_pylist()}


def infuse(config: RunConfig, folder: Path) -> tuple[RunDir, dict[str, Any]]:
    run = RunDir.of(str(folder))
    return run, build_infusion(step_of(config, run, "infusion"))


def test_llava_json_becomes_infused_rows(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 3)
    (pictures / "bad.jpg").write_text("x")
    rows = [
        {"id": "one", "image": "000.jpg", "conversations": turns("<image>\nWhat is it?", "A circle.")},
        {"id": 2, "image": "001.jpg", "conversations": turns("What?\n<image>", "Red.", "Sure?", "Yes.")},
        {"id": "text", "conversations": turns("2 + 2?", "4")},
        {"id": "gone", "image": "none.jpg", "conversations": turns("<image>\nq", "a")},
        {"id": "broken", "image": "bad.jpg", "conversations": turns("<image>\nq", "a")},
        {"id": "odd", "image": "002.jpg", "conversations": turns("<image>\nq")},
        {"id": "several", "image": ["000.jpg", "001.jpg"], "conversations": turns("<image><image>\nq", "a")},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = fake_config(
        tmp_path,
        pictures,
        "default: 'Seen {colour}.'",
        infusion={"source": str(tmp_path / "rows.json"), "images": str(pictures)},
    )
    run, accounts = infuse(config, tmp_path / "run")

    infused, text = rows_of(run, "rows"), rows_of(run, "text")
    assert set(infused) == {"one", "2"} and set(text) == {"text"}
    first = infused["one"]["messages"]
    assert first[0]["content"] == f"Image description:\n{infused['one']['description']}\n\nWhat is it?"
    assert infused["one"]["description"].startswith("Seen #")
    assert [m["role"] for m in infused["2"]["messages"]] == ["user", "assistant", "user", "assistant"]
    assert infused["2"]["messages"][2:] == [
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes."},
    ]
    assert infused["one"]["image"]["bytes"] == (pictures / "000.jpg").read_bytes()
    assert text["text"]["messages"][0]["content"] == "2 + 2?" and text["text"]["image"] is None
    reasons = {row["image_id"]: row["reason"] for row in rejected_of(run, "infusion")}
    assert reasons == {
        "gone": "unreadable_file",
        "broken": "unsupported_format",
        "odd": "bad_conversation",
        "several": "several_images",
    }
    assert (accounts["num_rows_in"], accounts["num_rows_written"], accounts["num_rows_rejected"]) == (7, 3, 4)


def test_parquet_with_image_bytes_gives_the_same_rows_as_json(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 3)
    rows = [{"id": str(i), "image": f"{i:03d}.jpg", "conversations": turns("q", "a")} for i in range(3)]
    (pictures / "rows.json").write_text(json.dumps(rows))
    in_table = [{**row, "image": {"bytes": (pictures / row["image"]).read_bytes(), "path": None}} for row in rows]
    in_table.append({"id": "text", "image": None, "conversations": turns("q", "a")})
    pq.write_table(pa.Table.from_pylist(in_table), tmp_path / "rows.parquet")
    paths = pa.Table.from_pylist(rows)  # pandas writes its text as large_string
    at = paths.column_names.index("image")
    paths = paths.set_column(at, "image", paths["image"].cast(pa.large_string()))
    pq.write_table(paths, pictures / "paths.parquet")
    found = []
    sources = {
        "json": pictures / "rows.json",
        "parquet": tmp_path / "rows.parquet",
        "paths": pictures / "paths.parquet",
    }
    for name, source in sources.items():
        config = fake_config(tmp_path, pictures, infusion={"source": str(source)})
        run, _ = infuse(config, tmp_path / name)
        found.append({i: (row["image"]["bytes"], row["messages"]) for i, row in rows_of(run, "rows").items()})
    assert found[0] == found[1] == found[2] and len(found[0]) == 3
    assert set(rows_of(RunDir.of(str(tmp_path / "parquet")), "text")) == {"text"}


def test_a_sample_is_drawn_by_the_seed(tmp_path: Path) -> None:
    rows = [{"id": str(i), "conversations": turns("q", "a")} for i in range(30)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    drawn = []
    for seed in (1, 1, 2):
        config = fake_config(tmp_path, tmp_path, infusion={"source": str(tmp_path / "rows.json"), "num_rows": 5})
        run, accounts = infuse(config.model_copy(update={"seed": seed}), tmp_path / f"run{len(drawn)}")
        drawn.append(list(rows_of(run, "text")))
        assert accounts["num_rows_in"] == 5
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("{}", "list of rows"),
        ("[]", "holds no rows"),
        ('[{"conversation": 1}]', "Did you mean"),
    ],
)
def test_a_source_of_another_shape_is_told_in_one_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(content)
    config = fake_config(tmp_path, tmp_path, infusion={"source": str(tmp_path / "rows.json")})
    with pytest.raises(SourceError, match=message) as caught:
        read_instructions(config.infusion)
    assert "\n" not in str(caught.value)
