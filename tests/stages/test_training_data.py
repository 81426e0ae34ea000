"""What training reads: order, epochs, workers, held-out rows, prefixes and the controls; no Ray, no model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import SourceError
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import PAIRS, table_of
from stic_ray.engines.loading import load_processor
from stic_ray.stages.training.collators import AnswersOnlyCollator
from stic_ray.stages.training.data import WEIGHT, Example, ParquetRows, num_lanes, read_pairs
from stic_ray.stages.training.index import ONE_IN, Rows, is_held_out
from tests.stages.builders import pairs_in
from tests.stages.test_training_batches import config_for, encoded, picture


def write_positions(folder: Path | str, *shards: Iterable[int]) -> RunDir:
    """Write pairs at these positions, in shards of any size; each says its position in its answers."""
    run = RunDir.of(str(folder))
    pictures = [encoded(number) for number in range(9)]
    for number, positions in enumerate(shards):
        rows: list[dict[str, Any]] = [
            {
                **{name: 0 for name in PAIRS.names if PAIRS.field(name).type == "int64"},
                **{name: "x" for name in PAIRS.names if PAIRS.field(name).type == "string"},
                "image_id": f"image {position}",
                "position": position,
                "image": {"bytes": pictures[position % 9], "path": None},
                "prompt": [{"role": "user", "content": "Describe."}],
                "chosen": [{"role": "assistant", "content": f"good {position}"}],
                "rejected": [{"role": "assistant", "content": f"bad {position}"}],
            }
            for position in positions
        ]
        run.write_shard("pairs", number, table_of(rows, PAIRS), PAIRS)
    return run


def index(run: RunDir, **settings: Any) -> Rows:
    config = config_for(Path(run.uri), dpo={"num_held_out": 0, **settings})
    return pairs_in(config, *(Path(shard.path) for shard in run.shards("pairs")))


def read(folder: Path, **settings: Any) -> ParquetRows:
    """Return six pairs in the order in which they are stored."""
    run = write_positions(folder / "pairs", [0, 2, 3, 7], [8, 5])
    config = config_for(folder, dpo=settings)
    rows = index(run, **settings)
    return read_pairs(config, Rows(trained=rows.trained, held_out=rows.trained))[1]


def said(pairs: Iterable[Example]) -> list[str]:
    return [row["chosen"][0]["content"] for row in pairs]


def places(batch: list[Example]) -> list[int]:
    """Positions of the pairs that a batch trains on."""
    return [int(row["chosen"][0]["content"].split()[1]) for row in batch if row[WEIGHT]]


def loader(rows: ParquetRows, num_workers: int, rank: int, micro_batch: int) -> Any:
    """The loader of one of the workers, as accelerate prepares it for transformers' Trainer."""
    plain = DataLoader(rows, batch_size=micro_batch, collate_fn=list)
    return prepare_data_loader(plain, num_processes=num_workers, process_index=rank, put_on_device=False)


def global_batches(
    groups: Rows, num_workers: int, micro_batch: int, *, epoch: int = 0, skip: int = 0
) -> tuple[list[list[Example]], list[ParquetRows]]:
    """What all workers together see in each optimiser step of 12 rows, and their datasets afterwards."""
    datasets, steps = [], []
    at_once = 12 // num_workers // micro_batch
    for rank in range(num_workers):
        rows = ParquetRows(groups.trained, ["chosen", "image"], seed=3, global_batch=12)
        own = loader(rows, num_workers, rank, micro_batch)
        own = skip_first_batches(own, skip * at_once) if skip else own
        own.set_epoch(epoch)
        batches = list(own)
        assert {len(batch) for batch in batches} == {micro_batch}
        steps.append([sum(batches[start : start + at_once], []) for start in range(0, len(batches), at_once)])
        datasets.append(rows)
    return [sum(parts, []) for parts in zip(*steps, strict=True)], datasets


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """100 pairs in 14 shards of different sizes."""
    bounds = [0, 1, 12, 19, 20, 31, 40, 48, 50, 61, 66, 77, 85, 99, 100]
    shards = [range(first, last) for first, last in zip(bounds, bounds[1:], strict=False)]
    return index(write_positions(tmp_path_factory.mktemp("many"), *shards))


