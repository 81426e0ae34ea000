"""Publishing a shard: whole or not at all, whatever stops it, on a disk and in a bucket."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stic_ray.core.publishing import all_families, delete_leftovers, publish, published
from stic_ray.core.rundir import RunDir, record_name, row_counts, shard_name
from stic_ray.core.schemas import FAILED, REJECTED, table_of
from stic_ray.core.storage import Location
from tests.core.builders import rejected

ROWS = pa.schema([("x", pa.int64())])
FAMILIES = all_families({"rows": ROWS, "text": ROWS})
FIRST = {
    "rejected": table_of([rejected("unreadable_file"), rejected("too_small"), rejected("too_small")], REJECTED),
    "failed": table_of([{"image_id": "a", "path": "b/a.png", "message": "b/a.png: timed out"}], FAILED),
    "rows": pa.table({"x": [1, 2, 3]}, schema=ROWS),
}
"""What the first attempt at a shard makes: some of its rows do not go well."""
SECOND = {"rows": pa.table({"x": [1, 2, 3, 4]}, schema=ROWS), "text": pa.table({"x": [5, 6, 7]}, schema=ROWS)}
"""What a later attempt at the same rows makes: they do go well, and no row is rejected."""
FILES = ["rows-000007.parquet", "shard-000007.json", "text-000007.parquet"]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(params=["disk", "bucket"])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> RunDir:
    if request.param == "bucket":
        request.getfixturevalue("endpoint")
        return RunDir.of(f"s3://pictures/publishing/{tmp_path.name}")
    return RunDir.of(str(tmp_path / "stage"))


def names(stage: RunDir) -> list[str]:
    return sorted(file.base_name for file in stage.location.files())


def changes(patch: pytest.MonkeyPatch, stop: Callable[[int, str], None]) -> list[str]:
    """Have every change of the storage call `stop` with its number, before and after it; return what was changed."""
    made: list[str] = []

    def stopping(change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(self: Location, *arguments: Any) -> None:
            if not arguments and not self.exists():  # nothing to delete
                return
            made.append(self.name)
            stop(len(made), "before")
            change(self, *arguments)
            stop(len(made), "after")

        return changed

    patch.setattr(Location, "write", stopping(Location.write))
    patch.setattr(Location, "delete", stopping(Location.delete))
    return made


def stops() -> Iterator[tuple[int, str, type[BaseException]]]:
    for number in range(1, 7):
        yield from ((number, "before", OSError), (number, "after", Killed))


@pytest.mark.parametrize("is_done", [False, True], ids=["never done", "done with failed rows"])
@pytest.mark.parametrize("stop", list(stops()), ids=lambda stop: f"{stop[1]} {stop[0]}, {stop[2].__name__}")
def test_wherever_it_is_stopped_the_next_attempt_publishes_a_whole_shard(
    stage: RunDir, stop: tuple[int, str, type[BaseException]], is_done: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two attempts whose rows end differently, so that files of the first have no place in the second."""
    if is_done:
        publish(stage, "", 7, FIRST, FAMILIES)

    def stop_once(number: int, when: str) -> None:
        if (number, when) == stop[:2]:
            raise stop[2](f"stopped {when} change {number}")

    with monkeypatch.context() as patch:
        made = changes(patch, stop_once)
        with pytest.raises(stop[2], match=f"stopped {stop[1]} change"):
            publish(stage, "", 7, SECOND if is_done else FIRST, FAMILIES)
            assert len(made) < stop[0]
            raise stop[2](f"stopped {stop[1]} change that is none")
    for record in published(stage, "", FAMILIES).values():  # whole, if it is there
        there = {family: stage.read_table(family, schema).num_rows for family, schema in FAMILIES.items()}
        assert {family: number for family, number in there.items() if number} == record.num_rows

    record = publish(stage, "", 7, SECOND, FAMILIES)
    delete_leftovers(stage, "", FAMILIES, {7})
    assert published(stage, "", FAMILIES) == {7: record} and names(stage) == FILES
    assert stage.read_table("rows", ROWS)["x"].to_pylist() == [1, 2, 3, 4]
    row_counts(7, sum(record.num_rows.values()), record.rejected_by_reason, record.num_failed)


@pytest.mark.parametrize("number", range(1, 7))
def test_a_killed_process_leaves_no_shard_or_a_whole_one(number: int, tmp_path: Path) -> None:
    """For real: nothing of the process runs after the kill, so that its temporary files stay, too."""
    stage = RunDir.of(str(tmp_path))

    def kill(n: int, when: str) -> None:
        if (n, when) == (number, "before"):
            os.kill(os.getpid(), signal.SIGKILL)

    if not (child := os.fork()):
        changes(pytest.MonkeyPatch(), kill)
        publish(stage, "", 7, FIRST, FAMILIES)
        os._exit(0)
    os.waitpid(child, 0)
    (tmp_path / ".rows-000007.parquet.0123.tmp").write_bytes(b"half")
    assert len(published(stage, "", FAMILIES)) == (number > 4), "three files and a record"
    publish(stage, "", 7, SECOND, FAMILIES)
    delete_leftovers(stage, "", FAMILIES, {7})
    assert names(stage) == FILES


