"""A cluster that starts machines when they are asked for, and loses some: Ray's fake provider, processes as machines.

It begins with a head alone. Generation makes it start machines with a pretended GPU, training those of another group.
`ray.cluster_utils.AutoscalingCluster` would be shorter, but stops every Ray on the machine.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from stic_ray.core.rundir import RunDir
from tests.ray_head import Head, free_ports, ray_head
from tests.stages.builders import TELLING, draw_pictures, fake_script, pairs_of
from tests.stages.test_training_batches import write_pairs
from tests.stages.test_training_resume import checkpoints

pytestmark = pytest.mark.slow

JOB = Path(__file__).parents[2] / "jobs" / "full_pipeline.py"
HEAD_ID = "f" * 51 + "00000"
"""By which the provider knows the head."""
GROUPS = {
    "generation": {"CPU": 1, "GPU": 1, "object_store_memory": 100_000_000},
    "training": {"CPU": 1, "object_store_memory": 100_000_000},
}
NUM_PICTURES, SHARD_SIZE = 40, 2
NUM_STEPS = 20


def cluster_of(gcs_port: int) -> dict[str, Any]:
    """Return a launcher's configuration: a head, and up to two machines of each group, idle for three seconds."""
    lists = ["initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands"]
    lists += ["head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"]
    lists += ["rsync_exclude", "rsync_filter"]
    workers = {
        name: {"resources": resources, "labels": {"group": name}, "node_config": {}, "min_workers": 0, "max_workers": 2}
        for name, resources in GROUPS.items()
    }
    return {
        **{name: [] for name in lists},
        "cluster_name": "fake",
        "max_workers": 4,
        "idle_timeout_minutes": 0.05,
        "upscaling_speed": 100,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{gcs_port}",
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 2}, "node_config": {}, "max_workers": 0},
            **workers,
        },
    }


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    ports = free_ports(8)
    file = tmp_path_factory.mktemp("cluster") / "cluster.json"
    file.write_text(json.dumps(cluster_of(ports[0])))
    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
        "RAY_NODE_TYPE_NAME": "ray.head.default",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_failure_threshold": "5",
    }
    arguments = [f"--autoscaling-config={file}", "--num-cpus=2", "--num-gpus=0", "--include-dashboard=false"]
    with ray_head(*arguments, environment=environment, ports=ports) as head:
        yield head


def machines(head: Head) -> Counter[str]:
    """Count the machines of each group, by the processes that are their heart."""
    return Counter(group for group, _ in raylets(head))


def raylets(head: Head) -> list[tuple[str, psutil.Process]]:
    found = []
    for process in head.processes():
        with suppress(psutil.NoSuchProcess):  # and zombies
            if process.name() == "raylet":
                found.append((process.environ().get("RAY_NODE_TYPE_NAME", ""), process))
    return found


def start(head: Head, run: Path, stages: str, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    given = [part for setting in settings.items() for part in ("--set", "=".join(map(str, setting)))]
    command = [sys.executable, str(JOB), "--recipe", "demo", "--run", str(run), "--stages", stages, *given]
    environment = {**head.environment, "RAY_ADDRESS": head.address}
    with open(f"{run}.log", "wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def wait_for(what: Callable[[], object], process: subprocess.Popen[bytes] | None, run: Path) -> None:
    while not what():
        assert process is None or process.poll() is None, Path(f"{run}.log").read_text()[-3000:]
        time.sleep(0.1)


def finish(process: subprocess.Popen[bytes], run: Path) -> str:
    status = process.wait(timeout=200)
    log = Path(f"{run}.log").read_text()
    assert status == 0, log[-3000:]
    return log


def kill_machine(head: Head, group: str) -> None:
    """Take a machine away without a word, with all that runs on it."""
    victim = next(process for name, process in raylets(head) if name == group)
    for process in [victim, *victim.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def finished(run: Path) -> dict[Path, int]:
    """Return the finished shards, and when each was made."""
    return {shard: shard.stat().st_mtime_ns for shard in run.glob("preferences/pairs-*.parquet")}


def test_machines_come_when_actors_want_them_and_go_again(head: Head, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {
        "pool.source": draw_pictures(tmp_path / "pictures", NUM_PICTURES),
        "pool.shard_size": SHARD_SIZE,
        "model.engine": "fake",
        "model.path": fake_script(tmp_path, f"{TELLING}\nseconds_per_batch: 0.5\n"),
        "actors.num_actors": 2,
        "actors.num_gpus": 1,
        "actors.batch_size": 2,
        "actors.label_selector": "{group: generation}",
    }
    assert machines(head) == {"ray.head.default": 1}
    process = start(head, run, "pool,preferences", settings)
    wait_for(lambda: machines(head)["generation"] == 2, process, run)
    wait_for(lambda: len(finished(run)) >= 3, process, run)
    before = finished(run)
    kill_machine(head, "generation")
    finish(process, run)
    assert len(before) < NUM_PICTURES // SHARD_SIZE and finished(run).items() > before.items()
    pairs = pairs_of(RunDir.of(str(run)))
    assert len(set(pairs["image_id"].to_pylist())) == pairs.num_rows == NUM_PICTURES
    wait_for(lambda: machines(head) == {"ray.head.default": 1}, None, run)


def test_training_goes_on_when_its_machine_is_taken_away(head: Head, tmp_path: Path, tiny_llava: Path) -> None:
    run = tmp_path / "run"
    write_pairs(tmp_path / "pairs" / "preferences", 8)
    pairs = RunDir.of(str(tmp_path / "pairs" / "preferences"))
    pairs.write_manifest({"stage": "preferences", "num_rows_written": 8})
    settings = {
        "dpo.pairs": pairs.uri,
        "dpo.num_steps": NUM_STEPS,
        "dpo.global_batch": 4,
        "model.path": tiny_llava,
        "workers.num_workers": 1,
        "workers.zero_stage": 0,
        "workers.save_every_steps": 4,
        "workers.max_failures": 1,
        "workers.label_selector": "{group: training}",
    }
    process = start(head, run, "dpo", settings)
    wait_for(lambda: checkpoints(RunDir.of(str(run))), process, run)
    kill_machine(head, "training")
    log = finish(process, run)
    assert "failure 1, workers.max_failures=1: restarts from its last checkpoint" in log, log
    assert json.loads((run / "dpo" / "result.json").read_text())["num_steps"] == NUM_STEPS
    wait_for(lambda: machines(head) == {"ray.head.default": 1}, None, run)
