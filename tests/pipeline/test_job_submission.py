"""`ray job submit` to a real head on loopback, with tokens: logs, exit status, a kill, and the same command again."""

import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from stic_ray.core.rundir import RunDir
from tests.pipeline.test_scaling_study import SETTINGS
from tests.ray_head import RAY, Head, ray_head
from tests.stages.builders import TELLING, draw_pictures, fake_script, pairs_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NUM_PICTURES, SHARD_SIZE = 24, 2


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Four CPUs and two GPUs that are none."""
    with ray_head("--num-cpus=4", "--num-gpus=2") as head:
        yield head


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A pool of 24 pictures in 12 shards, and an engine that takes a quarter of a second for each picture."""
    folder = tmp_path_factory.mktemp("jobs")
    chosen = {
        "pool.source": draw_pictures(folder / "pictures", NUM_PICTURES),
        "pool.shard_size": SHARD_SIZE,
        "model.engine": "fake",
        "model.path": fake_script(folder, f"{TELLING}\nseconds_per_batch: 0.25\n"),
        "actors.num_actors": 2,
        "actors.num_gpus": 1,
        "actors.batch_size": 2,
    }
    return [part for setting in chosen.items() for part in ("--set", "=".join(map(str, setting)))]


def start(head: Head, *arguments: str) -> subprocess.Popen[str]:
    """Submit with cluster/submit.sh, which follows the log."""
    environment = {**head.environment, "RAY_ADDRESS": head.dashboard}
    command = [str(ROOT / "cluster" / "submit.sh"), *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/"
    )


