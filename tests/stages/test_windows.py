"""Windows of a shard, and how what goes wrong is narrowed down; deaths are told by the files that they leave."""

import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from stic_ray.core.config import ActorsConfig, ModelConfig
from stic_ray.core.errors import EngineError, ModelError, StageError
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import REJECTED
from stic_ray.engines.base import Request, Sampling
from stic_ray.engines.opening import open_engine
from stic_ray.method.preferences import Rejection
from stic_ray.stages.attempts import Attempts, attempts_name, loading
from stic_ray.stages.shards import rejected_row
from stic_ray.stages.windows import Rows, Windows

ANSWERS = pa.schema([("number", pa.int64()), ("answer", pa.string())])
SHARD = pa.table({"number": range(10)})
PICTURE = Image.new("RGB", (8, 8))


class Asker:
    """Asks a fake engine for each number; notes which windows there were."""

    def __init__(self, folder: Path, script: str = "default: fine") -> None:
        (folder / "script.yaml").write_text(script)
        self.engine = open_engine(ModelConfig(engine="fake", path=str(folder / "script.yaml")), ActorsConfig())
        self.windows: list[list[int]] = []

    def __call__(self, window: list[dict[str, Any]]) -> Rows:
        numbers = [row["number"] for row in window]
        self.windows.append(numbers)
        answers = self.engine.generate([Request(f"<{n}>", PICTURE) for n in numbers], Sampling(9))
        return {"answers": [{"number": n, "answer": a.text} for n, a in zip(numbers, answers, strict=True)]}

    def reject(self, row: dict[str, Any], rejection: Rejection) -> Rows:
        return {"rejected": [rejected_row(str(row["number"]), "", rejection)]}


def do(
    worker: Asker, folder: Path, actors: ActorsConfig | None = None, shard: pa.Table = SHARD
) -> tuple[list[int], dict[str, str]]:
    """Take a shard through the worker: the numbers that were answered, and the messages of those that were not."""
    actors = actors or ActorsConfig(batch_size=4, windows_in_flight=2)
    tables = Windows(worker, {"rejected": REJECTED, "answers": ANSWERS}, actors).do(
        shard, Attempts(RunDir.of(str(folder)), 0)
    )
    assert set(tables["rejected"]["reason"].to_pylist()) <= {"engine_failed"}
    rejected = dict(
        zip(tables["rejected"]["image_id"].to_pylist(), tables["rejected"]["message"].to_pylist(), strict=True)
    )
    return tables["answers"]["number"].to_pylist(), rejected


def died(folder: Path, *working_on: str, **deaths: int) -> None:
    """Leave what an actor leaves that dies."""
    state = {"working_on": working_on, "deaths": {part.replace("_", "-").strip("-"): n for part, n in deaths.items()}}
    (folder / attempts_name(0)).write_text(json.dumps(state))


def test_rows_keep_their_order_and_windows_their_size(tmp_path: Path) -> None:
    worker = Asker(tmp_path)
    assert do(worker, tmp_path) == (list(range(10)), {})
    assert sorted(worker.windows) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_windows_run_side_by_side_and_never_more_than_asked_for(tmp_path: Path) -> None:
    """Each window waits until another one is inside too: one at a time would wait for ever."""

    class Meeting(Asker):
        both = threading.Barrier(2, timeout=20)
        num_inside = most = 0

        def __call__(self, window: list[dict[str, Any]]) -> Rows:
            self.num_inside += 1
            self.most = max(self.most, self.num_inside)
            self.both.wait()
            self.num_inside -= 1
            return super().__call__(window)

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


def test_an_error_that_is_not_the_engines_stops_the_stage(tmp_path: Path) -> None:
    class Wrong(Asker):
        def __call__(self, window: list[dict[str, Any]]) -> Rows:
            raise ModelError("not this model")

    with pytest.raises(ModelError, match="not this model"):
        do(Wrong(tmp_path), tmp_path)


def test_a_window_that_was_interrupted_once_is_done_whole(tmp_path: Path) -> None:
    died(tmp_path, "0-4", "4-8")
    worker = Asker(tmp_path)
    assert do(worker, tmp_path) == (list(range(10)), {})
    assert sorted(worker.windows) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_an_account_that_cannot_be_read_counts_as_none(tmp_path: Path) -> None:
    (tmp_path / attempts_name(0)).write_bytes(b"")
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
    assert json.loads((tmp_path / attempts_name(0)).read_text())["deaths"]["6"] == 2, "until the shard is published"


def test_an_engine_that_every_image_kills_stops_the_stage(tmp_path: Path) -> None:
    died(tmp_path, _0_4=2, _0=2, _1=2, _2=2)
    with pytest.raises(StageError, match="every image kills its actor: 3 one after another"):
        do(Asker(tmp_path), tmp_path)


@pytest.mark.parametrize("somebody_died", [False, True])
def test_what_is_being_worked_on_is_in_the_file_before_it_begins(tmp_path: Path, somebody_died: bool) -> None:
    """As one note for a shard that nobody has died over, and part by part from the first death on."""

    class Reader(Asker):
        def __call__(self, window: list[dict[str, Any]]) -> Rows:
            state = json.loads((tmp_path / attempts_name(0)).read_text())
            seen.append((len(window), state["working_on"]))
            return super().__call__(window)

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

        def __call__(self, window: list[dict[str, Any]]) -> Rows:
            self.inside += 1
            beside.append((len(window), self.inside))
            try:
                return super().__call__(window)
            finally:
                beside.append((len(window), self.inside))
                self.inside -= 1

    beside: list[tuple[int, int]] = []
    script = "seconds_per_batch: 0.01\nfaults: [{prompt: <3>, happens: raise}]"
    do(Counting(tmp_path, script), tmp_path, ActorsConfig(batch_size=2, windows_in_flight=3))
    assert [inside for size, inside in beside if size == 1] == [1] * 4
    assert max(inside for _, inside in beside) > 1


def test_a_shard_that_kills_outside_of_generation_stops_the_stage_and_a_rerun_tries_again(tmp_path: Path) -> None:
    died(tmp_path, "packing", packing=4)
    attempts = Attempts(RunDir.of(str(tmp_path)), 0)
    with (
        pytest.raises(StageError, match=r"5 actors died while packing shard 0\..*pool\.shard_size"),
        attempts.handling("packing"),
    ):
        raise AssertionError("not reached")
    with Attempts(RunDir.of(str(tmp_path)), 0).handling("packing"):
        pass


def test_an_actor_that_dies_while_loading_is_tried_so_many_times(tmp_path: Path) -> None:
    output = RunDir.of(str(tmp_path))
    (tmp_path / "attempts-abc.json").write_text("2")
    with pytest.raises(StageError, match="died 2 times while it loaded the model"), loading(output, "abc", 2):
        raise AssertionError("not reached")
    with pytest.raises(EngineError), loading(output, "abc", 3):
        raise EngineError("an error is no death")
    assert not (tmp_path / "attempts-abc.json").exists()