@pytest.mark.parametrize(("num_workers", "micro_batch"), [(1, 12), (1, 3), (2, 2), (3, 4), (4, 1)])
def test_every_number_of_workers_sees_each_pair_once_in_the_same_batches(
    num_workers: int, micro_batch: int, many: Rows
) -> None:
    epochs = []
    for epoch in (0, 1):
        expected = [places(batch) for batch in global_batches(many, 1, 12, epoch=epoch)[0]]
        batches, datasets = global_batches(many, num_workers, micro_batch, epoch=epoch)
        assert [sorted(places(batch)) for batch in batches] == [sorted(batch) for batch in expected]
        seen = [place for batch in batches for place in places(batch)]
        assert sorted(seen) == list(range(100)) and seen != list(range(100))
        for batch in batches:
            assert sum(row[WEIGHT] for row in batch) == pytest.approx(12), "a mean over its real rows"
        lanes = {lane for rows in datasets for lane in rows._at}
        assert sum(len(rows._at) for rows in datasets) == len(lanes) == num_lanes(12), "each lane is one worker's"
        assert all(len(rows._tables) <= len(rows._at) for rows in datasets)
        epochs.append(seen)
    assert epochs[0] != epochs[1]


def test_a_resumed_epoch_has_the_same_batches_and_reads_nothing_of_those_before(many: Rows) -> None:
    """Also with another number of workers than before."""
    whole, _ = global_batches(many, 1, 12, epoch=1)
    for num_workers in (1, 2):
        rest, datasets = global_batches(many, num_workers, 3, epoch=1, skip=7)
        assert [sorted(places(batch)) for batch in rest] == [sorted(places(batch)) for batch in whole[7:]]
        assert len(rest) == 2
    rows = ParquetRows(many.trained, ["chosen", "image"], seed=3, global_batch=12)
    batches = iter(skip_first_batches(loader(rows, 2, 0, 3), 16))
    next(batches)
    assert len(rows._tables) <= 6, "three rows of this batch, and of the next, which accelerate fetches ahead"


def test_the_pools_order_is_kept_where_it_is_asked_for(many: Rows, tmp_path: Path) -> None:
    config = config_for(tmp_path, dpo={"order": "pool", "global_batch": 12})
    trained = read_pairs(config, many)[0]
    for epoch in (0, 1):
        trained.set_epoch(epoch)
        assert [place for row in trained for place in places([row])] == list(range(100))
    assert len(trained._tables) == 1 and len(trained) == 108
    shuffled = read_pairs(config_for(tmp_path, dpo={"global_batch": 12}), many)[0]
    assert [place for row in shuffled for place in places([row])] != list(range(100))


@pytest.mark.parametrize(("global_batch", "lanes"), [(1, 1), (8, 8), (12, 12), (32, 16), (34, 2), (100, 10), (37, 1)])
def test_a_batch_comes_from_a_bounded_number_of_row_groups(global_batch: int, lanes: int) -> None:
    assert num_lanes(global_batch) == lanes


