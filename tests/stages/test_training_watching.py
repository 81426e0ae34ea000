"""What a training tells: evaluation on held-out rows, speed, trackers, and the warning of easy pairs; no Ray."""

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from tensorboardX.proto import event_pb2
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError
from stic_ray.core.rundir import RunDir
from stic_ray.engines.rendering import split_answers
from stic_ray.stages.training.building import make_dpo_trainer
from stic_ray.stages.training.data import WEIGHT
from stic_ray.stages.training.metrics import flops_per_token, totals
from stic_ray.stages.training.models import model_of
from stic_ray.stages.training.reporting import (
    METRICS,
    TENSORBOARD,
    TRACKER_IDS,
    MetricsFile,
    Progress,
    add_trackers,
    start_trackers,
    summarise,
    warn_of_easy_pairs,
)
from stic_ray.stages.training.scores import score_answers
from stic_ray.stages.training.trainers import means
from tests.stages.builders import check, pairs_in
from tests.stages.test_training_batches import config_for
from tests.stages.test_training_data import write_positions

SPEED = {"rows_per_second", "tokens_per_second", "peak_memory_gib"}
SECONDS = {f"seconds/{part}" for part in ("step", "data", "forward", "backward", "optimizer")}


def make_trainer(config: RunConfig, folder: Path, output: RunDir) -> Any:
    """A trainer on 80 pairs, of which up to five may be held out, with all that a worker adds to it."""
    run = write_positions(folder / "pairs", range(40), range(40, 80))
    set_seed(config.seed)
    trainer = make_dpo_trainer(config, pairs_in(config, *(Path(s.path) for s in run.shards("pairs"))), folder / "out")
    metrics = MetricsFile(output, folder)
    trainer.add_callback(Progress("dpo", "dpo", metrics))
    add_trackers(trainer, config, output, metrics.folder)
    return trainer


def lines_of(output: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output.location / METRICS).read().decode().splitlines()]


def events_of(file: Path) -> list[Any]:
    """Read an event file: records of a length, its checksum, an event, and its checksum."""
    content, place, events = file.read_bytes(), 0, []
    while place < len(content):
        (length,) = struct.unpack_from("<Q", content, place)
        event = event_pb2.Event()
        event.ParseFromString(content[place + 12 : place + 12 + length])
        events.append(event)
        place += length + 16
    return events