def test_the_record_has_the_accounts_of_its_shard(stage: RunDir) -> None:
    record = publish(stage, "", 7, FIRST, FAMILIES)
    assert record.num_rows == {"rejected": 3, "failed": 1, "rows": 3} and record.num_rows_in_all == 7
    assert record.rejected_by_reason == {"too_small": 2, "unreadable_file": 1}
    assert record.num_failed == 1 and record.failed_by_message == {"b/...: timed out": 1}
    assert record.num_bytes == {
        family: (stage.location / shard_name(family, 7)).info().size for family in record.num_rows
    }
    assert publish(stage, "", 8, {}, FAMILIES).num_rows == {}, "a shard without rows is a record alone"
    assert set(published(stage, "", FAMILIES)) == {7, 8}


def test_equal_causes_are_counted_as_one_and_the_most_frequent_are_kept(tmp_path: Path) -> None:
    rows = [{"image_id": str(n), "path": f"a/{n}.png", "message": f"cannot open a/{n}.png: away"} for n in range(9)]
    rows += [{"image_id": f"x{n}", "path": "", "message": f"cause {n}"} for n in range(9)]
    record = publish(RunDir.of(str(tmp_path)), "", 0, {"failed": table_of(rows, FAILED)}, FAMILIES)
    assert record.num_failed == 18 and len(record.failed_by_message) == 5
    assert next(iter(record.failed_by_message.items())) == ("cannot open a/...: away", 9)


def test_readers_take_no_file_without_a_record_where_there_are_records(stage: RunDir) -> None:
    publish(stage, "", 0, SECOND, FAMILIES)
    stage.write_shard("rows", 1, SECOND["rows"], ROWS)
    assert [shard.name for shard in stage.shards("rows")] == ["rows-000000.parquet"]
    assert [stage.read_table(family, ROWS).num_rows for family in ("rows", "text")] == [4, 3]
    stage.write_shard("listing", 0, SECOND["rows"], ROWS)
    assert stage.shards("listing") != [], "of shard 0, which is done"


def test_jobs_that_share_a_folder_are_kept_apart(stage: RunDir) -> None:
    for part, number in (("base", 0), ("base", 1), ("my-model", 1)):
        publish(stage, part, number, FIRST, FAMILIES)
    stage.write_shard("rows-my-model", 0, FIRST["rows"], ROWS)
    assert set(published(stage, "base", FAMILIES)) == {0, 1} and set(published(stage, "my-model", FAMILIES)) == {1}
    assert published(stage, "", FAMILIES) == {}
    assert [shard.name for shard in stage.shards("rows-my-model")] == ["rows-my-model-000001.parquet"]
    assert stage.rejected_families() == ["rejected-base", "rejected-my-model"]
    delete_leftovers(stage, "my-model", FAMILIES, {1})
    assert "rows-my-model-000000.parquet" not in names(stage) and len(stage.shards("rows-base")) == 2


def test_damaged_shards_are_not_done(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As a machine that lost power may leave them: short, empty, of the right size without content, gone."""
    stage = RunDir.of(str(tmp_path))
    for number in range(8):
        publish(stage, "", number, FIRST, FAMILIES)
    size = (tmp_path / shard_name("rows", 3)).stat().st_size
    os.truncate(tmp_path / shard_name("rows", 1), size // 2)
    (tmp_path / shard_name("rejected", 2)).write_bytes(b"")
    (tmp_path / shard_name("rows", 3)).write_bytes(b"\0" * size)
    (tmp_path / shard_name("rows", 4)).unlink()
    (tmp_path / record_name("", 5)).write_bytes(b"")
    (tmp_path / record_name("", 6)).write_text("[1]")
    stage.write_shard("text", 7, SECOND["text"], ROWS)
    assert set(published(stage, "", FAMILIES)) == {0}
    assert "7 shards are damaged and are made again" in caplog.text


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    stage = RunDir.of(str(tmp_path))
    publish(stage, "", 0, {"rows": FIRST["rows"]}, FAMILIES)
    stage.write_json("started.json", {})
    stage.write_shard("rows", 1, FIRST["rows"], ROWS)
    stage.write_shard("index", 1, FIRST["rows"], ROWS)
    for leftover in (".rows-000001.parquet.0a1b.tmp", "notes-000001.json", "notes-0fe1.json"):
        stage.write_text(leftover, "{}")
    delete_leftovers(stage, "", FAMILIES, {0})
    assert names(stage) == ["index-000001.parquet", "rows-000000.parquet", "shard-000000.json", "started.json"]
