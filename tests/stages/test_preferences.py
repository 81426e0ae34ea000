"""Stage `preferences`: STIC's rules on what is written, whatever the number of actors and whatever dies."""

import io
import os
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, load_dataset
from PIL import Image

from stic_ray.core.errors import ModelError, RunError, SourceError, StageError
from stic_ray.core.rundir import RunDir
from stic_ray.method.corruption import corrupt, pixel_change
from stic_ray.stages.preferences import build_preferences
from tests.stages.builders import (
    TELLING,
    draw_pictures,
    fake_config,
    pairs_of,
    rejected_of,
    run_stages,
    step_of,
    white_picture,
)


@pytest.mark.usefixtures("ray_session")
def test_dispreferred_answers_come_from_the_corrupted_picture(tmp_path: Path) -> None:
    """The fake engine says which picture it was shown; with a corruption that never happens this test fails."""
    pictures = draw_pictures(tmp_path / "pictures", 24)
    run = run_stages(fake_config(tmp_path, pictures, TELLING), tmp_path / "run", "pool", "preferences")
    rows = pairs_of(run).to_pylist()
    kinds = {row["corruption"]["kind"] if row["corruption"] else "clean" for row in rows}
    assert kinds == {"clean", "low_resolution", "colour_jitter"}
    for row in rows:
        clean = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        said, chosen = row["rejected"][0]["content"], row["chosen"][0]["content"]
        assert chosen.startswith("Chosen 64x64 ")
        assert "step" in row["chosen_prompt"] and row["chosen_prompt"] != row["prompt"][0]["content"]
        if row["negative"] == "hallucination_prompt":
            assert row["corruption"] is None and row["pixel_change"] is None
            assert row["rejected_prompt"] != row["prompt"][0]["content"]
            assert said.startswith("Seen 64x64 in")
            continue
        assert row["rejected_prompt"] == row["prompt"][0]["content"]
        corrupted = corrupt(clean, row["corruption"])
        assert row["pixel_change"] == pytest.approx(pixel_change(clean, corrupted)) and row["pixel_change"] > 0
        assert f"Seen {corrupted.width}x{corrupted.height} in {_mean_colour(corrupted)}." == said
        assert _mean_colour(corrupted) != _mean_colour(clean) or corrupted.size != clean.size


def _mean_colour(picture: Image.Image) -> str:
    red, green, blue = (sum(band.get_flattened_data()) / (picture.width * picture.height) for band in picture.split())
    return f"#{round(red):02x}{round(green):02x}{round(blue):02x}"


@pytest.mark.usefixtures("ray_session")
def test_pairs_do_not_depend_on_the_number_of_actors(tmp_path: Path, tiny_llava: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 12)
    tables = []
    for num_actors, batch_size in ((1, 8), (3, 8)):
        config = fake_config(
            tmp_path,
            pictures,
            model={"engine": "transformers", "path": str(tiny_llava)},
            preferences={"temperature": 0.0, "max_new_tokens": 12, "allow_truncated": True},
            actors={"num_actors": num_actors, "batch_size": batch_size},
        )
        tables.append(pairs_of(run_stages(config, tmp_path / f"run{num_actors}", "pool", "preferences")))
    assert tables[0].num_rows > 6
    assert tables[0].equals(tables[1])


@pytest.mark.usefixtures("ray_session")
def test_what_is_no_pair_is_a_rejected_row(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 6)
    white_picture(pictures / "white.png")
    config = fake_config(
        tmp_path,
        pictures,
        TELLING,
        preferences={"hallucination_share": 0.0, "low_resolution_share": 1.0, "max_new_tokens": 3},
    )
    with pytest.raises(SourceError, match="Not one of 7 images gave a preference pair") as caught:
        run_stages(config, tmp_path / "run", "pool", "preferences")
    assert "'truncated_answer': 6" in str(caught.value)
    reasons = [row["reason"] for row in rejected_of(RunDir.of(str(tmp_path / "run")), "preferences")]
    assert sorted(reasons) == ["corruption_changed_nothing"] + ["truncated_answer"] * 6


