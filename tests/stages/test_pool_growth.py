"""A pool that is built again: after a kill it is that of an undisturbed run, over a grown source it goes on."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import RunError, StageError
from stic_ray.core.rundir import STARTED, RunDir
from stic_ray.core.schemas import INDEX
from stic_ray.stages import ordering
from tests.stages.builders import TELLING, draw_pictures, fake_config, pairs_of, rejected_of, run_stages
from tests.stages.sources import as_files, as_parquet, as_tar, tiny_pictures

JOB = Path(__file__).parents[2] / "jobs" / "full_pipeline.py"


def index_of(run: RunDir) -> pa.Table:
    return (run / "pool").read_table("index", INDEX)


def state_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """When each Parquet file below a folder was written, and what it holds."""
    return {str(f): (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.rglob("*.parquet")}


@pytest.fixture
def grown(ray_session: None, tmp_path: Path) -> tuple[RunConfig, Path, RunDir]:
    """Six pictures with their pairs, in shards of four, and then five new pictures and a copy of an old one."""
    pictures = draw_pictures(tmp_path / "pictures", 6)
    config = fake_config(tmp_path, pictures, TELLING)
    run = run_stages(config, tmp_path / "run", "pool", "preferences")
    draw_pictures(tmp_path / "more", 11)
    for number in (2, 6, 7, 8, 9, 10):
        (tmp_path / "more" / f"{number:03d}.jpg").rename(pictures / f"new{number:03d}.jpg")
    return config, tmp_path / "run", run


def test_a_grown_source_goes_behind_what_is_there(grown: tuple[RunConfig, Path, RunDir]) -> None:
    config, folder, run = grown
    before, first, pairs = state_of(folder), index_of(run), pairs_of(run)
    run_stages(config, folder, "pool", "preferences")

    after = state_of(folder)
    assert {name: after[name] for name in before} == before, "what was there stays byte for byte"
    rows = index_of(run)
    assert rows.slice(0, 6).equals(first)
    assert rows["position"].to_pylist() == list(range(11))
    assert [s.name for s in (run / "pool").shards("index")] == [f"index-00000{n}.parquet" for n in range(4)]
    assert [(Path(r["path"]).name, r["reason"]) for r in rejected_of(run, "pool")] == [("new002.jpg", "duplicate")]
    manifest = (run / "pool").manifest
    assert manifest is not None
    assert (manifest["num_rows_in"], manifest["num_rows_written"], manifest["num_rows_rejected"]) == (12, 11, 1)
    now = pairs_of(run)
    assert now.slice(0, 6).equals(pairs)
    assert now["image_id"].to_pylist() == rows["image_id"].to_pylist()
    run_stages(config, folder, "pool", "preferences")
    assert state_of(folder) == after, "a third invocation finds nothing new"


def test_growth_is_in_the_order_of_a_fresh_pool(grown: tuple[RunConfig, Path, RunDir], tmp_path: Path) -> None:
    config, folder, run = grown
    run_stages(config, folder, "pool")
    fresh = index_of(run_stages(config, tmp_path / "fresh", "pool"))["image_id"].to_pylist()
    ids = index_of(run)["image_id"].to_pylist()
    assert [i for i in fresh if i in ids[6:]] == ids[6:]


def test_preferences_that_were_begun_go_on_when_the_pool_has_grown(grown: tuple[RunConfig, Path, RunDir]) -> None:
    """The pool grows in a command of its own, or before a kill, while preferences are half done."""
    config, folder, run = grown
    output, pairs = run / "preferences", pairs_of(run)
    begun = {key: (output.manifest or {})[key] for key in ("config", "inputs")}
    output.write_json(STARTED, begun)
    (output.location / "manifest.json").delete()
    run_stages(config, folder, "pool")
    run_stages(config, folder, "preferences")
    now = pairs_of(run)
    assert now.slice(0, 6).equals(pairs) and now.num_rows == 11
    output.write_json(STARTED, {**begun, "inputs": {"index": {"from": "pool", "manifest": "another"}}})
    (output.location / "manifest.json").delete()
    with pytest.raises(RunError, match="preferences .* was begun from another pool"):
        run_stages(config, folder, "preferences")


def test_a_run_that_has_begun_to_train_stays_with_its_images(
    grown: tuple[RunConfig, Path, RunDir], caplog: pytest.LogCaptureFixture
) -> None:
    config, folder, run = grown
    (run / "dpo").write_json(STARTED, {"config": {}, "inputs": {}})
    before = state_of(folder)
    with caplog.at_level(logging.WARNING):
        run_stages(config, folder, "pool", "preferences")
    assert "6 files are new in the source; this run has begun to train and stays with" in caplog.text
    assert state_of(folder) == before


def test_a_run_that_has_the_images_it_asks_for_stays_with_them(
    ray_session: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 6)
    config = fake_config(tmp_path, pictures, TELLING, preferences={"num_images": 5})
    run = run_stages(config, tmp_path / "run", "pool", "preferences")
    assert pairs_of(run)["position"].to_pylist() == list(range(5))
    before = state_of(tmp_path / "run")
    draw_pictures(tmp_path / "pictures" / "more", 8)
    (pictures / "000.jpg").unlink()
    with caplog.at_level(logging.WARNING):
        run_stages(config, tmp_path / "run", "pool", "preferences")
    assert "0 have changed and 1 are gone" in caplog.text
    assert "has the 5 images that preferences.num_images asks for" in caplog.text
    assert state_of(tmp_path / "run") == before


def test_an_unfinished_growth_is_finished_before_anything_reads_it(grown: tuple[RunConfig, Path, RunDir]) -> None:
    config, folder, run = grown
    before = (run / "pool").manifest
    run_stages(config, folder, "pool")
    assert before is not None
    (run / "pool").write_json("manifest.json", before)  # as a kill before the manifest leaves it
    run_stages(config, folder, "pool", "preferences")
    assert index_of(run)["position"].to_pylist() == list(range(11))
    assert pairs_of(run).num_rows == 11


@pytest.mark.usefixtures("ray_session")
def test_a_build_that_waits_for_its_manifest_is_not_built_again(tmp_path: Path) -> None:
    """A kill between the last write of the build and the manifest, with the folder of the build gone or half gone."""
    pictures = draw_pictures(tmp_path / "pictures", 6)
    config = fake_config(tmp_path, pictures)
    run = run_stages(config, tmp_path / "run", "pool")
    before, manifest = state_of(tmp_path / "run"), (run / "pool").manifest
    assert manifest is not None
    for left in (False, True):
        (tmp_path / "run" / "pool" / "manifest.json").unlink()
        if left:
            (tmp_path / "run" / "pool" / "building" / "scan").mkdir(parents=True)
        run_stages(config, tmp_path / "run", "pool")
        assert state_of(tmp_path / "run") == before
        again = (run / "pool").manifest or {}
        assert {name: again[name] for name in ("num_rows_in", "extents")} == {
            name: manifest[name] for name in ("num_rows_in", "extents")
        }
        assert not (run / "pool" / "building").location.exists()


@pytest.mark.usefixtures("ray_session")
def test_files_of_a_disk_that_is_away_are_tried_again_by_the_same_command(tmp_path: Path) -> None:
    """A list names two disks; the second is mounted after a command that refuses, and one that accepts, the loss."""
    disks = [draw_pictures(tmp_path / f"disk{number}", 4 + number) for number in range(2)]
    files = [file for disk in disks for file in sorted(disk.iterdir())]
    (tmp_path / "list.txt").write_text("\n".join(map(str, files)))
    disks[1].rename(tmp_path / "away")
    config = fake_config(tmp_path, tmp_path / "list.txt")
    with pytest.raises(StageError, match=r"5 of 9 rows failed, more than cluster.max_failed_share=0 allows"):
        run_stages(config, tmp_path / "run", "pool")
    lenient = config.model_copy(update={"cluster": config.cluster.model_copy(update={"max_failed_share": 0.6})})
    run = run_stages(lenient, tmp_path / "run", "pool")
    manifest = (run / "pool").manifest or {}
    assert [manifest[f"num_rows_{name}"] for name in ("in", "written", "rejected", "failed")] == [9, 4, 0, 5]
    first = index_of(run)
    (tmp_path / "away").rename(disks[1])
    run_stages(config, tmp_path / "run", "pool")
    manifest = (run / "pool").manifest or {}
    assert manifest["num_rows_in"] == 9 and manifest["num_rows_written"] + manifest["num_rows_rejected"] == 9
    assert manifest["num_rows_failed"] == 0
    assert index_of(run).slice(0, 4).equals(first)
    assert rejected_of(run, "pool") == [] or {row["reason"] for row in rejected_of(run, "pool")} == {"duplicate"}


@pytest.mark.usefixtures("ray_session")
def test_all_rows_of_a_grown_pool_count_for_the_share_that_may_fail(tmp_path: Path) -> None:
    """Six pictures are there, and of two that are new none can be read: two of eight rows have failed."""
    there, away = draw_pictures(tmp_path / "there", 6), draw_pictures(tmp_path / "away", 8)
    (tmp_path / "list.txt").write_text("\n".join(map(str, sorted(there.iterdir()))))
    config = fake_config(tmp_path, tmp_path / "list.txt", cluster={"max_failed_share": 0.2})
    first = index_of(run_stages(config, tmp_path / "run", "pool"))
    new = [away / f"{number:03d}.jpg" for number in (6, 7)]
    (tmp_path / "list.txt").write_text("\n".join(map(str, [*sorted(there.iterdir()), *new])))
    away.rename(tmp_path / "elsewhere")
    with pytest.raises(StageError, match=r"2 of 8 rows failed, more than cluster.max_failed_share=0.2 allows"):
        run_stages(config, tmp_path / "run", "pool")
    lenient = config.model_copy(update={"cluster": config.cluster.model_copy(update={"max_failed_share": 0.3})})
    for _ in range(2):  # the files that failed are new to the second command, too
        run = run_stages(lenient, tmp_path / "run", "pool")
        manifest = (run / "pool").manifest or {}
        assert [manifest[f"num_rows_{name}"] for name in ("in", "written", "failed")] == [8, 6, 2]
    (tmp_path / "elsewhere").rename(away)
    run = run_stages(config, tmp_path / "run", "pool")
    assert index_of(run).num_rows == 8 and index_of(run).slice(0, 6).equals(first)
    assert ((run / "pool").manifest or {})["num_rows_failed"] == 0


@pytest.mark.usefixtures("ray_session")
def test_the_order_is_that_of_one_bucket_whatever_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are spread over buckets and cut into shards that do not end where buckets do."""
    pictures = tiny_pictures(60)
    as_tar(tmp_path / "source", pictures[:30])
    as_parquet(tmp_path / "source", pictures[20:])  # ten of them twice
    config = fake_config(tmp_path, tmp_path / "source", pool={"shard_size": 7})
    whole = run_stages(config, tmp_path / "whole", "pool")
    monkeypatch.setattr(ordering, "_ROWS_PER_BUCKET", 3)
    monkeypatch.setattr(ordering, "_FILES_PER_GROUP", 1)
    split = run_stages(config, tmp_path / "split", "pool")
    assert index_of(whole).num_rows == 60
    assert index_of(split).equals(index_of(whole))
    assert [s.name for s in (split / "pool").shards("index")] == [s.name for s in (whole / "pool").shards("index")]
    by_path = sorted(rejected_of(split, "pool"), key=str)
    assert by_path == sorted(rejected_of(whole, "pool"), key=str) and len(by_path) == 10


