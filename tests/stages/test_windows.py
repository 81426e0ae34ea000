"""Windows of a shard: how a row ends, and how what goes wrong is narrowed down; deaths are known by their files."""

import json
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from stic_ray.core.config import ActorsConfig, ModelConfig
from stic_ray.core.errors import EngineError, Failed, ModelError, Rejected, StageError
from stic_ray.core.publishing import all_families
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import Reason
from stic_ray.engines.base import Request, Sampling
from stic_ray.engines.opening import open_engine
from stic_ray.stages import quarantine
from stic_ray.stages.quarantine import Quarantine, loading, nobody_has_loaded, notes_name
from stic_ray.stages.windows import Rows, RowWorker, Tables, Windows

ANSWERS = pa.schema([("number", pa.int64()), ("answer", pa.string())])
SHARD = pa.table({"number": range(10)})
PICTURE = Image.new("RGB", (8, 8))


class Asker:
    """Asks a fake engine about each number; notes which windows there were."""

    def __init__(self, folder: Path, script: str = "default: fine") -> None:
        (folder / "script.yaml").write_text(script)
        self.engine = open_engine(ModelConfig(engine="fake", path=str(folder / "script.yaml")), ActorsConfig())
        self.windows: list[list[int]] = []

    def identities(self, row: dict[str, Any]) -> list[dict[str, str]]:
        return [{"image_id": str(row["number"]), "path": f"{row['number']}.png"}]

    def prepare(self, row: dict[str, Any]) -> int:
        return row["number"]

    def answer(self, prepared: Sequence[int]) -> list[str]:
        self.windows.append(list(prepared))
        return [a.text for a in self.engine.generate([Request(f"<{n}>", PICTURE) for n in prepared], Sampling(9))]

    def finish(self, prepared: int, answer: str) -> Rows:
        return {"answers": [{"number": prepared, "answer": answer}]}


def tables_of(worker: RowWorker, folder: Path, actors: ActorsConfig | None = None, shard: pa.Table = SHARD) -> Tables:
    actors = actors or ActorsConfig(batch_size=4, windows_in_flight=2)
    quarantine = Quarantine(RunDir.of(str(folder)), 0, actors.max_retries)
    return Windows(worker, all_families({"answers": ANSWERS}), actors).do(shard, quarantine)


def do(
    worker: Asker, folder: Path, actors: ActorsConfig | None = None, shard: pa.Table = SHARD
) -> tuple[list[int], dict[str, str]]:
    """Take a shard through the worker: the numbers that were answered, and the messages of those that were not."""
    tables = tables_of(worker, folder, actors, shard)
    assert not tables["failed"].num_rows and set(tables["rejected"]["reason"].to_pylist()) <= {"engine_failed"}
    rejected = dict(
        zip(tables["rejected"]["image_id"].to_pylist(), tables["rejected"]["message"].to_pylist(), strict=True)
    )
    return tables["answers"]["number"].to_pylist(), rejected


def died(folder: Path, *working_on: str, **deaths: int) -> None:
    """Leave what an actor leaves that dies."""
    state = {"working_on": working_on, "deaths": {part.replace("_", "-").strip("-"): n for part, n in deaths.items()}}
    (folder / notes_name(0)).write_text(json.dumps(state))


def test_rows_keep_their_order_and_windows_their_size(tmp_path: Path) -> None:
    worker = Asker(tmp_path)
    assert do(worker, tmp_path) == (list(range(10)), {})
    assert sorted(worker.windows) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_windows_run_side_by_side_and_never_more_than_asked_for(tmp_path: Path) -> None:
    """Each window waits until another one is inside too: one at a time would wait for ever."""

    class Meeting(Asker):
        both = threading.Barrier(2, timeout=20)
        num_inside = most = 0

        def answer(self, prepared: Sequence[int]) -> list[str]:
            self.num_inside += 1
            self.most = max(self.most, self.num_inside)
            self.both.wait()
            self.num_inside -= 1
            return super().answer(prepared)

    worker = Meeting(tmp_path)
    do(worker, tmp_path, ActorsConfig(batch_size=1, windows_in_flight=2))
    assert worker.most == 2


def test_the_image_that_the_engine_raises_at_is_rejected_and_no_other(tmp_path: Path) -> None:
    worker = Asker(tmp_path, "default: fine\nfaults: [{prompt: <5>, happens: raise}]")
    assert do(worker, tmp_path) == (
        [0, 1, 2, 3, 4, 6, 7, 8, 9],
        {"5": "RuntimeError: the script raises at <5>"},
    )
    assert [0, 1, 2, 3] in worker.windows and [8, 9] in worker.windows, "the others are left alone"


