"""Engines that kill, hang, raise, get lost or run out of memory; disks that are full; files that are damaged."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image
from ray.data import DataContext

from stic_ray.core.errors import StageError
from stic_ray.core.history import read_attempts
from stic_ray.core.rundir import RunDir
from tests.stages.builders import TELLING, draw_pictures, fake_config, pairs_of, rejected_of, run_stages

FAULTS = {"31x33": "kill", "35x33": "hang", "37x33": "raise", "39x33": "lose"}
"""Size of a picture, and what happens when the engine is shown it."""


def poison(folder: Path, size: str) -> None:
    """Write a picture of a size that the script takes badly."""
    width, height = map(int, size.split("x"))
    Image.effect_noise((width, height), 60).convert("RGB").save(folder / f"poison_{size}.png")


def faults(*sizes: str) -> str:
    """Script of a fake engine that does what FAULTS says."""
    return f"{TELLING}\nfaults: [{', '.join(f'{{size: {size}, happens: {FAULTS[size]}}}' for size in sizes)}]"


@pytest.mark.usefixtures("ray_session")
def test_images_that_kill_hang_or_break_the_engine_are_rejected_and_all_others_are_as_ever(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 16)
    quiet = run_stages(fake_config(tmp_path, pictures, TELLING), tmp_path / "quiet", "pool", "preferences")
    for size in FAULTS:
        poison(pictures, size)
    config = fake_config(
        tmp_path,
        pictures,
        faults(*FAULTS),
        pool={"shard_size": 10},
        actors={"num_actors": 2, "batch_size": 5, "max_retries": 1, "timeout_s": 2.0},
    )
    run = run_stages(config, tmp_path / "run", "pool", "preferences")

    found, expected = ({row["image_id"]: row for row in pairs_of(r).to_pylist()} for r in (run, quiet))
    for rows in (found, expected):
        for row in rows.values():
            del row["position"]  # the poison stands between them
    assert found == expected
    rejected = {Path(row["path"]).stem.removeprefix("poison_"): row for row in rejected_of(run, "preferences")}
    assert rejected.keys() == FAULTS.keys()
    assert {row["reason"] for row in rejected.values()} == {"engine_failed"}
    assert rejected["37x33"]["message"] == "RuntimeError: the script raises at 37x33"
    for size in ("31x33", "35x33", "39x33"):
        assert rejected[size]["message"].startswith("1 actors died, or hung until actors.timeout_s")
    left = {path.suffix for path in (tmp_path / "run" / "preferences").iterdir()}
    assert left == {".parquet", ".json", ".jsonl"} and not list((tmp_path / "run" / "preferences").glob("notes-*"))


@pytest.mark.usefixtures("ray_session")
def test_an_actor_that_dies_while_it_loads_stops_the_stage(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 2)
    config = fake_config(tmp_path, pictures, "dies_while_loading: true", actors={"num_actors": 1, "max_retries": 1})
    with pytest.raises(StageError, match="^preferences stopped: an actor died 2 times while it loaded") as caught:
        run_stages(config, tmp_path / "run", "pool", "preferences")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("ray_session")
def test_a_shard_may_take_longer_than_ray_waits_for_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default half an hour."""
    pictures = draw_pictures(tmp_path / "pictures", 2)
    config = fake_config(tmp_path, pictures, f"{TELLING}\nseconds_per_batch: 6", actors={"num_actors": 1})
    monkeypatch.setattr(DataContext.get_current(), "execution_no_progress_timeout_s", 2)
    assert pairs_of(run_stages(config, tmp_path / "run", "pool", "preferences")).num_rows == 2


