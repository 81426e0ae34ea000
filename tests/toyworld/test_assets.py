"""Folders of the toy world are whole or absent, the same for the same arguments, and apart from each other."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from stic_ray.core.errors import ConfigError
from stic_ray.core.overrides import build_config
from stic_ray.core.rundir import RunDir
from stic_ray.stages.benchmarks import read_benchmarks
from stic_ray.toyworld import assets
from stic_ray.toyworld.assets import (
    BENCHMARKS,
    make_toyworld,
    resolve_toyworld,
    write_benchmarks,
    write_instructions,
    write_pool,
)
from stic_ray.toyworld.language import caption_of
from stic_ray.toyworld.scenes import sample_scene


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pools_are_nested_and_the_same_from_any_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pool(tmp_path / "small", seed=3, num_pictures=7)
    write_pool(tmp_path / "large", seed=3, num_pictures=2100, num_processes=2)
    small, large = contents(tmp_path / "small"), contents(tmp_path / "large")
    assert len(large) == 2100 and len(set(large.values())) == 2100
    assert small.items() <= large.items()
    assert set(small.values()).isdisjoint(contents_of_seed(tmp_path / "other", 4).values())


def contents_of_seed(folder: Path, seed: int) -> dict[str, bytes]:
    write_pool(folder, seed=seed, num_pictures=7)
    return contents(folder)


def test_parquet_holds_the_pictures_of_the_files_and_no_truth(tmp_path: Path) -> None:
    write_pool(tmp_path / "files", seed=3, num_pictures=7)
    write_pool(tmp_path / "tables", seed=3, num_pictures=7, form="parquet")
    table = pq.read_table(tmp_path / "tables")
    assert table.column_names == ["image"]
    stored = {row["path"]: row["bytes"] for row in table["image"].to_pylist()}
    assert stored == {Path(name).name: data for name, data in contents(tmp_path / "files").items()}


def test_captions_stand_beside_the_same_pictures_and_name_what_is_there(tmp_path: Path) -> None:
    write_pool(tmp_path / "plain", seed=3, num_pictures=7)
    write_pool(tmp_path / "files", seed=3, num_pictures=7, captions=True)
    write_pool(tmp_path / "tables", seed=3, num_pictures=7, form="parquet", captions=True)
    files = contents(tmp_path / "files")
    texts = {name: files.pop(name).decode() for name in sorted(files) if name.endswith(".txt")}
    assert files == contents(tmp_path / "plain")
    assert sorted(texts) == sorted(name.replace(".jpg", ".txt") for name in files)
    table = pq.read_table(tmp_path / "tables")
    assert [f"{caption}\n" for caption in table["caption"].to_pylist()] == list(texts.values())
    scenes = [sample_scene(3, assets.POOL_FIRST_INDEX + number) for number in range(7)]
    assert table["caption"].to_pylist() == [caption_of(scene) for scene in scenes]


def test_a_run_takes_the_captions_of_the_toy_world_when_it_asks_for_them(tmp_path: Path) -> None:
    run = RunDir.of(str(tmp_path))
    given = {"name": "toy", "toyworld": {"num_pictures": 3}}
    plain = resolve_toyworld(build_config(given), run)
    config = build_config({**given, "pool": {"caption_member": "txt"}})
    resolved = resolve_toyworld(config, run)
    assert resolved.pool.source == f"{plain.pool.source}-captions"
    make_toyworld(["pool.source"], config, run)
    assert sum(name.endswith(".txt") for name in contents(Path(resolved.pool.source))) == 3
    for wrong in ({"caption_column": "caption"}, {"caption_member": "json:caption"}):
        with pytest.raises(ConfigError, match="Set pool.caption_member=txt alone"):
            resolve_toyworld(build_config({**given, "pool": wrong}), run)


def test_a_folder_that_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    write_pool(tmp_path / "pool", seed=0, num_pictures=3)
    assert not contents(tmp_path)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(assets, "_save", full)
    with pytest.raises(OSError, match="No space left"):
        write_instructions(tmp_path / "instructions", seed=0, num_rows=2)
    assert not list(tmp_path.iterdir())


def test_negative_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_pictures is -1"):
        write_pool(tmp_path / "pool", seed=0, num_pictures=-1)


def test_instructions_are_questions_with_an_image_each(tmp_path: Path) -> None:
    write_instructions(tmp_path / "data", seed=0, num_rows=9)
    rows = json.loads((tmp_path / "data/instructions.json").read_text())
    assert len({row["id"] for row in rows}) == 9
    for row in rows:
        with Image.open(tmp_path / "data" / row["image"]) as picture:
            assert picture.size == (48, 48)
        turns = row["conversations"]
        assert 2 <= len(turns) <= 6 and [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
        assert turns[0]["value"].startswith("<image>\n")
        assert not any("escribe" in turn["value"] for turn in turns)  # descriptions would be labels of the pool's task


def test_benchmarks_are_valid_balanced_and_held_out(tmp_path: Path) -> None:
    write_benchmarks(tmp_path / "test", num_scenes=40, split="test")
    write_benchmarks(tmp_path / "tuning", num_scenes=40, split="tuning")
    write_pool(tmp_path / "pool", seed=0, num_pictures=40)
    questions = read_benchmarks([str(tmp_path / f"test/{name}.jsonl") for name in BENCHMARKS])
    assert len(questions) == 40 * len(BENCHMARKS)
    for distractor in ("random", "popular", "adversarial"):
        answers = [q["answers"][0] for q in questions if q["benchmark"] == f"toy_pope_{distractor}"]
        assert answers.count("yes") == answers.count("no") == 20
    pictures = [set(contents(tmp_path / name / "images").values()) for name in ("test", "tuning")]
    pool = set(contents(tmp_path / "pool").values())
    assert pictures[0].isdisjoint(pictures[1]) and pool.isdisjoint(pictures[0] | pictures[1])
