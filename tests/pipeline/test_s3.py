"""The command line against a real S3 server on loopback: images, tables and the run directory are objects."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader
from transformers import TrainerControl, TrainerState, TrainingArguments

from stic_ray.core.errors import SourceError
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import INDEX, REJECTED, Reason
from stic_ray.core.storage import Location
from stic_ray.stages.training.building import training_arguments
from stic_ray.stages.training.data import read_pairs
from stic_ray.stages.training.index import index_pairs
from stic_ray.stages.training.reporting import TENSORBOARD, MetricsFile, Progress, RunTensorBoard
from stic_ray.status import run_status
from tests.stages.builders import TELLING, draw_pictures, fake_script, pairs_of
from tests.stages.sources import as_parquet, as_tar, tiny_pictures
from tests.stages.test_training_batches import config_for
from tests.stages.test_training_data import places, write_positions

pytestmark = pytest.mark.slow

JOB = Path(__file__).parents[2] / "jobs" / "full_pipeline.py"
BUCKET = "s3://pictures"


def test_addresses_of_objects_survive_odd_names_and_options(endpoint: str) -> None:
    folder = Location.of(f"{BUCKET}/odd names?endpoint_override={endpoint}&scheme=http&region=us-east-1")
    for name in ("a b.png", "50%41.png", "x#y?z.png", "ü.png"):
        (folder / name).write(name.encode())
    listed = [folder.at(file.path) for file in folder.files()]
    assert len(listed) == 4
    for file in listed:
        again = Location.of(file.uri)  # as an index row carries it to another machine
        assert again.read() == file.name.encode()
        assert "endpoint_override" in file.uri
    assert listed[0].folder.uri == folder.uri


def test_credentials_in_an_address_are_refused() -> None:
    with pytest.raises(SourceError, match="'s3://...@bucket/images' holds credentials.*environment") as caught:
        Location.of("s3://key:secret@bucket/images")
    assert "secret@" not in str(caught.value)


def command_for(folder: Path, run: str) -> list[str]:
    script = fake_script(folder, f"{TELLING}\nseconds_per_batch: 0.2\n")
    command = [sys.executable, str(JOB), "--stages", "pool,preferences", "--run", run]
    for setting in (
        f"pool.source={BUCKET}/source",
        "pool.shard_size=4",
        "model.engine=fake",
        f"model.path={script}",
        "actors.num_actors=1",
        "actors.batch_size=4",
    ):
        command += ["--set", setting]
    return command


def test_a_run_on_s3_is_finished_after_a_kill(endpoint: str, tmp_path: Path) -> None:
    source = draw_pictures(tmp_path / "source", 20)
    as_tar(source, tiny_pictures(8))
    as_parquet(source / "deep folder", tiny_pictures(8, first=8), compression="none")
    as_parquet(source / "deep folder", tiny_pictures(8, first=16), name="b.parquet")
    (Location.of(BUCKET) / "source").upload_folder(source)

    command = command_for(tmp_path, f"{BUCKET}/runs/killed")
    killed = RunDir.of(f"{BUCKET}/runs/killed")
    victim = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while len((killed / "preferences").shards("pairs")) < 2:
        assert victim.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)
    os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    assert (killed / "preferences").manifest is None
    how_far = run_status(killed)
    assert how_far[0].startswith("pool         finished    44 in") and how_far[2].endswith("not begun")
    assert re.search(r"begun       [2-9]\d* of \d+ shards", how_far[1])
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]

    index = (killed / "pool").read_table("index", INDEX)
    assert index["position"].to_pylist() == list(range(44))
    assert all(path.startswith(f"{BUCKET}/source/") for path in index["path"].to_pylist())
    rejected = (killed / "preferences").read_table("rejected", REJECTED)
    assert set(rejected["reason"].to_pylist()) <= {Reason.CORRUPTION_CHANGED_NOTHING}, "of the tiniest pictures"
    made = [*pairs_of(killed)["image_id"].to_pylist(), *rejected["image_id"].to_pylist()]
    assert sorted(made) == sorted(index["image_id"].to_pylist()), "none lost, none doubled"
    manifest = (killed / "preferences").manifest or {}
    assert (manifest["num_rows_in"], manifest["num_rows_rejected"]) == (44, rejected.num_rows)
    left = {file.base_name for file in (killed / "pool").location.files(recursive=True)}
    assert not [name for name in left if name.startswith(("scan", "ordered", "parts", "."))]


def test_training_reads_pairs_from_a_bucket_and_leaves_its_events_there(endpoint: str, tmp_path: Path) -> None:
    """In a process of its own, which must not inherit a client of the bucket by a fork."""
    run = write_positions(f"{BUCKET}/pairs", range(5), range(5, 12))
    config = config_for(tmp_path, dpo={"num_held_out": 1, "num_images": 10}, workers={"num_loaders": 1})
    groups = index_pairs(config, run.shards("pairs"))
    assert (groups.num_trained, groups.num_held_out) == (9, 1)
    rows, held_out = read_pairs(config, groups)
    arguments = training_arguments(config, config.dpo, tmp_path, groups)
    told = {name: arguments[f"dataloader_{name}"] for name in ("num_workers", "multiprocessing_context")}
    assert told["num_workers"] == 1
    apart = list(DataLoader(rows, batch_size=4, collate_fn=list, **told))
    assert [places(batch) for batch in apart] == [places(batch) for batch in DataLoader(rows, 4, collate_fn=list)]
    assert sorted(place for batch in apart for place in places(batch)) == [0, 1, 2, 3, *range(5, 10)]
    assert places(list(held_out)) == [4]

    metrics = MetricsFile(RunDir.of(f"{BUCKET}/run/dpo"), tmp_path)
    progress, board = Progress("dpo", "dpo", metrics), RunTensorBoard(metrics.folder / TENSORBOARD)
    state: Any = TrainerState(is_world_process_zero=True, global_step=7)
    told = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), state, TrainerControl()
    board.on_train_begin(*told)
    board.on_log(*told, logs={"loss": 1.0})
    progress.on_save(*told)
    (first,) = Location.of(f"{BUCKET}/run/dpo/tensorboard").files()
    board.on_log(*told, logs={"loss": 0.5})
    progress.on_train_end(*told)
    board.on_train_end(*told)
    (last,) = Location.of(f"{BUCKET}/run/dpo/tensorboard").files()
    assert last.path == first.path and (last.size or 0) > (first.size or 0) > 0
