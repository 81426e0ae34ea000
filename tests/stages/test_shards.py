"""Shards through Ray Data: failed rows, errors on their way to the user, what is done again."""

import re
import struct
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stic_ray.core.config import ActorsConfig
from stic_ray.core.errors import Failed, Rejected, SourceError, StageError
from stic_ray.core.publishing import published
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import FAILED, Reason
from stic_ray.stages.shards import ShardJob, Shards, ShardTask, run_shards
from stic_ray.stages.windows import Rows

pytestmark = pytest.mark.usefixtures("ray_session")
NUM_SHARDS, ROWS_PER_SHARD = 8, 4
READ = pa.schema([("number", pa.int64()), ("text", pa.string())])
ONE_ACTOR = ActorsConfig(num_actors=1, batch_size=4, windows_in_flight=1)


class Reader:
    """Reads the file of each number below a folder; it fails where the folder is away, or a folder is in its place."""

    engine = None

    def __init__(self, mount: Path) -> None:
        self.mount = mount

    def identities(self, row: dict[str, Any]) -> list[dict[str, str]]:
        return [{"image_id": str(row["number"]), "path": str(self.mount / str(row["number"]))}]

    def prepare(self, row: dict[str, Any]) -> str:
        file = self.mount / str(row["number"])
        if not file.parent.exists() or file.is_dir():
            raise Failed(f"'{file}' cannot be read: the disk is not mounted")
        if not file.exists():
            raise Rejected(Reason.UNREADABLE_FILE, f"'{file}' is not there")
        return file.read_text()

    def answer(self, prepared: Sequence[str]) -> Sequence[str]:
        return prepared

    def finish(self, prepared: str, answer: str) -> Rows:
        return {"read": [{"number": int(answer), "text": prepared}]}


def load(task: ShardTask) -> pa.Table:
    if error := task.payload.get("raises"):
        raise {"struct": struct.error, "source": SourceError, "disk": OSError, "key": KeyError}[error]("three\nlines\n")
    return pa.table({"number": range(task.number * ROWS_PER_SHARD, (task.number + 1) * ROWS_PER_SHARD)})


def read_all(folder: Path, max_failed_share: float = 0.0, **raises: str) -> Shards:
    """Read all numbers; `raises` has the errors of loading by shard, as shard_3="disk"."""
    job = ShardJob(
        stage="reading",
        output=RunDir.of(str(folder / "output")),
        families={"read": READ},
        load=load,
        make_worker=partial(Reader, folder / "mount"),
        max_failed_share=max_failed_share,
    )
    tasks = [ShardTask(n, {"raises": raises.get(f"shard_{n}")}, num_bytes=1000) for n in range(NUM_SHARDS)]
    return run_shards(job, tasks, ONE_ACTOR)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mount").mkdir()
    for number in range(NUM_SHARDS * ROWS_PER_SHARD):
        (tmp_path / "mount" / str(number)).write_text(str(number))
    return tmp_path


def written_at(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "output").glob("*-*")}


def assert_complete(done: Shards, folder: Path) -> None:
    assert done.num_rows == {"read": NUM_SHARDS * ROWS_PER_SHARD} and not done.num_failed
    rows = RunDir.of(str(folder / "output")).read_table("read", READ)
    assert rows["number"].to_pylist() == list(range(NUM_SHARDS * ROWS_PER_SHARD))
    families = {name.split("-")[0] for name in written_at(folder)}
    assert families == {"read", "shard"}, "nothing else is left"


def test_a_storage_that_goes_away_stops_the_stage_and_the_same_command_reads_the_rest(folder: Path) -> None:
    """It goes after three of eight shards, and is back for the second call."""
    assert read_all(folder).num_rows == {"read": 32}
    output = RunDir.of(str(folder / "output"))
    for number in range(3, NUM_SHARDS):
        (output.location / f"shard-{number:06d}.json").delete()
    (folder / "mount").rename(folder / "away")
    with pytest.raises(StageError) as stopped:
        read_all(folder)
    found = published(output, "", ["read", "rejected", "failed"])
    failed = {number for number, record in found.items() if record.num_failed}
    assert len(failed) >= 3 and failed.isdisjoint(range(3))
    assert str(stopped.value) == (
        "reading: 12 of 24 rows failed, more than cluster.max_failed_share=0 allows: "
        f"12 x '{folder}/mount/...' cannot be read: the disk is not mounted. "
        "What is finished stays; the same command tries those rows again."
    ), "three shards are enough"

    before = written_at(folder)
    (folder / "away").rename(folder / "mount")
    done = read_all(folder)
    assert_complete(done, folder)
    assert done.throughput is not None and done.throughput["num_rows"] == 5 * ROWS_PER_SHARD
    now = written_at(folder)
    assert all(now[f"read-{n:06d}.parquet"] == before[f"read-{n:06d}.parquet"] for n in range(3)), "done once"
    assert done.accounts(32)["num_rows_now"] == 5 * ROWS_PER_SHARD, "and not those of the first call"
    again = read_all(folder)
    assert again.throughput is None and again.accounts(32)["num_rows_now"] == 0


def test_a_share_of_failed_rows_can_be_allowed_and_every_row_is_accounted_for(folder: Path) -> None:
    """Another share may be given at each call, as no result depends on it."""
    output = RunDir.of(str(folder / "output"))
    (folder / "mount" / "5").unlink()
    (folder / "mount" / "9").unlink()
    (folder / "mount" / "9").mkdir()
    with pytest.raises(
        StageError, match="1 of 32 rows failed, more than cluster.max_failed_share=0.02 allows: 1 x '.+/mount/...'"
    ):
        read_all(folder, max_failed_share=0.02)
    assert len(published(output, "", ["read", "rejected", "failed"])) == NUM_SHARDS, "what is finished stays"
    before = written_at(folder)

    done = read_all(folder, max_failed_share=0.05)
    accounts = done.accounts(32)
    assert (accounts["num_rows_written"], accounts["num_rows_rejected"], accounts["num_rows_failed"]) == (30, 1, 1)
    assert accounts["rejected_by_reason"] == {"unreadable_file": 1}
    [row] = output.read_table("failed", FAILED).to_pylist()
    path = str(folder / "mount" / "9")
    assert row == {"image_id": "9", "path": path, "message": f"'{path}' cannot be read: the disk is not mounted"}
    now = written_at(folder)
    again = {name for name in now if now[name] != before[name]}
    assert again == {"read-000002.parquet", "failed-000002.parquet", "shard-000002.json"}, "only the shard with it"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("struct", r"reading stopped while loading shard 3: struct\.error: three \(test_shards\.py, line \d+\)"),
        ("key", r"reading stopped while loading shard 3: KeyError: .*three.* \(test_shards\.py, line \d+\)"),
        ("disk", r"reading could not read or write: three\. Mend this and run the same command again\."),
        ("source", "three\nlines\n"),
    ],
)
def test_an_error_keeps_its_type_and_place_and_a_rerun_goes_on(
    error: str, expected: str, folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In one line of ours: nothing of Ray's advice, and no pages of stack on the console."""
    with pytest.raises(SourceError if error == "source" else StageError) as caught:
        read_all(folder, shard_3=error)
    assert re.fullmatch(expected, str(caught.value)), str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
    assert_complete(read_all(folder), folder)