@pytest.mark.parametrize("num_pairs", [1, 2, 7, 8, 9, 15, 17])
def test_no_pair_is_lost_in_batches_that_do_not_fit(num_pairs: int, tmp_path: Path) -> None:
    groups = index(write_positions(tmp_path, range(num_pairs))).trained
    rows = ParquetRows(groups, ["chosen", "image"], global_batch=8)
    batches = [[rows[start + i] for i in range(8)] for start in range(0, len(rows), 8)]
    assert sorted(place for batch in batches for place in places(batch)) == list(range(num_pairs))
    assert all(sum(row[WEIGHT] for row in batch) == pytest.approx(8) for batch in batches)
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_a_file_with_several_row_groups_is_read_one_at_a_time(tmp_path: Path) -> None:
    run = write_positions(tmp_path, range(10))
    file = Path(run.shards("pairs")[0].path)
    pq.write_table(pq.read_table(file), file, row_group_size=4)
    groups = index(run).trained
    assert [len(group.rows) for group in groups] == [4, 4, 2]
    rows = ParquetRows(groups, ["chosen", "image"])
    assert said(rows) == [f"good {position}" for position in range(10)] and len(rows._tables) == 1


def test_rows_are_held_out_by_their_id_and_stay_so_when_the_pool_grows(tmp_path: Path) -> None:
    chosen = [position for position in range(200) if is_held_out(f"image {position}")]
    assert 200 / ONE_IN / 3 < len(chosen) < 200 / ONE_IN * 3

    def held_out(rows: Rows) -> list[int]:
        kept = places(list(ParquetRows(rows.held_out, ["chosen", "image"])))
        trained = places(list(ParquetRows(rows.trained, ["chosen", "image"])))
        assert sorted(kept + trained) == list(range(rows.num_trained + rows.num_held_out))
        return kept

    run = write_positions(tmp_path, range(60), range(60, 120))
    first = held_out(index(run, num_held_out=5))
    assert first == chosen[:5]
    few = held_out(index(run, num_held_out=100))
    assert few == [position for position in chosen if position < 120]
    write_positions(tmp_path, range(60), range(60, 120), range(120, 200))
    assert held_out(index(run, num_held_out=5)) == first, "nothing that was trained on is held out later"
    assert held_out(index(run, num_held_out=100)) == chosen
    assert held_out(index(run, num_held_out=0)) == []


def test_a_shard_that_is_damaged_or_gone_is_told_in_words(tmp_path: Path) -> None:
    run = write_positions(tmp_path, range(4), range(4, 8))
    rows = ParquetRows(index(run).trained, ["chosen", "image"])
    file = Path(run.shards("pairs")[1].path)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(SourceError, match=r"pairs-000001.parquet' is damaged .* Delete it, delete the manifest"):
        index(run)
    file.unlink()
    assert said([rows[0]]) == ["good 0"]
    with pytest.raises(SourceError, match=r"pairs-000001.parquet' is gone. .* delete the manifest"):
        rows[4]


def test_a_prefix_is_by_position_not_by_row(tmp_path: Path) -> None:
    assert said(read(tmp_path / "a", num_images=6)) == ["good 0", "good 2", "good 3", "good 5"]
    assert said(read(tmp_path / "b")) == [f"good {position}" for position in (0, 2, 3, 7, 8, 5)]


def test_so_many_pairs_are_the_first(tmp_path: Path) -> None:
    assert said(read(tmp_path, num_pairs=4)) == [f"good {position}" for position in (0, 2, 3, 7)]


def test_blank_pictures_are_grey_and_of_the_same_size(tmp_path: Path) -> None:
    pairs = read(tmp_path, image="blank", num_images=6)
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


def test_conversations_are_the_prompts_with_the_preferred_answers(tmp_path: Path, tiny_llava: Path) -> None:
    rows = read(tmp_path, image="shuffled", num_images=1000)
    assert rows[1]["image"].size == picture(3).size and len(rows) == rows.num_rows == 6
    talk = [{"role": "user", "content": "Describe."}, {"role": "assistant", "content": "good 2"}]
    collate = AnswersOnlyCollator(load_processor(ModelConfig(path=str(tiny_llava))))
    batches = collate([rows[1]]), collate([{"image": rows[1]["image"], "messages": talk}])
    for name in ("input_ids", "labels", "pixel_values"):
        assert torch.equal(batches[0][name], batches[1][name])
