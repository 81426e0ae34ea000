"""The command line: mistakes end in one line and status 1, and a dry run touches nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from stic_ray.recipes import RECIPES
from tests import tiny_models
from tests.stages.builders import draw_pictures

ROOT = Path(__file__).parents[2]


def pipeline(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "jobs" / "full_pipeline.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=folder)


def refusal(*arguments: str, folder: Path) -> str:
    """Run, expect status 1 and no traceback, and return the one line that says what is wrong."""
    done = pipeline(*arguments, folder=folder)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dry_run_prints_the_whole_plan_and_touches_nothing(recipe: str, tmp_path: Path) -> None:
    """Nor does it start a Ray. A plan for more GPUs than there are is printed, and then refused."""
    done = pipeline("--dry-run", "--recipe", recipe, folder=tmp_path)
    asked = {
        "llava16_7b": ("8 actors of 4 CPU", "4 workers of 4 CPU"),
        "any_model": ("1 actor of 2 CPU", "1 worker of 2 CPU"),
    }
    actors, workers = asked.get(recipe, ("", ""))
    refused = f"error: preferences, infusion, evaluation ask for {actors}, 1 GPU" if actors else ""
    assert done.returncode == (1 if refused else 0) and done.stderr.startswith(refused), done.stderr
    assert f"dpo, sft ask for {workers}, 1 GPU, and 0 fit: this machine has" in done.stderr or not refused
    known = RECIPES[recipe]()
    for word in ("learning_rate", "report ", *(f"{step.name} " for step in known.steps(known.config))):
        assert word in done.stdout
    assert "GPU-hours" in done.stdout, "and an estimate"
    assert list(tmp_path.iterdir()) == []


def test_the_published_settings_are_in_the_plan(tmp_path: Path) -> None:
    text = pipeline("--dry-run", "--recipe", "llava16_7b", folder=tmp_path).stdout
    for setting in ("lora_rank: 128", "lora_alpha: 256", "lora_dropout: 0.05", "num_images: 6000", "zero_stage: 2"):
        assert setting in text
    assert "global batch 8 = 4 x 1 x 2 steps" in text and "global batch 32 = 4 x 1 x 8 steps" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "model.path=./mine"], "model.path='./mine' is not the demo's model"),
        (["--recipe", "any_model", "--set", "model.path=./mine"], "--set pool.source=... --set infusion.source=... "),
        (["--recipe", "llava16_7b", "--stages", "pool"], "'llava16_7b' leaves this to you: --set pool.source=..."),
        (["--set", "dpo.bta=1"], "Unknown key 'bta' in section 'dpo'. Did you mean 'beta'?"),
        (["--set", "dpo.beta=many"], "dpo.beta"),
        (["--set", "dpo"], "section.field=value"),
        (["--recipe", "dem"], "Did you mean 'demo'?"),
        (["--stages", "pol"], "Did you mean 'pool'?"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--recipe", "demo", "--config", "a.yaml"], "not both"),
        (["--recpie", "demo"], "--recpie"),
        (["--set", "pool.source=nowhere", "--stages", "pool"], "pool.source='nowhere' does not exist"),
        (["--set", "prompts=nowhere.yaml"], "nowhere.yaml"),
        (["--set", "dpo.global_batch=7"], "global_batch=7 is not divisible"),
        (["--recipe", "demo", "--set", "model.path=./nowhere"], "model.path='./nowhere' is no directory"),
        (["--set", "infusion.source=nowhere.json"], "nowhere.json"),
        (["--set", "evaluation.benchmarks=[nowhere.jsonl]"], "nowhere.jsonl"),
        (
            ["--set", "actors.num_gpus=1"],
            "evaluation ask for 2 actors of 1 CPU, 1 GPU, and 0.25 CPU for tasks, and 0 fit",
        ),
        (["--stages", "sft"], "Stage sft needs stage dpo"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in refusal(*arguments, folder=tmp_path)


def test_sources_without_anything_to_use_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jpg").write_text("no picture")
    assert "empty folder" in refusal("--run", "a", "--set", "pool.source=empty", folder=tmp_path)
    assert "no image that can be used" in refusal("--run", "b", "--set", "pool.source=bad", folder=tmp_path)


@pytest.mark.parametrize("family", ["qwen2_vl", "smolvlm"])
def test_families_that_need_torchvision_name_the_extra(family: str, tmp_path: Path) -> None:
    tiny_models.build(family, tmp_path / family)
    assert "stic-ray[torchvision]" in refusal("--recipe", "demo", "--set", f"model.path={family}", folder=tmp_path)


def test_a_run_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "file" in refusal("--run", "file", "--stages", "pool", folder=tmp_path)


def test_evaluation_alone_scores_the_base_model_only(tmp_path: Path) -> None:
    from tests.stages.builders import fake_script

    (tmp_path / "b.jsonl").write_text(
        '{"question": "Which?", "answer": "red"}\n{"question": "What?", "answer": "blue"}'
    )
    script = fake_script(tmp_path, "default: red")
    command = [sys.executable, str(ROOT / "jobs" / "evaluate.py"), "--model", script, "--benchmark", "b.jsonl"]
    command += ["--set", "model.engine=fake", "--run", "scores"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:5] for line in done.stdout.splitlines()] == [
        ["b", "exact_match", "base", "describe_and_respond", "0.500"],
        ["b", "exact_match", "base", "direct", "0.500"],
    ]


def test_a_directory_that_is_no_model_is_one_line(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 1)
    assert "is no model: it has no config.json" in refusal(
        "--recipe", "demo", "--set", f"model.path={pictures}", folder=tmp_path
    )


def test_a_half_done_stage_is_not_finished_with_other_settings(tmp_path: Path) -> None:
    """Shards made with one setting must not stand beside shards made with another."""
    from tests.stages.builders import fake_script

    draw_pictures(tmp_path / "pictures", 4)
    script = fake_script(tmp_path, "default: 'the same'")
    settings = ["--run", "run", "--stages", "pool,preferences", "--set", "pool.source=pictures"]
    settings += ["--set", "model.engine=fake", "--set", f"model.path={script}"]
    assert "Not one of 4 images" in refusal(*settings, folder=tmp_path)
    message = refusal(*settings, "--set", "preferences.temperature=0.5", folder=tmp_path)
    assert "begun with other settings: preferences.temperature was 0.2, is now 0.5" in message