def test_an_engine_that_raises_at_every_image_stops_the_stage(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="fails on every image, 4 one after another: .*the script raises"):
        do(Asker(tmp_path, "faults: [{happens: raise}]"), tmp_path)


def test_an_engine_that_answered_once_is_given_more_credit(tmp_path: Path) -> None:
    faults = ", ".join(f"{{prompt: <{n}>, happens: raise}}" for n in range(4, 10))
    numbers, rejected = do(Asker(tmp_path, f"faults: [{faults}]"), tmp_path)
    assert numbers == [0, 1, 2, 3] and len(rejected) == 6
    faults = ", ".join(f"{{prompt: <{n}>, happens: raise}}" for n in range(4, 20))
    with pytest.raises(StageError, match="8 one after another"):
        do(Asker(tmp_path, f"faults: [{faults}]"), tmp_path, shard=pa.table({"number": range(20)}))


def test_pictures_that_nobody_asked_the_engine_about_are_no_sign_of_life(tmp_path: Path) -> None:
    """An engine that died, and every third picture unreadable: it must not live on by those."""

    class Reader(Asker):
        def prepare(self, row: dict[str, Any]) -> int:
            if row["number"] % 3 == 0:
                raise Rejected(Reason.UNREADABLE_FILE, "gone")
            return super().prepare(row)

    faults = ", ".join(f"{{prompt: <{n}>, happens: raise}}" for n in range(4, 40))
    worker = Reader(tmp_path, f"faults: [{faults}]")
    with pytest.raises(StageError, match="8 one after another"):
        tables_of(worker, tmp_path, ActorsConfig(batch_size=1), pa.table({"number": range(40)}))


def test_an_error_of_the_user_stops_the_stage(tmp_path: Path) -> None:
    class Wrong(Asker):
        def prepare(self, row: dict[str, Any]) -> int:
            raise ModelError("not this model")

    with pytest.raises(ModelError, match="not this model"):
        do(Wrong(tmp_path), tmp_path)


def test_a_window_that_was_interrupted_once_is_done_whole(tmp_path: Path) -> None:
    died(tmp_path, "0-4", "4-8")
    worker = Asker(tmp_path)
    assert do(worker, tmp_path) == (list(range(10)), {})
    assert sorted(worker.windows) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_an_account_that_cannot_be_read_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / notes_name(0)).write_bytes(b"")
    assert do(Asker(tmp_path), tmp_path) == (list(range(10)), {})


def test_a_window_that_killed_twice_is_done_image_by_image(tmp_path: Path) -> None:
    died(tmp_path, "4-8", _4_8=1)
    worker = Asker(tmp_path)
    assert do(worker, tmp_path) == (list(range(10)), {})
    assert sorted(worker.windows) == [[0, 1, 2, 3], [4], [5], [6], [7], [8, 9]]


def test_an_image_that_killed_alone_twice_is_never_asked_about_again(tmp_path: Path) -> None:
    died(tmp_path, "6", _4_8=2, _6=1)
    worker = Asker(tmp_path)
    numbers, rejected = do(worker, tmp_path)
    assert numbers == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    assert rejected == {"6": "2 actors died, or hung until actors.timeout_s, over this image alone"}
    assert [6] not in worker.windows
    assert json.loads((tmp_path / notes_name(0)).read_text())["deaths"]["6"] == 2, "until the shard is published"


def test_an_engine_that_every_image_kills_stops_the_stage(tmp_path: Path) -> None:
    died(tmp_path, _0_4=2, _0=2, _1=2, _2=2)
    with pytest.raises(StageError, match="every image kills its actor: 3 one after another"):
        do(Asker(tmp_path), tmp_path)


@pytest.mark.parametrize("somebody_died", [False, True])
def test_what_is_being_worked_on_is_in_the_file_before_it_begins(tmp_path: Path, somebody_died: bool) -> None:
    """As one note for a shard that nobody has died over, and part by part from the first death on."""

    class Reader(Asker):
        def answer(self, prepared: Sequence[int]) -> list[str]:
            state = json.loads((tmp_path / notes_name(0)).read_text())
            seen.append((len(prepared), state["working_on"]))
            return super().answer(prepared)

    if somebody_died:
        died(tmp_path, "shard")
    seen: list[tuple[int, list[str]]] = []
    one_by_one = ActorsConfig(batch_size=4, windows_in_flight=1)
    do(Reader(tmp_path, "faults: [{prompt: <1>, happens: raise}]"), tmp_path, one_by_one)
    parts = ["0-4", "0", "1", "2", "3", "4-8", "8-10"] if somebody_died else ["shard"] * 7
    assert seen == [(size, [part]) for size, part in zip([4, 1, 1, 1, 1, 4, 2], parts, strict=True)]


