"""JSON in pieces: lists and lines, every encoding, damaged values that do not stop the others."""

import io
import json
from typing import Any

import pyarrow as pa
import pytest

from stic_ray.core import json_stream
from stic_ray.core.json_stream import json_values, literal

GOOD = [{"id": number, "text": f'é\u2028☃ \U0001f600 {{["\\{number}'} for number in range(5)]


def values_of(content: bytes) -> list[tuple[int, Any, str | None]]:
    return list(json_values(pa.PythonFile(io.BytesIO(content), "r")))


def good_of(content: bytes) -> list[Any]:
    return [value for _, value, problem in values_of(content) if problem is None]


def lines(rows: list[Any], end: str = "\n") -> str:
    return end.join(json.dumps(row, ensure_ascii=False) for row in rows)


LAYOUTS = {
    "list": json.dumps(GOOD, ensure_ascii=False),
    "indented list": json.dumps(GOOD, ensure_ascii=False, indent=4),
    "list of lines": "[\n" + lines(GOOD, ",\n") + "\n]\n",
    "lines": lines(GOOD),
    "lines with blank ones": "\n\n" + lines(GOOD, "\n\n") + "\n\n",
    "lines of CRLF": lines(GOOD, "\r\n") + "\r\n",
    "lines of CR": lines(GOOD, "\r"),
    "objects over several lines": "\n".join(json.dumps(row, ensure_ascii=False, indent=2) for row in GOOD),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk_bytes", [4, 1 << 20])
def test_every_layout_in_every_encoding(
    layout: str, encoding: str, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK_CHARACTERS", chunk_bytes)
    assert good_of(LAYOUTS[layout].encode(encoding)) == GOOD


DAMAGED = [
    '{"id": 1, "text": }',
    '{"id": 1, "text": "no end}',
    '{"id": 1',
    '{"id": 1, "text": undefined}',
    "{'id': 1}",
    "nothing",
    '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    '{"a": ' + "9" * 5000 + "}",
]


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("number", [0, 2, 5])
def test_a_damaged_line_does_not_stop_the_others(damaged: str, number: int) -> None:
    rows = [json.dumps(row) for row in GOOD]
    found = values_of("\n".join([*rows[:number], damaged, *rows[number:]]).encode())
    assert [value for _, value, problem in found if problem is None] == GOOD
    assert [line for line, _, problem in found if problem] == [number + 1]


@pytest.mark.parametrize("damaged", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("separator", [",\n", ",\n    "])
def test_a_damaged_row_of_a_list_does_not_stop_the_others(damaged: str, separator: str) -> None:
    blank = separator.strip(",")
    rows = [json.dumps(row) for row in GOOD]
    found = values_of(f"[{blank}{separator.join([*rows[:2], damaged, *rows[2:]])}\n]".encode())
    assert [value for _, value, problem in found if problem is None] == GOOD
    assert [line for line, _, problem in found if problem] == [4]


@pytest.mark.parametrize(
    "damaged",
    [
        *(DAMAGED[number] for number in (0, 1, 2, 3, 4, 6, 7)),
        '{"a": [{"b": ]}',
        '{"id": 1, "text": "a board 5" long"}',
        '{"id": 1, "text": "a", "inner": [{"b": "x"}, {"b": "5" long"}]}',
    ],
)
def test_a_damaged_row_of_a_list_on_one_line_does_not_stop_the_others(damaged: str) -> None:
    rows = [json.dumps(row) for row in GOOD]
    found = values_of(f"[{', '.join([*rows[:2], damaged, *rows[2:]])}]".encode())
    assert [value for _, value, problem in found if problem is None] == GOOD
    assert sum(problem is not None for _, _, problem in found) == 1


STRAY = ['"a 5" long text"', '"a 5" long" text"', '"no end, {', '[{"id": 1, "x": "5" y"}, {"id": 2}]']


@pytest.mark.parametrize(
    ("damaged", "number"), [*((damaged, number) for damaged in STRAY[:3] for number in (0, 2, 5)), (STRAY[3], 2)]
)
def test_a_stray_quote_on_one_line_costs_its_own_row(damaged: str, number: int) -> None:
    """Neighbours begin with other keys, lack one, and hold objects of their own, on a line of some length."""
    turns = [{"from": "human", "value": "a, {b}"}, {"from": "gpt", "value": "]}, {["}]
    good = [{"id": "0", "image": "a", "turns": turns}, {"image": "a", "turns": turns, "id": "1"}] * 2
    good += [{"id": "2", "turns": turns}, {"turns": turns, "id": "3" * 1000}]
    rows = [json.dumps(row) for row in good]
    rows.insert(number, f'{{"id": "x", "turns": {damaged}, "image": "b"}}')
    found = values_of(f"[{', '.join(rows)}]".encode())
    assert [value for _, value, problem in found if problem is None] == good
    assert [place for place, (_, _, problem) in enumerate(found) if problem] == [number]


def test_a_row_that_ends_too_early_costs_none_of_the_lines_below_it() -> None:
    early = '{"id": 9, "a": 1, "b": 2, "c": 3}]}'  # what is behind its end stands in the middle of a line
    rows = [json.dumps(row, ensure_ascii=False) for row in GOOD]
    content = "[\n" + ",\n".join([rows[0], early, *rows[1:]]) + "\n]"
    assert [row for row in good_of(content.encode()) if row["id"] != 9] == GOOD


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_list_that_was_cut_off_keeps_what_is_whole(cut: int) -> None:
    found = values_of(json.dumps(GOOD).encode()[:-cut])
    num_whole = 5 if cut == 1 else 4
    assert [value for _, value, problem in found if problem is None] == GOOD[:num_whole]
    assert sum(problem is not None for _, _, problem in found) == 1


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (r'{"a": "A nice day \ud83d"}', {"a": "A nice day \ufffd"}),
        (r'{"\uDC00": [{"b": "\uDC00\uD83D\uDE00"}]}', {"\ufffd": [{"b": "\ufffd\U0001f600"}]}),
        ('{"a": "a\tb"}', {"a": "a\tb"}),
        ('{"a": NaN, "b": Infinity}', None),
    ],
)
def test_values_that_other_parsers_refuse(written: str, expected: Any) -> None:
    (found,) = good_of(written.encode())
    assert found == expected if expected else list(found) == ["a", "b"]


def test_bytes_that_are_no_utf_8_are_the_problem_of_their_row() -> None:
    content = b'{"a": 1}\n{"a": "caf\xe9"}\n{"a": 2}'
    assert good_of(content) == [{"a": 1}, {"a": 2}]
    assert values_of(content)[1] == (2, None, "the byte 0xE9 is no UTF-8")


def test_lists_one_behind_the_other_are_one() -> None:
    assert good_of(b'[{"a": 1}]\n[{"a": 2}, {"a": 3}]\n') == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_a_row_without_end_does_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK_CHARACTERS", 100)
    monkeypatch.setattr(json_stream, "_MAX_VALUE_CHARACTERS", 1000)
    content = b'{"a": 1}\n{"a": "' + b"x" * 5000 + b'"}\n{"a": 2}'
    assert good_of(content) == [{"a": 1}, {"a": 2}]
    assert good_of(b"[" + content.replace(b"\n", b", ") + b"]") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("['a', None]", ["a", None]),
        ('["a", null]', ["a", None]),
        (r'["\ud83d"]', ["\ufffd"]),
        ("a, b", "a, b"),
        ("[" * 100_000, "[" * 100_000),
        ("__import__('os')", "__import__('os')"),
        ("", ""),
    ],
    ids=range(7),
)
def test_a_text_that_spells_a_list(text: str, expected: Any) -> None:
    assert literal(text) == expected
