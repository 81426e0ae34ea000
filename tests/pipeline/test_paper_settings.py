"""The settings files of papers run on the toy world as they are, here on a few of its pictures."""

from pathlib import Path

import pytest

from stic_ray.cli import parser, read_config
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import INFUSED, PAIRS
from stic_ray.pipeline import names_of, run_pipeline

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # two trainings and an evaluation, of some

FOLDER = Path(__file__).parents[2] / "recipes"
SMALL = (
    "toyworld.num_pictures=32",
    "toyworld.num_scenes=2",
    "pool.shard_size=16",
    "actors.batch_size=16",
    "workers.num_workers=1",
    "dpo.num_steps=2",
    "sft.num_steps=2",
)


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.yaml")), ids=lambda file: file.stem)
def test_it_runs_on_the_toy_world(file: Path, tmp_path: Path, ray_session: None) -> None:
    overrides = [word for setting in SMALL for word in ("--set", setting)]
    config, recipe, _, facts = read_config(parser(None).parse_args(["--config", str(file), *overrides]))
    steps, run = recipe.steps(config), RunDir.of(str(tmp_path / "run"))
    names = names_of(steps)
    run_pipeline(config, steps, run, names, facts)
    scored = {row["model"] for row in (run / "evaluation").read_json("scores.json")}
    assert scored == set(config.evaluation.models)
    assert (run.location / "report.html").exists()
    training = next(
        step for step in reversed(steps) if step.stage.need(config).what == "workers" and step.name in names
    )
    [(role, source)] = [(role, source) for role, source in training.inputs.items() if role != "model"]
    assert (run / source).read_table(role, {"pairs": PAIRS, "rows": INFUSED}[role]).num_rows > 0