@pytest.mark.usefixtures("ray_session")
def test_rows_too_long_to_train_on_are_rejected_with_a_count(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 16)
    script = "rules: [{prompt: step, answer: 'one two three four five {seed}'}]\ndefault: 'short'\nnum_image_tokens: 10"
    config = fake_config(tmp_path, pictures, script, dpo={"max_length_tokens": 22})
    run = run_stages(config, tmp_path / "run", "pool", "preferences")
    rows = pairs_of(run).to_pylist()
    assert rows and all(row["num_sequence_tokens"] <= 22 for row in rows)
    assert all(row["num_image_tokens"] == 10 for row in rows)
    manifest = (run / "preferences").manifest
    assert manifest is not None and manifest["rejected_by_reason"]["too_long"] == 16 - len(rows) > 0


@pytest.mark.usefixtures("ray_session")
def test_a_shard_without_a_pair_leaves_no_empty_pairs_file(tmp_path: Path) -> None:
    """`datasets` cannot read a Parquet file without rows; the shard is done all the same."""
    pictures = draw_pictures(tmp_path / "pictures", 5)
    white_picture(pictures / "white.png")
    config = fake_config(tmp_path, pictures, TELLING, pool={"shard_size": 1}, preferences={"hallucination_share": 0.0})
    run = run_stages(config, tmp_path / "run", "pool", "preferences")
    rows = load_dataset("parquet", data_files=f"{run.uri}/preferences/pairs-*.parquet", split="train")
    assert isinstance(rows, Dataset) and rows.num_rows == len((run / "preferences").shards("pairs")) == 5
    ((run / "preferences").location / "manifest.json").delete()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "preferences").glob("*.parquet")}
    run_stages(config, tmp_path / "run", "preferences")
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.usefixtures("ray_session")
def test_settings_of_stages_before_must_fit_too(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 5)
    run_stages(fake_config(tmp_path, pictures, TELLING), tmp_path / "run", "pool")
    with pytest.raises(RunError, match="pool.shard_size was 4, is now 3"):
        run_stages(fake_config(tmp_path, pictures, TELLING, pool={"shard_size": 3}), tmp_path / "run", "preferences")


@pytest.mark.usefixtures("ray_session")
def test_only_the_missing_shard_is_done_again(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", 12)
    config = fake_config(tmp_path, pictures, TELLING)
    run = run_stages(config, tmp_path / "run", "pool", "preferences")
    before = pairs_of(run)
    output = run / "preferences"
    written = {shard.name: os.stat(shard.path).st_mtime_ns for shard in output.shards("pairs")}
    (output.location / "manifest.json").delete()
    output.shards("pairs")[1].delete()

    again = run_stages(config, tmp_path / "run", "preferences")

    assert pairs_of(again).equals(before)
    now = {shard.name: os.stat(shard.path).st_mtime_ns for shard in output.shards("pairs")}
    assert {name for name in now if now[name] != written[name]} == {"pairs-000001.parquet"}


@pytest.mark.usefixtures("ray_session")
def test_a_shard_that_cannot_be_written_stops_the_stage_in_one_line(tmp_path: Path) -> None:
    """A folder stands where a shard belongs; the other shards stay, and the rerun after mending does the rest."""
    pictures = draw_pictures(tmp_path / "pictures", 8)
    config = fake_config(tmp_path, pictures, TELLING)
    obstacle = tmp_path / "run" / "preferences" / "pairs-000001.parquet" / "in the way"
    obstacle.mkdir(parents=True)
    with pytest.raises(StageError, match="preferences could not read or write: .*pairs-000001.parquet") as caught:
        run_stages(config, tmp_path / "run", "pool", "preferences")
    assert "\n" not in str(caught.value) and "run the same command again" in str(caught.value)
    shutil.rmtree(obstacle.parent)
    assert pairs_of(run_stages(config, tmp_path / "run", "preferences")).num_rows == 8


@pytest.mark.usefixtures("ray_session")
def test_a_model_that_an_actor_cannot_load_is_the_users_error(tmp_path: Path) -> None:
    """The engine's script is gone when the actor starts: an error inside its constructor."""
    config = fake_config(tmp_path, tmp_path, model={"engine": "fake", "path": str(tmp_path / "nowhere.yaml")})
    draw_pictures(tmp_path / "pictures", 2)
    run_stages(fake_config(tmp_path, tmp_path / "pictures"), tmp_path / "run", "pool")
    with pytest.raises(ModelError, match="nowhere.yaml"):
        build_preferences(step_of(config, RunDir.of(str(tmp_path / "run")), "preferences"))
