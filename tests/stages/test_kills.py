"""kill -9 of an actor, a worker node, the driver and a whole cluster, at moments drawn by a seed.

After each, the same command finishes the run, and its pairs are those of an undisturbed one: none lost, none doubled.
Moments are counted in published shards, so that a busy machine changes nothing.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from stic_ray.core.rundir import RunDir
from tests.stages.builders import TELLING, draw_pictures, fake_script, pairs_of

pytestmark = pytest.mark.slow

JOB = Path(__file__).parents[2] / "jobs" / "full_pipeline.py"
NUM_SHARDS = 12
PAIRS_PER_SHARD = 2


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Pairs of 24 pictures in 12 shards, by two actors that take a quarter of a second for each picture."""
    folder = tmp_path_factory.mktemp("kills")
    settings = {
        "pool.source": draw_pictures(folder / "pictures", NUM_SHARDS * PAIRS_PER_SHARD),
        "pool.shard_size": PAIRS_PER_SHARD,
        "model.engine": "fake",
        "model.path": fake_script(folder, f"{TELLING}\nseconds_per_batch: 0.25\n"),
        "actors.num_actors": 2,
        "actors.batch_size": 2,
        "seed": 3,
    }
    given = [part for setting in settings.items() for part in ("--set", "=".join(map(str, setting)))]
    return [sys.executable, str(JOB), "--stages", "pool,preferences", *given, "--run"]


@pytest.fixture(scope="module")
def quiet(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("quiet")
    subprocess.run([*command, str(folder)], check=True, capture_output=True, timeout=200)
    assert pairs_of(RunDir.of(str(folder))).num_rows == NUM_SHARDS * PAIRS_PER_SHARD
    return folder


@pytest.fixture
def run(quiet: Path, tmp_path: Path) -> Path:
    """A run that has its pool, and no pairs yet."""
    shutil.copytree(quiet / "pool", tmp_path / "run" / "pool")
    return tmp_path / "run"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head that has no room for actors, and two workers with room for one each; no other Ray is touched."""
    temporary = Path("/tmp") / f"kills{os.getpid()}_{random.randrange(10**6)}"  # sockets need a short path
    monkeypatch.setenv("RAY_TMPDIR", str(temporary))
    monkeypatch.setenv("RAY_health_check_period_ms", "500")
    monkeypatch.setenv("RAY_health_check_failure_threshold", "4")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()
    shutil.rmtree(temporary)


def start(command: list[str], run: Path) -> subprocess.Popen[bytes]:
    """Start the command as the leader of a group of its own."""
    with open(f"{run}.log", "wb") as log:
        return subprocess.Popen([*command, str(run)], stdout=log, stderr=log, start_new_session=True)


def num_published(run: Path) -> int:
    return len(list((run / "preferences").glob("pairs-*.parquet")))


def wait_for(what: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    while not what():
        assert process.poll() is None, "the command ended too early"
        time.sleep(0.02)


def finish(process: subprocess.Popen[bytes], run: Path, quiet: Path) -> None:
    """Wait for the end, and compare what is there with what the quiet run has."""
    assert process.wait(timeout=200) == 0, Path(f"{run}.log").read_text()[-3000:]
    assert pairs_of(RunDir.of(str(run))).equals(pairs_of(RunDir.of(str(quiet))))
    assert sorted(os.listdir(run / "preferences")) == sorted(os.listdir(quiet / "preferences"))


def processes_named(title: str, parents: set[int]) -> list[int]:
    """Return the processes below `parents` whose title holds `title`: Ray names a process after what runs in it."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and title in (folder / "cmdline").read_bytes().decode(errors="replace"):
                found.append(int(folder.name))
        except OSError:  # gone in the meantime
            continue
    return [pid for pid in found if parents & set(ancestors(pid))]


def ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            return
        yield pid


def test_kill_an_actor(command: list[str], quiet: Path, run: Path) -> None:
    """Three times, at different moments; the run itself goes on."""
    process, killed = start(command, run), set[int]()
    for moment in sorted(random.Random(1).sample(range(1, NUM_SHARDS - 2), 3)):
        wait_for(lambda moment=moment: num_published(run) >= moment, process)
        actors = processes_named("ray::MapWorker", {process.pid})
        if actors:  # none in the moment when the last victim is being replaced
            victim = random.Random(moment).choice(sorted(actors))
            os.kill(victim, signal.SIGKILL)
            killed.add(victim)
    assert killed
    finish(process, run, quiet)


def test_kill_the_driver_and_all_its_processes(command: list[str], quiet: Path, run: Path) -> None:
    """Without RAY_ADDRESS the command starts its own Ray: all of it dies at once, twice."""
    for moment in sorted(random.Random(2).sample(range(1, NUM_SHARDS - 2), 2)):
        process = start(command, run)
        wait_for(lambda moment=moment: num_published(run) >= moment, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert num_published(run) < NUM_SHARDS
    finish(start(command, run), run, quiet)


def test_kill_a_worker_node_while_another_joins(cluster: Cluster, command: list[str], quiet: Path, run: Path) -> None:
    process = start(command, run)
    wait_for(lambda: num_published(run) >= random.Random(3).randrange(1, 5), process)
    victim = random.Random(3).choice(sorted(cluster.worker_nodes, key=lambda node: node.node_id))
    cluster.remove_node(victim, allow_graceful=False)
    cluster.add_node(num_cpus=2)
    finish(process, run, quiet)


def test_kill_the_driver_and_then_the_cluster(cluster: Cluster, command: list[str], quiet: Path, run: Path) -> None:
    """The second command meets a cluster that outlived the first one; the third has none but its own."""
    process = start(command, run)
    wait_for(lambda: num_published(run) >= 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process = start(command, run)
    wait_for(lambda: num_published(run) >= 5, process)
    for node in [*cluster.worker_nodes, cluster.head_node]:
        cluster.remove_node(node, allow_graceful=False)
    process.kill()  # it would wait a minute for its cluster to come back
    process.wait()
    assert num_published(run) < NUM_SHARDS
    del os.environ["RAY_ADDRESS"]
    finish(start(command, run), run, quiet)
