"""The tables: checked at every write and read, and readable by `datasets` as they are."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from datasets import Image, List, load_dataset
from PIL import Image as Pillow

from stic_ray.core import schemas
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import INFUSED, PAIRS, REJECTED, Reason, check, table_of
from stic_ray.method.preferences import NO_CANDIDATES
from tests.core.builders import infused, pair, png

TABLES = {
    name: getattr(schemas, name)
    for name in (
        "INDEX",
        "REJECTED",
        "CANDIDATES",
        "SCORES",
        "STATEMENTS",
        "DECISIONS",
        "PAIRS",
        "INFUSED",
        "PREDICTIONS",
    )
}


@pytest.mark.parametrize("name", TABLES)
def test_every_column_says_what_it_means(name: str) -> None:
    for column in TABLES[name]:
        assert len(column.metadata[b"meaning"]) > 5, column.name


def test_a_good_row_passes_and_keeps_its_values() -> None:
    assert table_of([pair()], PAIRS).to_pylist() == [pair()]
    assert table_of([], PAIRS).num_rows == 0


OPTIONAL = {"corruption", "pixel_change", "reference_chosen_logp", "reference_rejected_logp", *NO_CANDIDATES}


@pytest.mark.parametrize("column", [name for name in PAIRS.names if name not in OPTIONAL])
def test_a_null_in_a_required_column_is_refused_by_name(column: str) -> None:
    with pytest.raises(ValueError, match=f"'{column}'"):
        table_of([pair(), pair(**{column: None})], PAIRS)


def test_a_missing_column_is_refused_by_name() -> None:
    table = table_of([pair()], PAIRS).drop_columns(["chosen", "seed"])
    with pytest.raises(ValueError, match=r"'chosen', 'seed'"):
        check(table, PAIRS)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("position", pa.array(["0"])),
        ("image", pa.array([png()])),
        ("prompt", pa.array(["Describe this picture."])),
        ("pixel_change", pa.array([1], pa.int64())),
    ],
)
def test_a_column_of_another_type_is_refused_with_both_types(column: str, values: pa.Array) -> None:
    table = table_of([pair()], PAIRS)
    spoiled = table.set_column(table.schema.get_field_index(column), column, values)
    with pytest.raises(ValueError, match=column) as caught:
        check(spoiled, PAIRS)
    assert str(values.type) in str(caught.value)
    assert str(PAIRS.field(column).type) in str(caught.value)


def test_columns_come_in_the_order_of_the_schema_and_no_others() -> None:
    table = table_of([pair()], PAIRS).select(PAIRS.names[::-1]).append_column("extra", pa.array([1]))
    assert check(table, PAIRS).schema.equals(PAIRS, check_metadata=True)


def test_reasons_are_a_closed_list_of_plain_words() -> None:
    assert all(reason.value.isidentifier() and reason.value.islower() for reason in Reason)
    row = {"image_id": "a", "path": "/a", "reason": Reason.DUPLICATE, "message": "as b"}
    assert table_of([row], REJECTED)["reason"].to_pylist() == ["duplicate"]


@pytest.mark.parametrize(
    ("schema", "row", "conversations"),
    [(PAIRS, pair(), ("prompt", "chosen", "rejected")), (INFUSED, infused(), ("messages",))],
    ids=["pairs", "infused"],
)
def test_datasets_sees_images_and_conversations(
    schema: pa.Schema, row: dict[str, Any], conversations: tuple[str, ...], tmp_path: Path
) -> None:
    run = RunDir.of(str(tmp_path / "stage"))
    for number in range(2):
        run.write_shard("rows", number, table_of([row] * 3, schema), schema)
    files = str(tmp_path / "stage" / "rows-*.parquet")
    dataset = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset.num_rows == 6
    assert isinstance(dataset.features["image"], Image)
    picture = dataset[4]["image"]
    assert isinstance(picture, Pillow.Image)
    assert picture.size == (12, 10)
    for name in conversations:
        assert isinstance(dataset.features[name], List)
        assert dataset[0][name] == row[name]


def test_datasets_takes_rows_without_an_image(tmp_path: Path) -> None:
    run = RunDir.of(str(tmp_path / "stage"))
    row = infused(image=None, description=None, description_prompt=None, finish_reason=None)
    run.write_shard("text", 0, table_of([row], INFUSED), INFUSED)
    file = str(tmp_path / "stage" / "text-000000.parquet")
    dataset = load_dataset("parquet", data_files=file, split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset[0]["image"] is None
    assert dataset[0]["messages"] == row["messages"]


@pytest.mark.parametrize("name", TABLES)
def test_the_feature_description_names_every_column_once(name: str) -> None:
    described = json.loads(TABLES[name].metadata[b"huggingface"])["info"]["features"]
    assert list(described) == TABLES[name].names
