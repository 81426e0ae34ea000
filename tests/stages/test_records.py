"""Rows of users' files: found by content under any name, a few in memory, bad ones named and the others kept."""

import bz2
import gzip
import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from stic_ray.core.errors import Rejected, SourceError
from stic_ray.stages.records import InTable, image_place, load_records, plain_text, read_rows, row_id

ROWS = [{"id": str(number), "image": f"{number}.jpg", "text": "x"} for number in range(3)]
LINES = "\n".join(map(json.dumps, ROWS)).encode()


def values_of(path: Path) -> list[dict[str, Any] | None]:
    return [row.value for row in read_rows(str(path), "infusion.source")[1]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((name, LINES) for name in ("rows.json", "rows.jsonl", "rows.JSONL", "rows.ndjson", "rows.txt", "rows")),
        ("rows.jsonl", json.dumps(ROWS).encode()),
        ("rows.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("rows.json.gz", gzip.compress(LINES[:50], mtime=0) + gzip.compress(LINES[50:], mtime=0)),
        ("rows.json", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("rows.jsonl.bz2", bz2.compress(LINES)),
        ("rows.jsonl.zst", pa.Codec("zstd").compress(LINES, asbytes=True)),
    ],
)
def test_the_content_says_what_a_file_is(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert values_of(tmp_path / name) == ROWS


@pytest.mark.parametrize("name", ["rows.parquet", "rows.pq", "rows"])
def test_parquet_is_known_under_any_name(name: str, tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / name, row_group_size=2)
    assert values_of(tmp_path / name) == ROWS


def test_bad_rows_are_named_by_number_and_line(tmp_path: Path) -> None:
    content = b'{"id": 1}\n\nnonsense\n[1, 2]\n{}\n{"id": "\xff"}\n{"id": 2}\n'
    (tmp_path / "rows.jsonl").write_bytes(content)
    rows = list(read_rows(str(tmp_path / "rows.jsonl"), "infusion.source")[1])
    assert [row.value for row in rows] == [{"id": 1}, None, None, None, None, {"id": 2}]
    assert [row.place for row in rows][1:3] == ["row 1 (line 3)", "row 2 (line 4)"]
    problems = ["Expecting value", "no object, but [1, 2]", "an object without fields", "the byte 0xFF is no UTF-8"]
    assert [row.problem for row in rows[1:5]] == problems


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no rows"), (b" \n", "holds no rows"), (b"[]", "holds no rows"), (b"PAR1PAR1", "cannot be read")],
)
def test_a_file_without_rows_is_refused_in_one_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_bytes(content)
    with pytest.raises(SourceError, match=message) as caught:
        values_of(tmp_path / "rows.json")
    assert "\n" not in str(caught.value) and "infusion.source" in str(caught.value)


def test_a_damaged_archive_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "rows.gz").write_bytes(gzip.compress(LINES)[:60] + b"\0" * 9)
    with pytest.raises(SourceError, match="cannot be read"):
        values_of(tmp_path / "rows.gz")


def test_text_of_a_table_that_is_no_utf_8_is_the_problem_of_its_row(tmp_path: Path) -> None:
    broken = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"id": broken, "n": [1, 2, 3]}), tmp_path / "rows.parquet")
    rows = list(read_rows(str(tmp_path / "rows.parquet"), "infusion.source")[1])
    assert [row.value for row in rows] == [{"id": "a", "n": 1}, None, {"id": "c", "n": 3}]
    assert "no UTF-8" in (rows[1].problem or "")


def test_a_date_that_python_cannot_hold_costs_no_row(tmp_path: Path) -> None:
    dates = pa.array([0, 2**62], pa.timestamp("us"))
    pq.write_table(pa.table({"id": ["a", "b"], "date": dates}), tmp_path / "rows.parquet")
    assert [(value or {})["id"] for value in values_of(tmp_path / "rows.parquet")] == ["a", "b"]


def picture(colour: str) -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(sink, "PNG")
    return sink.getvalue()