@pytest.mark.usefixtures("ray_session")
def test_an_engine_that_always_raises_stops_the_stage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 4)
    config = fake_config(tmp_path, pictures, "faults: [{happens: raise}]", actors={"num_actors": 1})
    with pytest.raises(StageError, match="^preferences stopped: the engine fails on every image") as caught:
        run_stages(config, tmp_path / "run", "pool", "preferences")
    assert "the script raises" in str(caught.value) and "\n" not in str(caught.value)
    folder = caplog.messages[-1].removeprefix("Ray's logs are on each machine in ")
    assert list(Path(folder).glob("worker-*.out")), "the console shows none of these"


@pytest.mark.usefixtures("ray_session")
def test_too_large_a_batch_is_halved_and_the_figures_go_into_the_manifest(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 8)
    tables, journal = [], tmp_path / "journal"
    for name, script in (("roomy", TELLING), ("narrow", f"{TELLING}\nmax_requests: 3\njournal: {journal}")):
        config = fake_config(tmp_path, pictures, script, actors={"num_actors": 1, "min_actors": 1})
        run = run_stages(config, tmp_path / name, "pool", "preferences")
        tables.append(pairs_of(run))
        manifest = (run / "preferences").manifest
        assert manifest is not None
        throughput = manifest["throughput"]
        assert throughput["num_rows"] == 8 and 0 < throughput["utilisation"] <= 1
        assert throughput["requests_per_call"] == 8.0
        assert throughput["seconds"] >= throughput["seconds_to_first_shard"] > 0
    assert tables[0].equals(tables[1])
    assert journal.read_text().split() == ["2"] * 8, "a batch of 4 does not fit, its half does"


@pytest.mark.usefixtures("ray_session")
def test_damaged_files_and_what_killed_writers_left_are_cleaned_up(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 16)
    config = fake_config(tmp_path, pictures, TELLING)
    run = run_stages(config, tmp_path / "run", "pool", "preferences")
    before = pairs_of(run)
    folder = tmp_path / "run" / "preferences"
    (folder / "manifest.json").unlink()
    first, second, third, whole = sorted(folder.glob("pairs-*.parquet"))
    os.truncate(first, first.stat().st_size // 2)
    second.write_bytes(b"")
    (folder / third.name.replace("pairs", "rejected")).write_bytes(b"garbage, beside a whole file of pairs")
    (folder / ".pairs-000001.parquet.0123.tmp").write_bytes(b"half a shard")
    (folder / "notes-000001.json").write_text('{"working_on": ["0-4"], "deaths": {}}')
    written = {path: path.stat().st_mtime_ns for path in (first, second, third, whole)}

    assert pairs_of(run_stages(config, tmp_path / "run", "preferences")).equals(before)

    assert [path for path in written if path.stat().st_mtime_ns == written[path]] == [whole]
    records = [f"shard-{number:06d}.json" for number in range(4)]
    kept = ["attempts.jsonl", "manifest.json", *(path.name for path in written), *records]
    assert sorted(path.name for path in folder.iterdir()) == kept
    attempts = read_attempts(run / "preferences")
    assert [attempt["num_rows"] for attempt in attempts] == [16, 12], "each its own"


@pytest.mark.usefixtures("ray_session")
def test_a_full_disk_stops_the_stage_in_one_line_and_the_rerun_finishes(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 12)
    disk = tmp_path / "disk"
    disk.mkdir()
    config = fake_config(tmp_path, pictures, TELLING)
    quiet = pairs_of(run_stages(config, tmp_path / "quiet", "pool", "preferences"))
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk")
    try:
        shutil.copytree(tmp_path / "quiet" / "pool", disk / "run" / "pool")
        with pytest.raises(StageError, match="preferences could not read or write: .*No space left") as caught:
            run_stages(config, disk / "run", "preferences")
        assert "\n" not in str(caught.value) and str(disk / "run") in str(caught.value)
        assert (RunDir.of(str(disk / "run")) / "preferences").manifest is None
        subprocess.run(["mount", "-o", "remount,size=16m", disk], check=True)
        assert pairs_of(run_stages(config, disk / "run", "preferences")).equals(quiet)
        assert not list((disk / "run" / "preferences").glob(".*"))
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)