def test_images_are_tried_alone_with_nothing_beside_them(tmp_path: Path) -> None:
    """Else a death would be blamed on whoever happened to be there too."""

    class Counting(Asker):
        inside = 0

        def answer(self, prepared: Sequence[int]) -> list[str]:
            self.inside += 1
            beside.append((len(prepared), self.inside))
            try:
                return super().answer(prepared)
            finally:
                beside.append((len(prepared), self.inside))
                self.inside -= 1

    beside: list[tuple[int, int]] = []
    script = "seconds_per_batch: 0.01\nfaults: [{prompt: <3>, happens: raise}]"
    do(Counting(tmp_path, script), tmp_path, ActorsConfig(batch_size=2, windows_in_flight=3))
    assert [inside for size, inside in beside if size == 1] == [1] * 4
    assert max(inside for _, inside in beside) > 1


def test_a_shard_that_kills_outside_of_generation_stops_the_stage_and_a_rerun_tries_again(tmp_path: Path) -> None:
    died(tmp_path, "packing", packing=4)
    quarantine = Quarantine(RunDir.of(str(tmp_path)), 0, 2)
    with (
        pytest.raises(StageError, match=r"5 actors died while packing shard 0\..*pool\.shard_size"),
        quarantine.handling("packing"),
    ):
        raise AssertionError("not reached")
    with Quarantine(RunDir.of(str(tmp_path)), 0, 2).handling("packing"):
        pass


def tries(folder: Path, num_times: int, error: str | None = None) -> None:
    """Leave what an actor leaves that failed to load so often."""
    (folder / "notes-abc.json").write_text(json.dumps({"num_times": num_times, "error": error}))


def test_an_actor_that_dies_while_loading_is_tried_so_many_times(tmp_path: Path) -> None:
    output = RunDir.of(str(tmp_path))
    tries(tmp_path, 2)
    with pytest.raises(StageError, match="died 2 times while it loaded the model"), loading(output, "abc", 2):
        raise AssertionError("not reached")
    tries(tmp_path, 3, "OSError: the hub answers 429")
    with pytest.raises(StageError, match="load the model, 3 times .*: OSError: the hub answers 429"):
        loading(output, "abc", 3).__enter__()
    for mistake in (ModelError, StageError):
        with pytest.raises(mistake), loading(output, "abc", 3):
            raise mistake("is not tried again")
        assert not (tmp_path / "notes-abc.json").exists()


def test_where_others_have_loaded_an_actor_is_tried_for_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "_MAX_WAIT_S", 0.0)
    output = RunDir.of(str(tmp_path))
    with loading(output, "other", 2):
        pass
    tries(tmp_path, 29)
    with loading(output, "abc", 2):
        pass
    tries(tmp_path, 30)
    with pytest.raises(StageError, match="died 30 times"):
        loading(output, "abc", 2).__enter__()
    nobody_has_loaded(output)
    tries(tmp_path, 29)
    with pytest.raises(StageError, match="died 29 times"):
        loading(output, "abc", 2).__enter__()