@pytest.mark.timeout(600)  # four starts of Ray
@pytest.mark.slow
def test_a_pool_killed_at_every_step_is_that_of_a_quiet_run(ray_session: None, tmp_path: Path) -> None:
    """kill -9 of driver and workers: when listing has begun, while scanning and while ordering."""
    source = as_files(tmp_path / "source", tiny_pictures(300))
    for number in range(3):
        as_tar(source, tiny_pictures(150, first=300 + 100 * number), name=f"{number}.tar")
    config = fake_config(tmp_path, source, pool={"shard_size": 3})
    settings = [
        f"pool.source={source}",
        "pool.shard_size=3",
        "seed=3",
        "model.engine=fake",
        f"model.path={config.model.path}",
    ]
    command = [sys.executable, str(JOB), "--stages", "pool", "--run", str(tmp_path / "killed")]
    command += [part for setting in settings for part in ("--set", setting)]
    building = tmp_path / "killed" / "pool" / "building"
    steps: list[Callable[[], bool]] = [
        building.exists,
        lambda: any((building / "scan").glob("scan-*")),
        lambda: any((building / "ordered").glob("group-*")),
    ]
    for reached in steps:
        victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        while not reached():
            assert victim.poll() is None, "the run ended before it could be killed"
            time.sleep(0.002)
        os.killpg(victim.pid, signal.SIGKILL)
        victim.wait()
        assert building.exists()
    subprocess.run(command, check=True, capture_output=True, timeout=300)

    killed, quiet = RunDir.of(str(tmp_path / "killed")), run_stages(config, tmp_path / "quiet", "pool")
    assert index_of(killed).num_rows == 650
    assert index_of(killed).equals(index_of(quiet))
    names = [sorted(f.name for f in (tmp_path / n / "pool").iterdir() if f.name[0] != ".") for n in ("killed", "quiet")]
    assert names[0] == names[1]
    assert sorted(rejected_of(killed, "pool"), key=str) == sorted(rejected_of(quiet, "pool"), key=str)