@pytest.mark.parametrize(("objective", "share_prefix"), [("paper", True), ("paper", False), ("sft", True)])
def test_held_out_rows_are_evaluated_along_the_way_and_at_the_end(
    objective: str, share_prefix: bool, tmp_path: Path, tiny_llava: Path
) -> None:
    config = config_for(
        tiny_llava,
        dpo={"objective": objective, "num_steps": 3, "num_held_out": 3, "alpha": 0.01},
        workers={"evaluate_every_steps": 2, "share_prefix": share_prefix, "trackers": [], "micro_batch": 2},
    )
    output = RunDir.of(str(tmp_path / "dpo"))
    trainer = make_trainer(config, tmp_path, output)
    trainer.train()
    lines = lines_of(output)
    assert [line["step"] for line in lines] == [1, 2, 3] and all("loss" in line for line in lines)
    assert ["eval_loss" in line for line in lines] == [False, True, True]
    assert not (output.location / TENSORBOARD).exists()
    for line in lines:
        assert set(line) >= SPEED | SECONDS and "mfu" not in line
        parts = [line[f"seconds/{part}"] for part in ("data", "forward", "backward", "optimizer")]
        assert all(part > 0 for part in parts) and sum(parts) <= line["seconds/step"]
        assert line["rows_per_second"] * line["seconds/step"] == pytest.approx(4)

    held_out = [dict(trainer.eval_dataset[number]) for number in range(len(trainer.eval_dataset))]
    assert len(held_out) == 3, "an odd number in batches of two"
    model: Any = model_of(trainer).eval()
    batch = trainer.data_collator(held_out)
    with torch.no_grad():
        if objective == "sft":
            alone = [trainer.compute_loss(model, trainer.data_collator([row])).item() for row in held_out]
            assert min(alone) < lines[-1]["eval_loss"] < max(alone)
            return
        chosen, rejected = score_answers(model, trainer.network, batch).answers.unbind(1)
        before, rejected_before = trainer.reference_scores(batch).own_image.answers.unbind(1)
    margins = config.dpo.beta * (chosen - before - rejected + rejected_before)
    expected = {
        "eval_logps/chosen": chosen.mean(),
        "eval_logps/rejected": rejected.mean(),
        "eval_rewards/margins": margins.mean(),
        "eval_rewards/accuracies": (margins > 0).float().mean(),
        "eval_loss/dpo": torch.log1p(torch.exp(-margins)).mean(),
    }
    found = {name: lines[-1][name] for name in expected}
    assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-4)
    processor = trainer.processing_class
    answers = [split_answers(processor, row["prompt"] + row["chosen"], with_image=True)[1][0] for row in held_out]
    lengths = [len(processor.tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers]
    assert lines[-1]["eval_lengths/chosen"] == pytest.approx(sum(lengths) / 3)
    assert lines[-1]["eval_kl"] > 0 and lines[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_rows_of_weight_0_train_nothing(tmp_path: Path, tiny_llava: Path) -> None:
    """The gradient of a batch that is filled up is that of its real rows alone; so are its metrics."""
    gradients, losses, figures = [], [], []
    config = config_for(tiny_llava, dpo={"num_held_out": 0}, workers={"trackers": []})
    trainer = make_trainer(config, tmp_path, RunDir.of(str(tmp_path / "dpo")))
    model: Any = model_of(trainer).eval()
    rows = [dict(trainer.train_dataset[number]) for number in range(3)]
    filled = [{**row, WEIGHT: 4 / 3} for row in rows] + [{**rows[0], WEIGHT: 0.0}]
    for batch in (rows, filled):
        model.zero_grad()
        loss = trainer.compute_loss(model, trainer.data_collator(batch))
        loss.backward()
        names, sums = trainer.sums.pop("eval")
        assert sums[0] == 3, "rows of weight 0 count in no figure"
        figures.append(means(names, sums))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        losses.append(loss.item())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)


def test_metrics_and_event_files_go_on_after_a_resume(tmp_path: Path, tiny_llava: Path) -> None:
    """Killed after step 3, resumed from the checkpoint of step 2: as if nothing had happened."""
    settings: dict[str, Any] = {"num_held_out": 3, "num_steps": 5}
    config = config_for(tiny_llava, dpo=settings, workers={"save_every_steps": 2, "evaluate_every_steps": 2})
    quiet = RunDir.of(str(tmp_path / "quiet" / "dpo"))
    make_trainer(config, tmp_path / "quiet", quiet).train()

    output = RunDir.of(str(tmp_path / "killed" / "dpo"))
    trainer = make_trainer(config, tmp_path / "killed", output)
    trainer.add_callback(_Killer)
    with pytest.raises(RuntimeError, match="killed"):
        trainer.train()
    make_trainer(config, tmp_path / "killed", output).train(resume_from_checkpoint=True)

    figures = ("step", "loss", "grad_norm", "logps/chosen", "eval_loss", "eval_kl")
    undisturbed, resumed = (
        [[line.get(name, 0.0) for name in figures] for line in lines_of(of)] for of in (quiet, output)
    )
    for before, after in zip(undisturbed, resumed, strict=True):
        assert after == pytest.approx(before, rel=1e-5)
    first, second = sorted(
        (tmp_path / "killed" / "dpo" / TENSORBOARD).iterdir(), key=lambda file: file.stat().st_ctime_ns
    )
    steps = [
        [event.step for event in events_of(file) for value in event.summary.value if value.tag == "train/loss"]
        for file in (first, second)
    ]
    assert steps == [[1, 2, 3], [3, 4, 5]]
    forgets = [event.step for event in events_of(second) if event.HasField("session_log")]
    assert forgets == [3], "what the first logged from step 3 on is forgotten"
    tags = {value.tag for event in events_of(second) for value in event.summary.value}
    assert {"eval/rewards/accuracies", "eval/kl", "train/tokens_per_second", "train/seconds/data"} <= tags


def test_metrics_of_a_bucket_go_on_behind_the_checkpoint_that_counts(tmp_path: Path, s3_server: str) -> None:
    """Killed in the middle of a line, with steps and an evaluation behind the checkpoint: none is lost, none twice."""
    boto3.client("s3", endpoint_url=f"http://{s3_server}", region_name="us-east-1").create_bucket(Bucket="metrics")
    bucket = f"s3://metrics/run?endpoint_override={s3_server}&scheme=http&region=us-east-1"
    for name, uri in (("local", str(tmp_path / "run")), ("bucket", bucket)):
        output = RunDir.of(uri)
        state = TrainerState(max_steps=6, is_world_process_zero=True)
        for attempt, (first, last) in enumerate([(0, 4), (3, 6)]):
            folder = tmp_path / f"{name}-{attempt}"
            folder.mkdir()
            progress, state.global_step = Progress("dpo", "dpo", MetricsFile(output, folder)), first
            arguments, control = TrainingArguments(use_cpu=True, eval_strategy="no"), TrainerControl()
            progress.on_train_begin(arguments, state, control)
            for step in range(first + 1, last + 1):
                state.global_step = step
                figures = {"rows_per_second": 1.0, "tokens_per_second": 1.0, "peak_memory_gib": 1.0}
                logs = {"loss": 10.0 * attempt + step, **figures}
                state.log_history.append(logs)
                progress.on_log(arguments, state, control, logs=logs)
                if step in (3, 4, 6):
                    progress.on_log(arguments, state, control, logs={"eval_loss": 0.1 * step})
                    progress.on_evaluate(arguments, state, control, metrics={"eval_loss": 0.1 * step})
                    progress.on_save(arguments, state, control)
            if attempt == 0:
                place = output.location / METRICS
                place.write(place.read() + b'{"loss": 5.0, "st')  # the checkpoint of step 4 never counted
        lines = lines_of(output)
        assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert [line["loss"] for line in lines] == [1, 2, 3, 14, 15, 16]
        assert [step for step, line in enumerate(lines, 1) if "eval_loss" in line] == [3, 4, 6]
        assert summarise(progress.metrics, state)["last_loss"] == 16
    state.log_history = [{"loss": 1.0}] * 1000
    progress.on_log(arguments, state, control, logs=None)
    assert len(state.log_history) < 100, "a checkpoint does not grow with the steps"


class _Killer(TrainerCallback):
    def on_log(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise RuntimeError("killed")


def history(accuracies: list[float], rewards: list[float]) -> list[dict[str, Any]]:
    pairs = zip(accuracies, rewards, strict=True)
    return [
        {"step": step, "loss": 1.0, "rewards/accuracies": accuracy, "rewards/chosen": reward, "rows_per_second": 1.0}
        for step, (accuracy, reward) in enumerate(pairs, 1)
    ]


def test_easy_pairs_are_warned_of_once_and_only_if_the_preferred_answers_fall(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    falling = history([0.5, 0.8, *[1.0] * 28], [0.0, *[-0.2] * 29])
    warning = warn_of_easy_pairs(falling, 200)
    assert warning is not None and "by step 6 of 200, 96% of the pairs" in warning
    assert warn_of_easy_pairs(history([1.0] * 30, [0.2] * 30), 200) is None, "they become more likely"
    assert warn_of_easy_pairs(history([0.8] * 30, [-0.2] * 30), 200) is None, "they are not told apart"
    late = history([*[0.6] * 25, *[1.0] * 25], [-0.2] * 50)
    assert warn_of_easy_pairs(late, 100) is None and warn_of_easy_pairs(late, 200) is not None
    assert warn_of_easy_pairs([{"step": 1, "loss": 1.0}] * 9, 100) is None, "no pairs"

    progress = Progress("dpo", "dpo", MetricsFile(RunDir.of(str(tmp_path)), tmp_path))
    state = TrainerState(max_steps=200)
    for number, entry in enumerate(falling, 1):
        state.log_history, state.global_step = falling[:number], number
        figures = {"tokens_per_second": 1.0, "peak_memory_gib": 1.0}
        progress.on_log(TrainingArguments(use_cpu=True), state, TrainerControl(), logs={**entry, **figures})
    assert [record.getMessage() for record in caplog.records if "easy" in record.getMessage()] == [f"dpo: {warning}"]


class _Tiny(nn.Module):
    """A language model of one frozen layer of 12 weights with an adapter of 5, embeddings, head, and a projector."""

    def __init__(self) -> None:
        super().__init__()
        self.language_model = nn.Module()
        self.language_model.embed_tokens = nn.Embedding(7, 4)
        self.language_model.layer = nn.Linear(3, 4, bias=False).requires_grad_(False)
        self.language_model.lora_A = nn.Linear(5, 1, bias=False)
        self.lm_head = nn.Linear(4, 7)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def test_the_arithmetic_of_a_token_is_two_operations_for_each_weight_and_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward through 12 + 5 weights, gradients of 5, and a reference of 12."""
    monkeypatch.setattr("stic_ray.stages.training.metrics.parts_of", lambda _: {"language_model": ["language_model"]})
    assert flops_per_token(_Tiny(), has_reference=False) == 4 * 17 + 2 * 5
    assert flops_per_token(_Tiny(), has_reference=True) == 4 * 17 + 2 * 5 + 2 * 12


def test_totals_weigh_steps_by_their_seconds() -> None:
    steps = [
        {
            "seconds/step": 1.0,
            "seconds/data": 0.5,
            "rows_per_second": 4.0,
            "mfu": 0.2,
            "peak_memory_gib": 2.0,
            "loss": 1,
        },
        {
            "seconds/step": 3.0,
            "seconds/data": 0.1,
            "rows_per_second": 8.0,
            "mfu": 0.4,
            "peak_memory_gib": 3.0,
            "loss": 1,
        },
        {"eval_loss": 1.0},
    ]
    expected = {"seconds/step": 4, "seconds/data": 0.6, "rows_per_second": 7, "mfu": 0.35, "peak_memory_gib": 3}
    assert totals(steps) == pytest.approx(expected)
    assert totals(steps[2:]) == {}


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_one_line_before_work(tracker: str, tiny_llava: Path) -> None:
    if importlib.util.find_spec(tracker) is not None:
        pytest.skip(f"{tracker} is installed here")
    config = config_for(tiny_llava, workers={"trackers": [tracker]})
    with pytest.raises(ConfigError, match=rf"trackers={tracker} needs the extra stic-ray\[{tracker}\]"):
        check(config, "dpo")


@pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
def test_other_trackers_go_on_in_the_same_run(
    tracker: str, tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, in files; where the extra is installed."""
    pytest.importorskip(tracker)
    for name in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR", "MLFLOW_RUN_ID", "MLFLOW_MAX_LOG_PARAMS"):
        monkeypatch.setenv(name, "")  # so that what is set below does not outlive this test
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlruns")
    output = RunDir.of(str(tmp_path / "dpo"))
    config = config_for(tiny_llava, dpo={"num_steps": 2}, workers={"trackers": [tracker], "save_every_steps": 1})
    ids = []
    for steps in (2, 3):
        start_trackers(config, output)
        trainer = make_trainer(config, tmp_path, output)
        trainer.args.max_steps = steps
        trainer.train(resume_from_checkpoint=steps == 3)
        ids.append(output.read_json(TRACKER_IDS)[tracker])
    assert ids[0] == ids[1]
    if tracker == "wandb":
        runs = list((tmp_path / "dpo" / "wandb").glob(f"offline-run-*-{ids[0]}"))
        assert runs and all(list(run.glob("*.wandb")) for run in runs)
    else:
        (losses,) = (tmp_path / "mlruns").glob(f"*/{ids[0]}/metrics/loss")
        assert [line.split()[2] for line in losses.read_text().splitlines()] == ["1", "2", "3"]