def test_an_error_while_loading_ends_the_process_and_is_remembered(tmp_path: Path) -> None:
    code = (
        "import sys; from stic_ray.core.rundir import RunDir; from stic_ray.stages.quarantine import loading\n"
        "with loading(RunDir.of(sys.argv[1]), 'abc', 3): raise ConnectionError('429 Too Many\\nRequests')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    note = json.loads((tmp_path / "notes-abc.json").read_text())
    assert note == {"num_times": 1, "error": "ConnectionError: 429 Too Many Requests"}


ODD: list[tuple[Callable[[], Exception], str]] = [
    (lambda: struct.error("required argument is not a float"), "struct.error: required argument is not a float"),
    (lambda: zlib.error("Error -3"), "zlib.error: Error -3"),
    (lambda: pa.ArrowInvalid("not\na column"), "pyarrow.lib.ArrowInvalid: not a column"),
    (lambda: UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates not allowed"), "UnicodeEncodeError: 'utf-8'"),
    (lambda: RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum"),
    (lambda: MemoryError(), "MemoryError: "),
    (lambda: OSError("image file is truncated"), "OSError: image file"),
    (lambda: KeyError("value"), "KeyError: 'value'"),
    (lambda: AssertionError(), "AssertionError: "),
]


@pytest.mark.parametrize("where", ["prepare", "finish"])
@pytest.mark.parametrize(("odd", "expected"), ODD, ids=[expected.split(":")[0] for _, expected in ODD])
def test_whatever_one_row_raises_rejects_that_row_and_says_what_and_where(
    odd: Callable[[], Exception], expected: str, where: str, tmp_path: Path
) -> None:
    class Stumbling(Asker):
        def prepare(self, row: dict[str, Any]) -> int:
            if where == "prepare" and row["number"] == 5:
                raise odd()
            return super().prepare(row)

        def finish(self, prepared: int, answer: str) -> Rows:
            if where == "finish" and prepared == 5:
                raise odd()
            return super().finish(prepared, answer)

    shard = SHARD.append_column("path", pa.array(["photos.parquet"] * 10)).append_column("row", pa.array(range(70, 80)))
    tables = tables_of(Stumbling(tmp_path), tmp_path, shard=shard)
    assert tables["answers"]["number"].to_pylist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    [row] = tables["rejected"].to_pylist()
    assert row["image_id"] == "5" and row["reason"] == "unexpected_error"
    assert row["message"].startswith(expected) and row["message"].endswith("('photos.parquet', row 75)")


@pytest.mark.parametrize("value", ["half of \ud83d", object(), 2**80], ids=["surrogate", "object", "huge"])
def test_a_row_that_no_table_can_hold_is_rejected_and_no_other(value: Any, tmp_path: Path) -> None:
    class Odd(Asker):
        def identities(self, row: dict[str, Any]) -> list[dict[str, str]]:
            return [{"image_id": str(row["number"]), "path": "half of \ud83d"}]

        def finish(self, prepared: int, answer: str) -> Rows:
            name = "number" if isinstance(value, int) else "answer"
            return {"answers": [{"number": prepared, "answer": answer} | ({name: value} if prepared == 5 else {})]}

    tables = tables_of(Odd(tmp_path), tmp_path)
    assert tables["answers"]["number"].to_pylist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    [row] = tables["rejected"].to_pylist()
    assert (row["image_id"], row["path"], row["reason"]) == ("5", "half of ?", "unexpected_error")


def test_rows_end_in_one_of_three_ways_wherever_that_is_found(tmp_path: Path) -> None:
    class Mixed(Asker):
        def prepare(self, row: dict[str, Any]) -> int:
            if row["number"] == 1:
                raise Rejected(Reason.TOO_SMALL, "1 px")
            if row["number"] == 2:
                raise Failed("the storage\nis away")
            return super().prepare(row)

        def answer(self, prepared: Sequence[int]) -> list[str]:
            if 8 in prepared:
                raise Failed("the engine is away")
            return super().answer(prepared)

        def finish(self, prepared: int, answer: str) -> Rows:
            if prepared == 5:
                raise Rejected(Reason.EMPTY_ANSWER, "no words")
            if prepared == 6:
                raise Failed("no licence left")
            return super().finish(prepared, answer)

    tables = tables_of(Mixed(tmp_path), tmp_path)
    assert tables["answers"]["number"].to_pylist() == [0, 3, 4, 7]
    rejected = [(row["image_id"], row["reason"], row["message"]) for row in tables["rejected"].to_pylist()]
    assert rejected == [("1", "too_small", "1 px"), ("5", "empty_answer", "no words")]
    failed = {row["image_id"]: (row["path"], row["message"]) for row in tables["failed"].to_pylist()}
    assert failed == {
        "2": ("2.png", "the storage is away"),
        "6": ("6.png", "no licence left"),
        "8": ("8.png", "the engine is away"),
        "9": ("9.png", "the engine is away"),
    }


def test_a_second_question_is_asked_about_the_finished_rows_of_a_window_only(tmp_path: Path) -> None:
    class Scoring(Asker):
        def prepare(self, row: dict[str, Any]) -> int:
            if row["number"] == 2:
                raise Rejected(Reason.TOO_SMALL, "1 px")
            return super().prepare(row)

        def complete(self, finished: Sequence[tuple[int, Rows]]) -> None:
            asked.append([number for number, _ in finished])
            for number, rows in finished:
                rows["answers"][0]["answer"] = f"scored {number}"

    asked: list[list[int]] = []
    tables = tables_of(Scoring(tmp_path), tmp_path)
    assert sorted(asked) == [[0, 1, 3], [4, 5, 6, 7], [8, 9]]
    assert tables["answers"]["answer"].to_pylist() == [f"scored {n}" for n in range(10) if n != 2]


def test_an_error_of_the_second_question_is_narrowed_down_like_one_of_the_first(tmp_path: Path) -> None:
    class Scoring(Asker):
        def complete(self, finished: Sequence[tuple[int, Rows]]) -> None:
            if any(number == 5 for number, _ in finished):
                raise EngineError("cannot score 5")

    assert do(Scoring(tmp_path), tmp_path) == ([0, 1, 2, 3, 4, 6, 7, 8, 9], {"5": "cannot score 5"})
