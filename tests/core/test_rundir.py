"""The run directory: fixed names, manifests, row accounts."""

import json
import pickle
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stic_ray.core.rundir import RunDir, digest, read_shard, row_counts, shard_name
from stic_ray.core.schemas import INDEX, PAIRS, REJECTED, table_of
from tests.core.builders import pair, rejected


@pytest.fixture
def stage(tmp_path: Path) -> RunDir:
    return RunDir.of(str(tmp_path)) / "preferences"


def pairs_at(*positions: int) -> pa.Table:
    return table_of([pair(position=position) for position in positions], PAIRS)


def test_opening_a_run_creates_nothing(tmp_path: Path) -> None:
    run = RunDir.of(str(tmp_path / "run")) / "pool"
    assert run.manifest is None
    assert run.shards("index") == []
    assert run.read_table("index", INDEX).num_rows == 0
    assert not (tmp_path / "run").exists()


def test_shards_have_fixed_names_and_come_in_order(stage: RunDir, tmp_path: Path) -> None:
    for number in (11, 2, 0):
        stage.write_shard("pairs", number, pairs_at(number), PAIRS)
    names = ["pairs-000000.parquet", "pairs-000002.parquet", "pairs-000011.parquet"]
    assert sorted(path.name for path in (tmp_path / "preferences").iterdir()) == names
    assert [shard.name for shard in stage.shards("pairs")] == names
    assert stage.shard_numbers("pairs") == {0, 2, 11}
    assert stage.read_table("pairs", PAIRS)["position"].to_pylist() == [0, 2, 11]
    assert stage.read_table("pairs", PAIRS, ["position"]).column_names == ["position"]


def test_shards_come_in_order_beyond_a_million(stage: RunDir) -> None:
    for number in (999_999, 1_000_000):
        stage.write_shard("pairs", number, pairs_at(number), PAIRS)
    assert stage.read_table("pairs", PAIRS)["position"].to_pylist() == [999_999, 1_000_000]


def test_families_whose_names_begin_alike_are_kept_apart(stage: RunDir) -> None:
    stage.write_shard("predictions-mine", 0, pairs_at(0), PAIRS)
    stage.write_shard("predictions-mine-v2", 1, pairs_at(1), PAIRS)
    assert stage.shard_numbers("predictions-mine") == {0}


def test_writing_a_shard_again_replaces_it(stage: RunDir) -> None:
    stage.write_shard("pairs", 0, pairs_at(0, 1, 2), PAIRS)
    stage.write_shard("pairs", 0, pairs_at(5), PAIRS)
    assert stage.read_table("pairs", PAIRS)["position"].to_pylist() == [5]


def test_a_write_that_fails_names_its_path(stage: RunDir, tmp_path: Path) -> None:
    (tmp_path / "preferences").write_text("a file where the folder belongs")
    with pytest.raises(OSError, match=f"'{stage.uri}/pairs-000000.parquet': "):
        stage.write_shard("pairs", 0, pairs_at(0), PAIRS)


def test_rows_survive_as_they_were_written(stage: RunDir) -> None:
    row = pair(
        negative="corrupted_image",
        corruption={
            "kind": "colour_jitter",
            "shorter_side_px": None,
            "brightness_factor": 0.75,
            "hue_shift_turns": -0.1,
            "brightness_first": True,
            "strength": None,
            "seed": None,
        },
        pixel_change=12.5,
    )
    stage.write_shard("pairs", 0, table_of([row], PAIRS), PAIRS)
    assert stage.read_table("pairs", PAIRS).to_pylist() == [row]
    assert read_shard(stage.shards("pairs")[0], PAIRS).schema.equals(PAIRS, check_metadata=True)


def test_a_table_that_does_not_fit_its_schema_is_not_written(stage: RunDir) -> None:
    with pytest.raises(ValueError, match="chosen"):
        stage.write_shard("pairs", 0, pairs_at(0).drop_columns(["chosen"]), PAIRS)
    assert stage.shards("pairs") == []


def test_a_file_that_does_not_fit_its_schema_is_not_read(stage: RunDir, tmp_path: Path) -> None:
    stage.write_shard("pairs", 0, pairs_at(0), PAIRS)
    file = tmp_path / "preferences" / shard_name("pairs", 0)
    pq.write_table(pairs_at(0).set_column(1, "position", pa.array(["0"])), file)
    with pytest.raises(ValueError, match="position"):
        stage.read_table("pairs", PAIRS)


def test_rows_are_counted_by_family(stage: RunDir) -> None:
    stage.write_shard("pairs", 0, pairs_at(0, 1), PAIRS)
    stage.write_shard("pairs", 1, pairs_at(2), PAIRS)
    reasons = ["duplicate", "too_small", "duplicate"]
    stage.write_shard("rejected", 1, table_of([rejected(reason) for reason in reasons], REJECTED), REJECTED)
    assert stage.read_table("pairs", PAIRS).num_rows == 3
    assert stage.read_table("rejected", REJECTED).num_rows == 3


def test_the_accounts_of_a_manifest_add_up() -> None:
    assert row_counts(10, 7, {"duplicate": 2, "too_small": 1}) == {
        "num_rows_in": 10,
        "num_rows_written": 7,
        "num_rows_rejected": 3,
        "num_rows_failed": 0,
        "rejected_by_reason": {"duplicate": 2, "too_small": 1},
    }
    assert row_counts(10, 7, {"duplicate": 2}, 1)["num_rows_failed"] == 1


@pytest.mark.parametrize(("written", "rejections"), [(7, {}), (7, {"duplicate": 4}), (11, {}), (0, {"duplicate": 9})])
def test_accounts_that_do_not_add_up_are_refused(written: int, rejections: dict[str, int]) -> None:
    with pytest.raises(Exception, match=f"10 rows in.*{written} written.*{sum(rejections.values())} rejected"):
        row_counts(10, written, rejections)


def test_a_manifest_marks_a_stage_as_done(stage: RunDir) -> None:
    assert stage.manifest is None
    stage.write_manifest({"stage": "preferences", **row_counts(1, 1, {})})
    manifest = stage.manifest
    assert manifest is not None
    assert manifest["num_rows_in"] == 1
    assert datetime.fromisoformat(manifest["finished_at"]).tzinfo is not None


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_written_json_is_json_for_every_reader(value: float, stage: RunDir) -> None:
    """A score on one question has no interval; browsers and jq do not read `Infinity`."""
    stage.write_json("scores.json", [{"score": 0.5, "low": value}])

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    text = (stage.location / "scores.json").read().decode()
    assert json.loads(text, parse_constant=refuse)[0]["score"] == 0.5


@pytest.mark.parametrize("left", [b"", b'{"num_rows_in": 3, "num', b"\0" * 40, b"\xff\xfe"])
def test_a_json_file_that_lost_power_left_half_counts_as_not_written(left: bytes, stage: RunDir) -> None:
    stage.write_manifest({"num_rows_in": 3})
    (stage.location / "manifest.json").write(left)
    assert stage.manifest is None
    stage.write_manifest({"num_rows_in": 3})
    assert stage.manifest is not None


def test_a_run_directory_travels_between_processes(stage: RunDir) -> None:
    pickle.loads(pickle.dumps(stage)).write_shard("pairs", 3, pairs_at(3), PAIRS)
    assert stage.shard_numbers("pairs") == {3}


def test_a_digest_depends_on_content_alone() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
    assert digest({"a": 1, "b": 2}) == "3d0089be7edf6746", "kept: manifests of finished runs hold digests"