RED, BLUE = picture("red"), picture("blue")
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COLUMNS = {
    "binary": ("image", pa.array([RED, BLUE, None])),
    "binary without null": ("image", pa.array([RED, BLUE])),
    "struct": ("image", pa.array([{"bytes": RED, "path": "r"}, {"bytes": BLUE, "path": None}, None], STRUCT)),
    "struct without null": ("image", pa.array([{"bytes": RED, "path": "r"}, {"bytes": BLUE, "path": None}], STRUCT)),
    "list of one": ("images", pa.array([[{"bytes": RED, "path": None}], [{"bytes": BLUE}], []], pa.list_(STRUCT))),
    "dictionary": ("image", pa.array([RED, BLUE, None]).dictionary_encode()),
    "view": ("image", pa.array([RED, BLUE, None], pa.binary_view())),
    "large": ("images", pa.array([RED, BLUE, None], pa.large_binary())),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_bytes_of_a_table_stay_there_until_they_are_asked_for(kind: str, tmp_path: Path) -> None:
    name, column = COLUMNS[kind]
    table = pa.table({"id": [str(i) for i in range(len(column))], name: column})
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    source, rows = read_rows(str(tmp_path / "rows.parquet"), "infusion.source")
    values = [row.value or {} for row in rows]
    assert [value[name] for value in values[:2]] == [InTable(name, 0), InTable(name, 1)]
    places = [image_place(value, ("id",), source, source.folder) for value in values]
    assert all(place["path"] is None for place in places[2:])
    schema = pa.schema([("path", pa.string()), ("column", pa.string()), ("row", pa.int64())])
    assert load_records(places, schema, 10**6)["encoded"].to_pylist() == [RED, BLUE, None][: len(column)]


@pytest.mark.parametrize("kind", ["binary", "struct", "dictionary", "large"])
def test_pictures_under_another_name_are_named_and_other_bytes_are_not(kind: str, tmp_path: Path) -> None:
    """A row must not be asked without the picture that it holds; an embedding is none."""
    _, column = COLUMNS[kind]
    table = pa.table({"id": ["a", "b", "c"], "thumb": column, "vector": [b"\0\1\2\3"] * 3})
    pq.write_table(table, tmp_path / "rows.parquet")
    source, rows = read_rows(str(tmp_path / "rows.parquet"), "infusion.source")
    values = [row.value or {} for row in rows]
    with pytest.raises(Rejected, match="no_image: .*thumb"):
        image_place(values[0], ("id",), source, source.folder)
    assert image_place(values[2], ("id",), source, source.folder)["path"] is None


def test_addresses_in_a_struct_are_taken_where_there_are_no_bytes(tmp_path: Path) -> None:
    column = pa.array([{"bytes": None, "path": "a.png"}, {"bytes": RED, "path": "b.png"}], STRUCT)
    pq.write_table(pa.table({"image": column}), tmp_path / "rows.parquet")
    assert values_of(tmp_path / "rows.parquet") == [{"image": "a.png"}, {"image": InTable("image", 1)}]


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    rows = [{"id": str(number), "text": f"{number} " * 50} for number in range(30)]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=10, compression="gzip")
    chunk = pq.read_metadata(path).row_group(1).column(1)
    content = bytearray(path.read_bytes())
    for place in range(chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size // 2):
        content[place] ^= 0xFF
    path.write_bytes(content)
    found = list(read_rows(str(path), "infusion.source")[1])
    assert [row.number for row in found] == list(range(30))
    assert [row.value for row in found] == [*rows[:10], *[None] * 10, *rows[20:]]
    assert all(row.problem for row in found[10:20])


def test_decimals_are_numbers(tmp_path: Path) -> None:
    column = pa.array([Decimal("1.00"), None, Decimal("2.50")])
    pq.write_table(pa.table({"id": column}), tmp_path / "rows.parquet")
    assert [row_id((value or {})["id"]) for value in values_of(tmp_path / "rows.parquet")] == ["1", None, "2.5"]


def test_what_pandas_writes_is_read(tmp_path: Path) -> None:
    frame = pd.DataFrame({"id": [1, None, 3], "image": ["a", None, np.nan]})
    frame.to_json(tmp_path / "rows.jsonl", orient="records", lines=True)
    frame.to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.parquet"):
        assert [row_id((value or {})["id"]) for value in values_of(tmp_path / name)] == ["1", None, "3"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), (float("nan"), None), ("", None), (7, "7"), (7.0, "7"), (7.5, "7.5"), ("a", "a"), ([1], "[1]")],
)
def test_ids_are_text_or_none(value: Any, expected: str | None) -> None:
    assert row_id(value) == expected


def test_whole_numbers_have_no_point() -> None:
    assert [plain_text(value) for value in ("2.0", 2.0, 2, 1e22)] == ["2.0", "2", "2", "10000000000000000000000"]