def ray(head: Head, *arguments: str) -> str:
    """Return what a command of Ray's says about the head, as docs/operations.md has it."""
    environment = {**head.environment, "RAY_ADDRESS": head.dashboard}
    done = subprocess.run([RAY, *arguments], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def finish(submitted: subprocess.Popen[str]) -> str:
    return submitted.communicate(timeout=500)[0]


def listening(head: Head) -> set[str]:
    """The addresses on which the head's processes take connections."""
    found: set[str] = set()
    for process in head.processes():
        with suppress(psutil.NoSuchProcess):
            found |= {c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    return found


def get(url: str, token: str | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.reason


def test_a_killed_job_fails_and_the_same_command_finishes_it(head: Head, settings: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = ["jobs/full_pipeline.py", "--stages", "pool,preferences", "--run", str(run), *settings]
    submitted = start(head, *job)
    while len(made := list(run.glob("preferences/pairs-*.parquet"))) < 3:
        assert submitted.poll() is None, finish(submitted)
    assert listening(head) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, "nothing is open to the network"
    [driver] = head.processes_of("jobs/full_pipeline.py")
    driver.send_signal(signal.SIGKILL)
    log = finish(submitted)
    assert submitted.returncode == 1 and "preferences: started" in log, log
    before = {shard: shard.stat().st_mtime_ns for shard in made}
    assert len(before) < NUM_PICTURES // SHARD_SIZE

    again = start(head, *job)
    log = finish(again)
    assert again.returncode == 0, log
    assert "pool: already done, skipped" in log and "shards are already there" in log
    assert {shard: shard.stat().st_mtime_ns for shard in made} == before, "what was done is not done again"
    assert pairs_of(RunDir.of(str(run))).num_rows == NUM_PICTURES

    [size] = [line for line in log.splitlines() if line.startswith("package: ")]
    assert float(size.split()[1]) < 10, "MiB"
    [package] = (head.folder / "ray").glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    packed = {path.name for path in package.iterdir()}
    assert {"jobs", "stic_ray"} <= packed and not packed & {"tests", "docs", "benchmarks", ".git", "runs", ".venv"}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert yaml.safe_load((run / "config.yaml").read_text())["git_commit"].startswith(commit)


def test_a_job_is_watched_and_stopped_with_the_commands_of_the_page(
    head: Head, settings: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    slow = fake_script(tmp_path, f"{TELLING}\nseconds_per_batch: 4\n")  # a minute at least, of which seconds are used
    job = ["jobs/full_pipeline.py", "--stages", "pool,preferences", "--run", str(run), *settings]
    job += ["--set", f"model.path={slow}", "--set", "actors.num_actors=1"]
    assert finish(start(head, "--no-wait", "--submission-id", "night", "--", *job))
    while not list(run.glob("preferences/pairs-*.parquet")):
        assert "FAILED" not in ray(head, "job", "status", "night")
    assert "RUNNING" in ray(head, "job", "status", "night") and "night" in ray(head, "job", "list")
    assert "1.0/2.0 GPU" in ray(head, "status", "--address", head.address)
    told = subprocess.run(
        [sys.executable, "jobs/status.py", "--run", str(run)], cwd=ROOT, capture_output=True, text=True
    )
    assert "preferences  begun" in told.stdout, told.stdout + told.stderr
    ray(head, "job", "stop", "night")
    assert "'night' was stopped" in ray(head, "job", "status", "night")
    assert "preferences: started" in ray(head, "job", "logs", "night")

    planned = start(head, *job, "--dry-run", "--set", "actors.num_gpus=3")
    log = finish(planned)
    assert planned.returncode == 1 and "1 actor of 1 CPU, 3 GPU" in log, log
    fits = start(head, *job, "--dry-run")
    log = finish(fits)
    assert fits.returncode == 0 and "1 x 4 CPU, 2 GPU" in log, log


def test_a_mistake_is_one_line_of_the_log_and_status_1(head: Head) -> None:
    submitted = start(head, "--submission-id", "mistake", "--", "jobs/full_pipeline.py", "--set", "dpo.bta=1")
    log = finish(submitted)
    assert submitted.returncode == 1 and "Traceback" not in log, log
    assert "error: Unknown key 'bta' in section 'dpo'. Did you mean 'beta'?" in log
    reused = start(head, "--submission-id", "mistake", "--", "jobs/full_pipeline.py")
    assert "already exists" in finish(reused) and reused.returncode == 1


def test_without_the_token_only_the_metrics_answer(head: Head) -> None:
    token = Path(head.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
    jobs = f"{head.dashboard}/api/jobs/"
    assert get(jobs)[0] == 401 and get(jobs, "another")[0] == 403 and get(jobs, token)[0] == 200
    status, metrics = get(f"http://127.0.0.1:{head.metrics_port}/metrics")
    assert status == 200 and "ray_" in metrics


def test_a_plan_counts_the_machines_without_joining_and_a_wrong_token_is_one_line(head: Head, tmp_path: Path) -> None:
    """Joining would leave a job in the cluster's list."""
    command = [sys.executable, "jobs/full_pipeline.py", "--dry-run", "--run", str(tmp_path / "run")]

    def plan(**environment: str) -> subprocess.CompletedProcess[str]:
        asked = {**head.environment, "RAY_ADDRESS": head.address, **environment}
        return subprocess.run(command, cwd=ROOT, env=asked, capture_output=True, text=True, timeout=100)

    drivers = ray(head, "job", "list").count("JobDetails(")
    done = plan()
    assert done.returncode == 0 and "1 x 4 CPU, 2 GPU" in done.stdout, done.stdout + done.stderr
    assert ray(head, "job", "list").count("JobDetails(") == drivers and not list(tmp_path.iterdir())
    (tmp_path / "token").write_text("another")
    refused = plan(RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert f"error: RAY_ADDRESS={head.address} cannot be joined: it refuses this token" in refused.stderr


def test_a_study_is_a_job(head: Head, tmp_path: Path) -> None:
    """Its runs are processes of their own, which join the cluster of the job."""
    asked = {**SETTINGS, "evaluation.models": "[base, dpo]", "evaluation.modes": "[direct]", "toyworld.num_scenes": 1}
    options = [part for key, value in asked.items() for part in ("--set", f"{key}={value}")]
    submitted = start(head, "jobs/scaling_study.py", "--run", str(tmp_path / "study"), "--sizes", "4", *options)
    log = finish(submitted)
    assert submitted.returncode == 0, log
    rows = pq.read_table(tmp_path / "study" / "cells.parquet").to_pylist()
    assert {(row["size"], row["model"]) for row in rows} == {(0, "base"), (4, "dpo")}
    assert "dpo: step" in (tmp_path / "study" / "cells" / "default-n4-seed0" / "log.txt").read_text()
