"""The tidy table says what the runs left behind, and has a row for those that left nothing."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stic_ray.core.rundir import RunDir
from stic_ray.study.plan import read_record
from stic_ray.study.results import STUDY, read_results, study_table, write_table
from tests.study.made import made_study

VARIANTS = {"stic": {}, "sft_only": {"sft.start": "base", "infusion.describe": False, "evaluation.models": ["sft"]}}


def table_of_study(home: RunDir) -> pa.Table:
    record = read_record(home)
    assert record is not None
    return study_table(read_results(record, home), record.base.evaluation)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    home = made_study(
        tmp_path_factory.mktemp("table"),
        sizes=(500, 1000),
        seeds=(0, 7),
        variants=VARIANTS,
        outcomes={"stic-n1000-seed7": ("out_of_memory", "CUDA out of memory")},
    )
    return table_of_study(home).to_pandas()


def test_every_result_is_one_row(table: pd.DataFrame) -> None:
    key = ["variant", "size", "seed", "source", "model", "mode", "benchmark", "metric"]
    assert not table.duplicated(key).any()
    base = table[table["variant"] == "base"]
    assert len(base) == 2 * 2 * 2 and (base["size"] == 0).all() and set(base["model"]) == {"base"}
    assert len(table) == len(base) + 3 * 8 + 1 + 4 * 4


def test_a_cell_without_scores_is_one_row_with_its_error(table: pd.DataFrame) -> None:
    (row,) = table[table["status"] != "done"].to_dict("records")
    assert (row["variant"], row["size"], row["seed"]) == ("stic", 1000, 7)
    assert (row["status"], row["error"]) == ("out_of_memory", "CUDA out of memory")
    assert all(pd.isna(row[name]) for name in ("model", "benchmark", "score", "difference", "core_hours"))


def test_differences_are_paired_with_the_base_model_answering_directly(table: pd.DataFrame) -> None:
    done = table[table["status"] == "done"]
    direct = done[(done["variant"] == "base") & (done["mode"] == "direct")]
    assert direct["difference"].isna().all()
    base = direct.set_index(["seed", "benchmark"])["score"]
    for row in done.drop(direct.index).to_dict("records"):
        assert row["difference"] == pytest.approx(row["score"] - base[row["seed"], row["benchmark"]])
        assert row["difference_low"] <= row["difference"] <= row["difference_high"]
        assert row["difference_high"] - row["difference_low"] < (row["high"] - row["low"]) / 2, "pairing tightens"
    assert set(done[done["benchmark"] == "described"]["higher_is_better"]) == {False}


def test_costs_are_what_the_stages_behind_a_model_reserved(table: pd.DataFrame) -> None:
    def cost(variant: str, model: str, size: int) -> tuple[float, float, float]:
        rows = table[(table["variant"] == variant) & (table["model"] == model) & (table["size"] == size)]
        (found,) = set(rows[["num_pairs", "core_hours", "gpu_hours"]].itertuples(index=False, name=None))
        return found

    # 2 actors of 1 CPU, 2 workers of 1 CPU and 1 GPU; preferences took an hour for 1000 images.
    assert cost("stic", "dpo", 500) == pytest.approx((499, 2 * 0.5 + 2 * 0.1, 0.2))
    assert cost("stic", "sft", 500) == pytest.approx((499, 2 * 0.5 + 2 * 0.1 + 2 * 0.01 + 2 * 0.2, 0.6))
    assert cost("stic", "dpo", 1000) == pytest.approx((999, 2 * 1.0 + 2 * 0.1, 0.2))
    rows = table[(table["variant"] == "sft_only") & (table["size"] == 1000)]
    assert rows["num_pairs"].isna().all()
    assert rows["core_hours"].tolist() == pytest.approx([2 * 0.01 + 2 * 0.2] * len(rows))


def test_the_files_hold_the_same(tmp_path: Path) -> None:
    home = made_study(tmp_path, sizes=(5,), seeds=(0,), num_questions=1)
    table = table_of_study(home)
    write_table(home, table)
    stored = pq.read_table(f"{home.uri}/cells.parquet")
    assert stored.schema.equals(STUDY) and stored.equals(table)
    assert pd.read_csv(f"{home.uri}/cells.csv").shape == (table.num_rows, table.num_columns)
    assert table["low"].null_count == table.num_rows, "one question has no interval"


def test_a_study_before_its_first_run_is_not_run(tmp_path: Path) -> None:
    home = made_study(tmp_path, sizes=(5,), seeds=(0,), outcomes={"default-n5-seed0": ("done", None)})
    rows = [row for row in table_of_study(home).to_pylist() if row["variant"] == "default"]
    assert [row["status"] for row in rows] == ["not_run"]
