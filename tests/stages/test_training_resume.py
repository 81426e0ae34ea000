"""Trainings that lose workers, their driver, and half of their machines; the run is in an S3 bucket."""

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import psutil
import pytest
from moto.server import ThreadedMotoServer

from stic_ray.core.errors import StageError
from stic_ray.core.rundir import RunDir
from stic_ray.stages.dpo import DPO
from stic_ray.stages.training.building import make_dpo_trainer
from stic_ray.stages.training.worker import is_needed
from tests.stages.builders import pairs_in, step_of
from tests.stages.test_training import losses
from tests.stages.test_training_batches import config_for, write_pairs

pytestmark = pytest.mark.usefixtures("ray_session")
NUM_STEPS = 30
"""So many that a second worker can be killed between a checkpoint of its own and the end."""
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"num_steps": NUM_STEPS, "learning_rate": 0.002, "schedule": "linear"},
    "tuning": {"lora_dropout": 0.0},
}
WORKERS = {"num_workers": 2, "micro_batch": 2, "zero_stage": 2, "save_every_steps": 3, "keep_checkpoints": 2}


@pytest.fixture
def bucket() -> Iterator[str]:
    """A bucket on loopback; its address carries the server's, the credentials are tests/conftest.py's."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="runs")
    yield f"s3://runs/one?endpoint_override={host}:{port}&scheme=http&region=us-east-1"
    server.stop()


def checkpoints(run: RunDir) -> list[str]:
    """The checkpoints that Ray Train holds as whole, by name, oldest first."""
    found = [file for file in (run / "dpo").location.files(recursive=True) if "snapshot" in file.base_name]
    if not found:
        return []
    text = (run / "dpo").location.at(found[0].path).read().decode()
    return [entry["checkpoint_dir_name"] for entry in json.loads(text)["checkpoint_results"]]


def workers() -> list[psutil.Process]:
    """The training workers of our Ray that can be seen: a title is that of the call that is answered, or one's own."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.cmdline()[:1] == ["ray::RayTrainWorker"]:
                found.append(process)
    return found


@pytest.mark.parametrize(
    ("zero_stage", "needed"),
    [
        (0, "model.safetensors optimizer.pt scheduler.pt rng_state_2.pth rng_state_3.pth"),
        (
            3,
            "scheduler.pt rng_state_2.pth rng_state_3.pth zero_pp_rank_2_mp_rank_00_model_states.pt "
            "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt mp_rank_00_model_states.pt",
        ),
    ],
)
def test_a_node_downloads_the_parts_of_its_own_workers(zero_stage: int, needed: str) -> None:
    parts = [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1, 2, 12)]
    parts += [f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (1, 3, 23)]
    sharded = [f"global_step9/{name}" for name in (*parts, "mp_rank_00_model_states.pt")] if zero_stage else []
    plain = ["model.safetensors", "scheduler.pt", *([] if zero_stage else ["optimizer.pt"])]
    names = [*plain, *(f"rng_state_{rank}.pth" for rank in (0, 1, 2, 3, 12)), *sharded]
    found = {name.split("/")[-1] for name in names if is_needed(name, range(2, 4), zero_stage)}
    assert found == set(needed.split())


def kill_workers(run: RunDir, times: int, killed: list[int]) -> None:
    """Kill a worker once it has left a checkpoint, and again one of those that are started in their place."""
    gone: set[int] = set()
    for _ in range(times):
        while not (alive := [worker for worker in workers() if worker.pid not in gone]):
            time.sleep(0.1)
        known = set(checkpoints(run))  # those of workers before them may have come late
        while not set(checkpoints(run)) - known:
            time.sleep(0.05)
        gone |= {worker.pid for worker in workers()} | {alive[0].pid}
        os.kill(alive[0].pid, signal.SIGKILL)
        killed.append(alive[0].pid)
        psutil.wait_procs([alive[0]], timeout=30)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_training_that_is_killed_ends_as_one_that_is_not(
    bucket: str, tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two workers dies twice, which is once too often; the same command goes on with a single worker."""
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    alone = config_for(tiny_llava, workers={"zero_stage": 0}, **SETTINGS)
    quiet: Any = make_dpo_trainer(alone, pairs_in(alone, write_pairs(tmp_path / "pairs", 12)), tmp_path / "quiet")
    quiet.train()

    run = RunDir.of(bucket)
    (run / "preferences").location.upload_folder(tmp_path / "pairs")
    config = config_for(tiny_llava, workers={**WORKERS, "max_failures": 1}, **SETTINGS)
    killed: list[int] = []
    killer = threading.Thread(target=kill_workers, args=(run, 2, killed), daemon=True)
    killer.start()
    with pytest.raises(StageError, match="restarts were used up.*The same command goes on"):
        DPO.run(step_of(config, run, "dpo"))
    killer.join()
    assert len(killed) == 2 and (run / "dpo").read_json("result.json") is None
    assert len(checkpoints(run)) == 2, "the last two are kept"

    later: dict[str, Any] = {  # settings of steps behind this one, which may be mended in between
        "sft": {"learning_rate": 0.5},
        "infusion": {"source": str(tmp_path / "other.json")},
        "evaluation": {"benchmarks": [str(tmp_path / "other.jsonl")]},
    }
    half = config_for(tiny_llava, workers={**WORKERS, "num_workers": 1, "micro_batch": 4}, **SETTINGS, **later)
    DPO.run(step_of(half, run, "dpo"))
    result = (run / "dpo").read_json("result.json")
    assert result["num_steps"] == NUM_STEPS
    assert result["resumed_from_step"] >= 6, "the second victim died behind a checkpoint of its own"
    found = losses(run, "dpo", "loss")
    expected = [entry["loss"] for entry in quiet.state.log_history if "loss" in entry]
    assert len(found) == NUM_STEPS
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
