"""A recipe of a user's own: plan, estimate, run, status and report know its steps, and no module lists any."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import stic_ray
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import PAIRS
from stic_ray.recipes import demo
from stic_ray.status import run_status

JOB = Path(__file__).with_name("own_recipe.py")
STEPS = ["pool", "preferences", "dpo", "preferences_2", "dpo_2", "words", "evaluation"]
SETTINGS = {
    "toyworld.num_pictures": 24,
    "toyworld.num_scenes": 4,
    "preferences.max_new_tokens": 12,
    "evaluation.benchmarks": "[toyworld:toy_describe]",
    "evaluation.modes": "[direct]",
    "evaluation.max_description_tokens": 12,
    "actors.num_actors": 1,
    "workers.num_workers": 1,
    "workers.zero_stage": 0,
    "workers.micro_batch": 8,
}


def job(run: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    given = [part for setting in SETTINGS.items() for part in ("--set", "=".join(map(str, setting)))]
    command = [sys.executable, str(JOB), "--run", str(run), *given, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("rounds") / "run"
    done = job(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return RunDir.of(str(folder))


def test_the_recipe_is_short() -> None:
    assert len(JOB.read_text(encoding="utf-8").splitlines()) <= 60 + 6  # and how it is called


def test_plan_and_estimate_show_the_steps(tmp_path: Path) -> None:
    done = job(tmp_path / "run", "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    plan = [line for line in lines if " to do " in line]
    assert [line.split()[0] for line in plan] == STEPS
    assert "reads preferences_2, dpo; 1 workers" in plan[4] and "leaves dpo_2/checkpoint/" in plan[4]
    assert "reads preferences_2; tasks; leaves words/words.json" in plan[5]
    estimate = lines[next(i for i, line in enumerate(lines) if line.startswith("estimate with")) :]
    assert [line.split()[0] for line in estimate[2 : 2 + len(STEPS)]] == STEPS
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_second_round_goes_on_from_the_first(run: RunDir) -> None:
    manifests = {name: (run / name).manifest or {} for name in STEPS}
    assert [manifests[name]["stage"] for name in STEPS] == [
        *("pool", "preferences", "dpo", "preferences", "dpo", "words", "evaluation")
    ]
    assert manifests["dpo_2"]["inputs"]["model"]["from"] == "dpo"
    assert manifests["dpo_2"]["config"]["dpo.learning_rate"] == 2e-4
    base, trained = (run / name for name in ("preferences", "preferences_2"))
    answers = [
        [row["chosen"][0]["content"] for row in step.read_table("pairs", PAIRS, ["chosen"]).to_pylist()]
        for step in (base, trained)
    ]
    assert answers[0] != answers[1]
    first_line = json.loads((run.location / "dpo_2" / "metrics.jsonl").read().splitlines()[0])
    assert first_line["loss/dpo"] == pytest.approx(0.693147, abs=2e-4), "the reference is the model that it starts from"
    models = {row["model"] for row in (run / "evaluation").read_json("scores.json")}
    assert models == {"base", "dpo", "dpo_2"}


@pytest.mark.slow
def test_status_and_report_show_the_steps(run: RunDir) -> None:
    assert [line.split()[0] for line in run_status(run)] == STEPS
    report = json.loads((run.location / "report.json").read())
    assert [stage["stage"] for stage in report["stages"]] == STEPS
    assert [training["stage"] for training in report["training"]] == ["dpo", "dpo_2"]
    assert [gallery["stage"] for gallery in report["galleries"]] == ["preferences", "preferences_2"]
    page = (run.location / "report.html").read().decode()
    assert all(name in page for name in STEPS)


@pytest.mark.slow
def test_every_step_records_what_it_was_made_with(run: RunDir) -> None:
    recorded = yaml.safe_load((run.location / "config.yaml").read())["steps"]
    assert [step["name"] for step in recorded] == STEPS
    for name in STEPS:
        attempts = [json.loads(line) for line in (run.location / name / "attempts.jsonl").read().splitlines()]
        manifest: dict[str, Any] = (run / name).manifest or {}
        assert [attempt["ended"] for attempt in attempts] == ["finished"]
        assert manifest["made_with"]["package_versions"]["ray"] and manifest["made_with"]["processes"]["num"] == 1
        assert manifest["num_attempts"] == 1


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(run: RunDir) -> None:
    again = job(Path(run.location.path))
    assert again.returncode == 0 and again.stderr.count("already done, skipped") == len(STEPS)


STAGES = frozenset(step.stage.name for step in demo().steps(demo().config))
OWN_PLACES = {
    *("recipes.py", "core/config.py", "core/training.py", "stages/training/launch.py", "stages/training/worker.py"),
    *(f"stages/{name}.py" for name in STAGES),
}
"""The recipes, the sections of the configuration, each stage's own file, and the trainings of both."""


def stage_names_in(code: str) -> set[str]:
    """Stage names that stand as words of their own: in lists, as keys, in comparisons."""
    nodes = ast.walk(ast.parse(code))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and node.value in STAGES}


def test_no_module_lists_stages_by_name() -> None:
    root = Path(stic_ray.__file__).parent
    found = {
        str(file.relative_to(root)): names
        for file in sorted(root.rglob("*.py"))
        if len(names := stage_names_in(file.read_text(encoding="utf-8"))) > 1
    }
    assert set(found) - OWN_PLACES == set(), found


def test_a_list_of_stages_would_be_found() -> None:
    assert stage_names_in('TRAINING = ("dpo", "sft")') == {"dpo", "sft"}
    assert stage_names_in('"""The stages dpo and sft."""') == set()
