"""The whole pipeline through the command line, on pictures, a model and instruction data of the user's own.

One run in a subprocess, shared by the tests below: about a minute on two cores.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, Image, load_dataset
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from stic_ray.core.rundir import RunDir
from stic_ray.recipes import demo
from tests import tiny_models
from tests.stages.builders import draw_pictures

STAGES = demo().steps(demo().config)
ROOT = Path(__file__).parents[2]


def run_job(*arguments: str, job: str = "full_pipeline.py") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "jobs" / job), *arguments], capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A complete command on 28 pictures, a LLaVA-1.5-like checkpoint, and 10 instruction rows."""
    folder = tmp_path_factory.mktemp("whole")
    pictures = draw_pictures(folder / "pictures", 28)
    (pictures / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    model = tiny_models.build("llava", folder / "model")
    rows: list[dict[str, Any]] = [
        {
            "id": str(index),
            "image": f"{index:03d}.jpg",
            "conversations": [
                {"from": "human", "value": "<image>\nWhat is in the picture?"},
                {"from": "gpt", "value": "A few shapes."},
            ],
        }
        for index in range(8)
    ]
    rows.append({"id": "text", "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]})
    rows.append({**rows[0], "id": "gone", "image": "none.jpg"})
    (folder / "instructions.json").write_text(json.dumps(rows))
    settings = [
        f"pool.source={pictures}",
        f"model.path={model}",
        f"infusion.source={folder / 'instructions.json'}",
        f"infusion.images={pictures}",
        "toyworld.num_scenes=6",
        "preferences.max_new_tokens=12",
        "pool.shard_size=10",
        "actors.num_actors=1",  # a second one costs more to start than it saves
    ]
    return [
        "--run",
        str(folder / "run"),
        "--recipe",
        "demo",
        *(part for setting in settings for part in ("--set", setting)),
    ]


@pytest.fixture(scope="module")
def run(command: list[str]) -> RunDir:
    done = run_job(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    for place in ("report.html", "dpo/checkpoint", "sft/checkpoint", "preferences"):
        assert f"{command[1]}/{place}" in done.stdout
    return RunDir.of(command[1])


def one_step(settings: Callable[..., Any], folder: Path) -> Any:
    """TRL's own arguments for one step on a CPU."""
    return settings(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        report_to="none",
    )


def test_rows_are_conserved_in_every_stage(run: RunDir) -> None:
    manifests: dict[str, dict[str, Any]] = {stage.name: (run / stage.name).manifest or {} for stage in STAGES}
    for manifest in manifests.values():
        assert manifest["num_rows_in"] == manifest["num_rows_written"] + manifest["num_rows_rejected"]
        assert manifest["num_rows_rejected"] == sum(manifest["rejected_by_reason"].values())
    assert (manifests["pool"]["num_rows_in"], manifests["pool"]["num_rows_written"]) == (29, 28)
    assert manifests["preferences"]["num_rows_in"] == 28
    assert manifests["dpo"]["num_rows_in"] == manifests["preferences"]["num_rows_written"]
    assert (manifests["infusion"]["num_rows_in"], manifests["infusion"]["num_rows_written"]) == (10, 9)
    num_scores = 3 + 3 + 1 + 3 * 1  # descriptions twice with three metrics, questions, POPE three times
    assert manifests["evaluation"]["num_rows_in"] == num_scores * 6 * 2 * 3


def test_config_yaml_says_what_was_run_with_what(run: RunDir, command: list[str]) -> None:
    record = yaml.safe_load((run.location / "config.yaml").read())
    assert record["recipe"] == "demo" and "pool.shard_size=10" in record["overrides"]
    assert record["config"]["pool"]["shard_size"] == 10
    assert record["package_versions"]["trl"] == "1.16.0"


def test_trl_trains_on_the_pairs_without_our_code(run: RunDir, command: list[str], tmp_path: Path) -> None:
    rows = load_dataset("parquet", data_files=f"{run.uri}/preferences/pairs-*.parquet", split="train")
    assert isinstance(rows, Dataset) and isinstance(rows.features["image"], Image)
    assert rows[0]["image"].size == (64, 64)
    trainer = DPOTrainer(_setting(command, "model.path"), args=one_step(DPOConfig, tmp_path), train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 1


def test_trl_trains_on_the_infused_rows_without_our_code(run: RunDir, command: list[str], tmp_path: Path) -> None:
    rows = load_dataset("parquet", data_files=f"{run.uri}/infusion/rows-*.parquet", split="train")
    assert isinstance(rows, Dataset) and isinstance(rows.features["image"], Image)
    assert rows.num_rows == 8
    trainer = SFTTrainer(_setting(command, "model.path"), args=one_step(SFTConfig, tmp_path), train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 1


def test_checkpoints_load_with_plain_from_pretrained(run: RunDir, command: list[str]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(_setting(command, "model.path"))
    for stage in ("dpo", "sft"):
        checkpoint = f"{run.uri}/{stage}/checkpoint"
        adapted = PeftModel.from_pretrained(model, checkpoint)
        assert any(p.any() for name, p in adapted.named_parameters() if "lora_B" in name)
        model = adapted.unload()
        assert AutoProcessor.from_pretrained(checkpoint).chat_template


def test_the_report_shows_the_run(run: RunDir) -> None:
    page = (run.location / "report.html").read().decode()
    report = run.read_json("report.json")
    assert page.count("data:image/") >= 24
    assert report is not None and "toy_describe" in page and "unsupported_format" in page


def test_a_second_run_does_nothing_and_is_quick(run: RunDir, command: list[str]) -> None:
    """Skipping starts no Ray, and leaves every file as it was."""
    before = {path: path.stat().st_mtime_ns for path in Path(run.uri).rglob("*") if path.is_file()}
    again = run_job(*command)
    assert again.returncode == 0
    assert again.stderr.count("already done, skipped") == len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in Path(run.uri).rglob("*") if path.is_file()} == before
    assert "ray" not in again.stderr.lower().replace("stic_ray", "")


def test_other_settings_for_a_finished_stage_are_refused(run: RunDir, command: list[str]) -> None:
    refused = run_job(*command, "--set", "dpo.beta=0.2")
    assert refused.returncode == 1
    assert "dpo.beta was 0.1, is now 0.2" in refused.stderr and "another --run" in refused.stderr
    assert "Traceback" not in refused.stderr
    more_actors = run_job(*command, "--set", "actors.num_actors=4", "--set", "workers.num_workers=4")
    assert more_actors.returncode == 0, "what a run is computed with may change"


def test_a_checkpoint_can_be_scored_alone(run: RunDir, command: list[str], tmp_path: Path) -> None:
    pictures = Path(_setting(command, "pool.source"))
    benchmark, image = pictures.with_name("mine.jsonl"), f"{pictures.name}/000.jpg"
    benchmark.write_text(json.dumps({"image": image, "question": "Which?", "choices": ["a", "b"], "answer": "A"}))
    arguments = [
        "--recipe",
        "demo",
        "--model",
        _setting(command, "model.path"),
        "--benchmark",
        str(benchmark),
        "--run",
        str(tmp_path / "s"),
    ]
    done = run_job(*arguments, "--checkpoint", f"{run.uri}/sft/checkpoint", job="evaluate.py")
    assert done.returncode == 0, done.stderr[-3000:]
    scores = (RunDir.of(str(tmp_path / "s")) / "evaluation").read_json("scores.json")
    assert [(row["model"], row["mode"]) for row in scores] == [
        ("base", "describe_and_respond"),
        ("base", "direct"),
        ("checkpoint", "describe_and_respond"),
        ("checkpoint", "direct"),
    ]
    missing = run_job(*arguments[:-1], str(tmp_path / "t"), "--checkpoint", "nowhere", job="evaluate.py")
    assert missing.returncode == 1 and "error: --checkpoint 'nowhere' is no folder" in missing.stderr


def _setting(command: list[str], key: str) -> str:
    return next(part.partition("=")[2] for part in command if part.startswith(f"{key}="))
