"""What a run directory says of how far it is."""

from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from stic_ray import cli
from stic_ray.core.errors import RunError
from stic_ray.core.publishing import publish
from stic_ray.core.rundir import STARTED, RunDir, row_counts
from stic_ray.recipes import recipe
from stic_ray.stages.ordering import index_shards
from stic_ray.status import run_status


def begun(folder: Path) -> RunDir:
    """A run whose pool has 1,000 images, in shards of 128 in the demo."""
    run, config = RunDir.of(str(folder)), recipe("demo").config
    steps = [step.record(config) for step in recipe("demo").steps(config)]
    run.write_text("config.yaml", yaml.safe_dump({"config": config.model_dump(mode="json"), "steps": steps}))
    counts = row_counts(1010, 1000, {"duplicate": 10})
    extents = [{"first_shard": 0, "first_position": 0, "num_rows": 1000}]
    (run / "pool").write_manifest({"stage": "pool", "seconds": 4.0, "extents": extents, **counts})
    return run


def line(run: RunDir, stage: str) -> str:
    (found,) = (line for line in run_status(run) if line.startswith(f"{stage} "))
    return found


def test_each_stage_has_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begun(tmp_path)
    cli.status(None, ["--run", run.uri])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["pool", "preferences", "dpo", "infusion", "sft", "evaluation"]
    assert "finished    1,010 in, 1,000 written, 10 rejected, 0 failed (duplicate 10)" in lines[0]
    assert all(line.endswith("not begun") for line in lines[1:])


def test_shards_that_are_there_are_counted(tmp_path: Path) -> None:
    run = begun(tmp_path)
    stage, rows = run / "preferences", pa.table({"a": [1]})
    stage.write_json(STARTED, {"num_shards": {"pairs": 8}})
    assert "0 of 8 shards" in line(run, "preferences")
    for number, tables in ((0, {"pairs": rows}), (2, {})):
        publish(stage, "", number, tables, {"pairs": rows.schema})
    stage.write_shard("pairs", 3, rows, rows.schema)  # without a record: cut off
    stage.write_json("notes-000001.json", {})
    assert "begun       2 of 8 shards, 1 at work or cut off; last file" in line(run, "preferences")


@pytest.mark.parametrize(("images", "num_shards"), [(None, 8), (129, 2), (128, 1)])
def test_only_the_images_that_are_asked_for_count(images: int | None, num_shards: int, tmp_path: Path) -> None:
    assert len(index_shards(begun(tmp_path) / "pool", 128, images)) == num_shards


def test_a_training_tells_its_last_checkpoint(tmp_path: Path) -> None:
    run = begun(tmp_path)
    (run / "dpo").write_json(STARTED, {})
    assert "no checkpoint yet" in line(run, "dpo")
    for name in ("checkpoint_2026-11-21_10-00-00.1", "checkpoint_2026-11-21_10-05-00.2"):
        (run / "dpo" / "training" / "attempt-1" / name).write_text("adapter.json", "{}")
    assert "last checkpoint checkpoint_2026-11-21_10-05-00.2" in line(run, "dpo")


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no config.yaml"):
        run_status(RunDir.of(str(tmp_path)))
