"""What the trainers read: rows straight from Parquet, a row group at a time, in a seeded order; and the controls.

The order is a function of seed, epoch, rows and global batch, so any number of workers sees the same batches. The row
groups are put one behind the other in a seeded order, the rows of each shuffled, and the sequence is cut into lanes:

    lane 0   | row group 7 ............. | row group 2 ......
    lane 1   | ...... | row group 0 ............. | row group 5     every batch takes the next rows of every lane
    lane 2   | row group 3 ....... | row group 6 ............

A worker thus needs the row groups of its own lanes, each for as long as its rows last, and reads each once.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
from torch.utils.data import Dataset

from stic_ray.core.config import RunConfig
from stic_ray.core.randomness import seed_for
from stic_ray.method.images import decode
from stic_ray.stages.training.batches import REFERENCE_LOGPS, WEIGHT
from stic_ray.stages.training.index import RowGroup, Rows, damaged, read_group

MAX_LANES = 16
"""A batch comes from at most so many row groups: more mix no better and cost memory."""

_GREY = (128, 128, 128)
_DECODER = datasets.Image(mode="RGB")
_SMALL_TALK = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": "Yes."}]
"""Turns of the row with a blank picture; nothing is learned from them."""

Example = dict[str, Any]


class ParquetRows(Dataset[Example]):
    """Rows of an epoch by their place in its order, decoded when they are asked for.

    With a `global_batch` the epoch is filled up to whole batches by rows of weight 0, and the others of such a batch
    weigh so much more that the mean over the batch is the mean over its real rows. Without one the rows come as they
    are stored, for evaluation.
    """

    def __init__(
        self, groups: Sequence[RowGroup], columns: Sequence[str], *, seed: int = 0, global_batch: int | None = None
    ) -> None:
        self.columns = tuple(columns)
        self.num_rows = sum(len(group.rows) for group in groups)
        self._groups = groups
        self._counts = np.array([len(group.rows) for group in groups], dtype=np.int64)
        self._seed = seed
        self._global_batch = global_batch
        self._num_lanes = num_lanes(global_batch) if global_batch else 1
        self._at: dict[int, int] = {}
        """The row group that each lane is in."""
        self._tables: dict[int, pa.Table] = {}
        """The row groups that some lane is in."""
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another epoch; accelerate calls it at the beginning of each."""
        self._epoch = epoch
        self._order = np.arange(len(self._groups))
        if self._global_batch:
            self._order = self._generator("order of row groups").permutation(self._order)
        self._ends = self._counts[self._order].cumsum()

    def __len__(self) -> int:
        batch = self._global_batch or 1
        return -(-self.num_rows // batch) * batch

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        lane, place, weight = self._place(index)
        place = min(place, self.num_rows - 1)  # a row of weight 0 is one that is at hand
        number = int(self._ends.searchsorted(place, side="right"))
        group = int(self._order[number])
        self._move(lane, group)
        offset = place - int(self._ends[number] - self._counts[group])
        if self._global_batch:
            offset = int(self._generator(f"rows of row group {group}").permutation(self._counts[group])[offset])
        example = self._example(group, offset)
        return {**example, WEIGHT: weight}

    def _place(self, index: int) -> tuple[int, int, float]:
        """Return the lane of a row, its place in the sequence of the epoch's rows, and its weight."""
        if not self._global_batch:
            return 0, index, 1.0
        batch, row = divmod(index, self._global_batch)
        run = self._global_batch // self._num_lanes  # rows that a batch takes of each lane
        lane_length = len(self) // self._num_lanes
        begins = np.arange(self._num_lanes) * lane_length + batch * run
        num_real = int((self.num_rows - begins).clip(0, run).sum())
        lane, offset = divmod(row, run)
        place = int(begins[lane]) + offset
        return lane, place, self._global_batch / num_real if place < self.num_rows else 0.0

    def _move(self, lane: int, group: int) -> None:
        """Let a lane enter a row group, and let go of those that no lane is in any more."""
        self._at[lane] = group
        for left in self._tables.keys() - self._at.values():
            del self._tables[left]
        if group not in self._tables:
            self._tables[group] = read_group(self._groups[group], self.columns)

    def _example(self, group: int, offset: int) -> Example:
        row = self._groups[group].rows[offset]
        example = self._tables[group].slice(row, 1).to_pylist()[0]
        picture = self._picture(example["image"], group, offset)
        return {**example, "image": None if picture is None else self._decode(picture, group, row)}

    def _decode(self, picture: dict[str, Any], group: int, row: int) -> PIL.Image.Image:
        try:
            return _DECODER.decode_example(picture)
        except Exception as error:  # of whatever type: the stage that wrote the row could decode it
            where = self._groups[group]
            raise damaged(where.uri, f"the picture of row {row} in row group {where.number}: {error}") from error

    def _picture(self, own: dict[str, Any] | None, group: int, offset: int) -> dict[str, Any] | None:
        """Return the encoded picture of a row; the controls replace it."""
        return own

    def _generator(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng(seed_for(self._seed, str(self._epoch), purpose))


class BlankPictures(ParquetRows):
    """The control with a uniform grey picture of the same size in the place of each."""

    def _picture(self, own: dict[str, Any] | None, group: int, offset: int) -> dict[str, Any] | None:
        assert own is not None, "a pair has a picture"
        return {"bytes": _grey(decode(own["bytes"]).size), "path": None}


class ExchangedPictures(ParquetRows):
    """The control with another pair's picture: that of the next row, and of the first row for the last.

    The order of the pool has nothing to do with what is in a picture, so the next one is a stranger's.
    """

    def _picture(self, own: dict[str, Any] | None, group: int, offset: int) -> dict[str, Any] | None:
        rows = self._groups[group].rows
        if offset + 1 < len(rows):
            return self._tables[group]["image"][rows[offset + 1]].as_py()
        following = self._groups[(group + 1) % len(self._groups)]
        return read_group(following, ["image"])["image"][following.rows[0]].as_py()


class Conversations(Dataset[Example]):
    """The preferred answers of pairs alone, as rows of `image`, `messages` and `cut_off`."""

    def __init__(self, pairs: ParquetRows) -> None:
        self._pairs = pairs
        self.num_rows = pairs.num_rows

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another epoch."""
        self._pairs.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Example:
        pair = self._pairs[index]
        cut_off = pair["chosen_finish_reason"] == "length"
        return {
            "image": pair["image"],
            "messages": pair["prompt"] + pair["chosen"],
            "cut_off": cut_off,
            WEIGHT: pair[WEIGHT],
        }


@dataclass(frozen=True)
class VisionInEveryBatch:
    """A collator that puts a blank picture beside rows which all lack one; it weighs nothing in the loss.

    The vision tower and the projector thus take part in every micro-batch. Otherwise a worker whose rows are all
    text has no gradients for them, or never asks for the weights that ZeRO-3 keeps elsewhere, and the others wait.
    LLaVA does the same (`prepare_inputs_labels_for_multimodal` and the trainer's dummy image of its data collator).
    """

    collate: Callable[[list[Example]], dict[str, Any]]

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Return the batch of `collate`, with one row more where no example has an image."""
        if any(example["image"] is not None for example in examples):
            return self.collate(examples)
        blank = {"image": PIL.Image.new("RGB", (64, 64), _GREY), "messages": _SMALL_TALK, WEIGHT: 0.0}
        return self.collate([*({WEIGHT: 1.0, **example} for example in examples), blank])


def read_pairs(config: RunConfig, rows: Rows) -> tuple[ParquetRows, ParquetRows]:
    """Return the pairs that stage `dpo` trains on and those held out, with the pictures that `dpo.image` asks for.

    The former have REFERENCE_LOGPS where all pairs carry those of the model that training begins with; evaluation
    asks the reference itself, as it compares the tokens.
    """
    columns = ["image", "prompt", "chosen", "rejected", "chosen_finish_reason", "rejected_finish_reason"]
    stored = REFERENCE_LOGPS if rows.has_reference_logps else ()
    kinds: dict[Literal["own", "blank", "shuffled"], type[ParquetRows]] = {
        "own": ParquetRows,
        "blank": BlankPictures,
        "shuffled": ExchangedPictures,
    }
    kind = kinds[config.dpo.image]
    trained = kind(rows.trained, [*columns, *stored], seed=config.seed, global_batch=config.dpo.global_batch)
    return trained, kind(rows.held_out, columns)


def read_conversations(config: RunConfig, rows: Rows) -> tuple[ParquetRows, ParquetRows]:
    """Return the rows that stage `sft` trains on and those held out."""
    columns = ["image", "messages"]
    trained = ParquetRows(rows.trained, columns, seed=config.seed, global_batch=config.sft.global_batch)
    return trained, ParquetRows(rows.held_out, columns)


def num_lanes(global_batch: int) -> int:
    """Return how many lanes the rows of a batch come from: the largest divisor that is not above MAX_LANES."""
    return next(lanes for lanes in range(min(MAX_LANES, global_batch), 0, -1) if global_batch % lanes == 0)


def _grey(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, _GREY).save(buffer, "PNG")
    return buffer.getvalue()
