"""Stages that lack something: what they say, when they give up, and that each gives back what it held."""

import logging
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import StageError
from stic_ray.core.placement import Need
from stic_ray.core.resources import ClusterConfig
from stic_ray.core.rundir import RunDir, row_counts
from stic_ray.core.steps import StepRun
from stic_ray.stages import processes
from tests.stages.builders import TELLING, draw_pictures, fake_config, pairs_of, run_stages
from tests.stages.test_training_batches import config_for, write_pairs

pytestmark = pytest.mark.usefixtures("ray_session")
CLUSTER = "The cluster has 1 node: 1 x 6 CPU, 2 GPU"
SOON_S = 12.0
"""Late enough for Ray Train's controller to be there, and to wait for a place for its workers."""


@pytest.fixture(autouse=True)
def log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(processes, "_LOG_AFTER_S", 0.5)
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"), 28)


def config(folder: Path, pictures: Path, **actors: Any) -> RunConfig:
    return fake_config(folder, pictures, TELLING, actors=actors, cluster={"resource_timeout_s": 4})


def test_actors_that_no_node_holds_are_given_up_and_the_run_goes_on_with_fewer(
    pictures: Path, tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StageError) as gave_up:
        run_stages(config(tmp_path, pictures, num_actors=1, num_gpus=3), tmp_path / "run", "pool", "preferences")
    assert "preferences waited 4 s (cluster.resource_timeout_s) for 1 actor of 1 CPU, 3 GPU" in str(gave_up.value)
    assert "none of them has a place" in str(gave_up.value) and CLUSTER in str(gave_up.value)
    assert "preferences: has waited" in log.text and "ask for less in actors.*" in str(gave_up.value)

    elsewhere = config(tmp_path, pictures, num_actors=1, label_selector={"group": "generation"})
    with pytest.raises(StageError, match="1 actor of 1 CPU on nodes with group=generation"):
        run_stages(elsewhere, tmp_path / "run", "preferences")

    run = run_stages(config(tmp_path, pictures, num_actors=2, num_gpus=1), tmp_path / "run", "preferences")
    assert pairs_of(run).num_rows == 28


def test_actors_that_leave_no_cpu_for_tasks_are_logged(pictures: Path, tmp_path: Path) -> None:
    run_stages(config(tmp_path, pictures), tmp_path / "run", "pool")
    with pytest.raises(StageError, match="7 actors of 1 CPU, and 0.25 CPU for tasks: 6 of them leave no CPU"):
        run_stages(config(tmp_path, pictures, num_actors=7), tmp_path / "run", "preferences")


def test_workers_that_have_no_place_are_given_up(
    tmp_path: Path, tiny_llava: Path, log: pytest.LogCaptureFixture
) -> None:
    pairs = write_pairs(tmp_path / "run" / "preferences", 4)
    RunDir.of(str(pairs.parent)).write_manifest({"stage": "preferences", "num_rows_written": 4})
    asked = config_for(tiny_llava, workers={"num_workers": 3, "num_gpus": 1, "micro_batch": 1}, dpo={"global_batch": 3})
    asked = asked.model_copy(update={"dpo": asked.dpo.model_copy(update={"pairs": str(pairs.parent)})})
    asked = asked.model_copy(update={"cluster": asked.cluster.model_copy(update={"resource_timeout_s": SOON_S})})
    with pytest.raises(StageError) as gave_up:
        run_stages(asked, tmp_path / "run", "dpo")
    assert f"dpo waited {SOON_S:g} s (cluster.resource_timeout_s) for 3 workers of 1 CPU, 1 GPU: none" in str(
        gave_up.value
    )
    assert CLUSTER in str(gave_up.value) and "dpo: has waited" in log.text


def test_training_finds_the_gpus_that_generation_held(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llava: Path
) -> None:
    """Two actors hold both GPUs; Ray Train's two workers, one GPU each, must have them at once."""
    left: list[dict[str, Any]] = []

    def train(_: str, step: StepRun, rows: Any) -> dict[str, Any]:
        left.extend(processes.own_processes("actors"))
        scaling = ScalingConfig(num_workers=2, use_gpu=True)
        TorchTrainer(lambda: None, scaling_config=scaling, torch_config=TorchConfig(backend="gloo")).fit()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray Train leaves its own, which ours does not
        return row_counts(0, 0, {})

    monkeypatch.setattr("stic_ray.stages.training.launch.train", train)
    monkeypatch.setattr("stic_ray.preparation.check_before_work", lambda *_, **__: {})  # the fake engine trains nothing
    held = config(tmp_path, pictures, num_actors=2, num_gpus=1)
    held = held.model_copy(update={"cluster": ClusterConfig()})  # starting may take long beside other tests
    run = run_stages(held, tmp_path / "run", "pool", "preferences", "dpo")
    assert not left and (run / "dpo").manifest is not None


def test_an_interrupt_that_a_finalizer_swallows_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python ignores what a finalizer raises, KeyboardInterrupt too: a stage that gave up would wait without end."""
    monkeypatch.setattr(processes, "_LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(processes, "_INTERRUPT_EVERY_S", 0.5)
    asked: list[bool] = []

    def wait_twice() -> None:
        for _ in range(2):
            try:
                threading.Event().wait(60.0)
            except KeyboardInterrupt:
                asked.append(True)
        raise KeyboardInterrupt

    with (
        pytest.raises(StageError, match="captions waited 0 s .* no node is large enough"),
        processes.watched("captions", Need("tasks", 1, {"CPU": 99.0}), timeout_s=0.0),
    ):
        wait_twice()
    assert len(asked) == 2


def test_a_head_that_does_not_answer_once_ends_no_watch(
    monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(processes, "_LOOK_EVERY_S", 0.1)
    answers, nodes = [False, False, True], processes.nodes

    def busy_at_first() -> Any:
        if len(answers) > 1 and not answers.pop(0):
            raise RuntimeError("deadline exceeded")
        return nodes()

    monkeypatch.setattr(processes, "nodes", busy_at_first)
    with (
        pytest.raises(StageError, match="captions waited 0 s .* no node is large enough"),
        processes.watched("captions", Need("tasks", 1, {"CPU": 99.0}), timeout_s=0.0),
    ):
        threading.Event().wait(60.0)
        raise AssertionError("it was not interrupted")
    assert "captions: what it waits for cannot be seen now: RuntimeError: deadline exceeded" in log.text


@pytest.mark.parametrize(
    ("what", "num", "gpus", "has_room"),
    [("actors", 1, 2, True), ("actors", 9, 1, True), ("actors", 1, 3, False), ("workers", 2, 1, True)]
    + [("workers", 3, 1, False)],
)
def test_processes_that_have_room_are_given_time_to_start(what: str, num: int, gpus: int, has_room: bool) -> None:
    """Nothing is said meanwhile: it is no waiting, and happens at every start."""
    need = Need(what, num, {"CPU": 1.0, "GPU": float(gpus)})
    assert processes.quiet_s(need) == (6 if has_room else 1) * processes._LOG_AFTER_S
