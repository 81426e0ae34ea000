"""The controls on the pairs as datasets: prefixes, blank and exchanged pictures; no Ray, no model."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Image

from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import PAIRS, table_of
from stic_ray.stages.training.data import as_conversations, derangement, read_pairs
from tests.stages.test_training_batches import config_for, encoded, picture


def write_positions(folder: Path, *shards: list[int]) -> RunDir:
    """Write pairs at these positions, in shards of any size; each says its position in its answers."""
    run = RunDir.of(str(folder))
    for number, positions in enumerate(shards):
        rows: list[dict[str, Any]] = [
            {
                **{name: 0 for name in PAIRS.names if PAIRS.field(name).type == "int64"},
                **{name: "x" for name in PAIRS.names if PAIRS.field(name).type == "string"},
                "position": position,
                "image": {"bytes": encoded(position), "path": None},
                "prompt": [{"role": "user", "content": "Describe."}],
                "chosen": [{"role": "assistant", "content": f"good {position}"}],
                "rejected": [{"role": "assistant", "content": f"bad {position}"}],
            }
            for position in positions
        ]
        run.write_shard("pairs", number, table_of(rows, PAIRS), PAIRS)
    return run


def read(folder: Path, **settings: Any) -> Dataset:
    run = write_positions(folder / "pairs", [0, 2, 3, 7], [8, 5])
    config = config_for(folder, dpo=settings)
    return read_pairs(config, [Path(shard.path) for shard in run.shards("pairs")], folder)


def said(pairs: Dataset) -> list[str]:
    return [row[0]["content"] for row in pairs["chosen"]]


def test_a_prefix_is_by_position_not_by_row(tmp_path: Path) -> None:
    assert said(read(tmp_path / "a", num_images=6)) == ["good 0", "good 2", "good 3", "good 5"]
    assert said(read(tmp_path / "b")) == [f"good {position}" for position in (0, 2, 3, 7, 8, 5)]


def test_blank_pictures_are_grey_and_of_the_same_size(tmp_path: Path) -> None:
    pairs = read(tmp_path, image="blank", num_images=6)
    assert isinstance(pairs.features["image"], Image)
    for row, position in zip(pairs, (0, 2, 3, 5), strict=True):
        assert row["chosen"][0]["content"] == f"good {position}" and row["rejected"][0]["content"] == f"bad {position}"
        assert row["image"].size == picture(position).size
        assert row["image"].getextrema() == ((128, 128),) * 3


def test_shuffled_pictures_are_all_there_and_none_is_at_home(tmp_path: Path) -> None:
    pairs = read(tmp_path, image="shuffled", num_images=6)
    own = {position: picture(position).tobytes() for position in (0, 2, 3, 5)}
    found = [row["image"].convert("RGB").tobytes() for row in pairs]
    assert said(pairs) == [f"good {position}" for position in own]
    assert sorted(found) == sorted(own.values())
    assert all(mine != theirs for mine, theirs in zip(own.values(), found, strict=True))


@pytest.mark.parametrize("number", [2, 3, 50])
def test_a_derangement_is_seeded_and_moves_everything(number: int) -> None:
    order = derangement(number, seed=1)
    assert sorted(order) == list(range(number)) and all(place != index for place, index in enumerate(order))
    assert order == derangement(number, seed=1)
    assert number < 50 or order != derangement(number, seed=2)


def test_conversations_are_the_prompts_with_the_preferred_answers(tmp_path: Path) -> None:
    rows = as_conversations(read(tmp_path, image="shuffled", num_images=1000))
    assert set(rows.column_names) == {"image", "messages"} and isinstance(rows.features["image"], Image)
    assert rows[1]["messages"] == [
        {"role": "user", "content": "Describe."},
        {"role": "assistant", "content": "good 2"},
    ]
