"""What the trainers read: rows straight from Parquet, a row group at a time, in a seeded order.

The order is a function of seed, epoch, rows and global batch, so any number of workers sees the same batches. The row
groups are put one behind the other in a seeded order, the rows of each shuffled, and the sequence is cut into lanes:

    lane 0   | row group 7 ............. | row group 2 ......
    lane 1   | ...... | row group 0 ............. | row group 5     every batch takes the next rows of every lane
    lane 2   | row group 3 ....... | row group 6 ............

A worker thus needs the row groups of its own lanes, each for as long as its rows last, and reads each once. With
`in_order` there is one lane, and row groups and rows come as they are stored.
"""

from collections.abc import Sequence
from typing import Any, Literal

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
from torch.utils.data import Dataset

from stic_ray.core.config import RunConfig
from stic_ray.core.randomness import seed_for
from stic_ray.core.training import OptimisationConfig
from stic_ray.method.images import blank_like
from stic_ray.stages.training.index import REFERENCE_LOGPS, RowGroup, Rows, damaged, read_group
from stic_ray.stages.training.rejected_images import ImageMaker

WEIGHT = "weight"
"""Of a row in the mean over its batch: 1, or 0 for one that only fills up an epoch."""
MAX_LANES = 16
"""A batch comes from at most so many row groups: more mix no better and cost memory."""
_DECODER = datasets.Image(mode="RGB")

Example = dict[str, Any]


class ParquetRows(Dataset[Example]):
    """Rows of an epoch by their place in its order, decoded when they are asked for.

    With a `global_batch` the epoch is filled up to whole batches by rows of weight 0, and the others of such a batch
    weigh so much more that the mean over the batch is the mean over its real rows. Without one the rows come as they
    are stored, for evaluation.
    """

    def __init__(
        self,
        groups: Sequence[RowGroup],
        columns: Sequence[str],
        *,
        seed: int = 0,
        global_batch: int | None = None,
        in_order: bool = False,
        image: Literal["own", "blank", "shuffled", "none"] = "own",
        maker: ImageMaker | None = None,
    ) -> None:
        self._groups, self._image, self._maker = groups, image, maker
        self.columns = [name for name in columns if name != "image" or image != "none"]
        self._seed, self._global_batch = seed, global_batch
        self._shuffles = global_batch is not None and not in_order
        self._counts = np.array([len(group.rows) for group in groups], dtype=np.int64)
        self.num_rows = int(self._counts.sum())
        self._num_lanes = num_lanes(global_batch) if global_batch and not in_order else 1
        self._at: dict[int, int] = {}
        """The row group that each lane is in."""
        self._tables: dict[int, pa.Table] = {}
        """The row groups that some lane is in; others are let go."""
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Take the order of another epoch; accelerate calls it at the beginning of each."""
        self._epoch = epoch
        self._order = np.arange(len(self._groups))
        if self._shuffles:
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
        self._at[lane] = group
        for left in self._tables.keys() - self._at.values():
            del self._tables[left]
        if group not in self._tables:
            self._tables[group] = read_group(self._groups[group], self.columns)
        offset = place - int(self._ends[number] - self._counts[group])
        if self._shuffles:
            offset = int(self._shuffled(group)[offset])
        example = self._example(group, offset)
        if self._maker is not None:
            batch = self._global_batch
            step = self._epoch * (len(self) // batch) + index // batch if batch else self._maker.num_steps
            made = self._maker.make(example["image"], example["image_id"], self._epoch, step)
            example["rejected_image"] = made
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

    def _example(self, group: int, offset: int) -> Example:
        row = self._groups[group].rows[offset]
        example = self._tables[group].slice(row, 1).to_pylist()[0]
        if example.setdefault("image") is None:
            return example
        if self._image == "shuffled":
            example["image"] = self._next_image(group, offset)
        for name in ("image", "rejected_image"):
            if name in example:
                example[name] = self._decode(example[name], name, group, row)
        if self._image == "blank":
            example["image"] = blank_like(example["image"])
        return example

    def _decode(self, encoded: dict[str, Any], name: str, group: int, row: int) -> PIL.Image.Image:
        try:
            return _DECODER.decode_example(encoded)
        except Exception as error:  # of whatever type: the stage that wrote the row could decode it
            where = self._groups[group]
            raise damaged(where.uri, f"{name} of row {row} in row group {where.number}: {error}") from error

    def _next_image(self, group: int, offset: int) -> dict[str, Any]:
        """Return the encoded picture of the row behind this one, and of the first row for the last.

        The order of the pool has nothing to do with what is in a picture, so the next one is a stranger's.
        """
        rows = self._groups[group].rows
        if offset + 1 < len(rows):
            return self._tables[group]["image"][rows[offset + 1]].as_py()
        following = self._groups[(group + 1) % len(self._groups)]
        return read_group(following, ["image"])["image"][following.rows[0]].as_py()

    def in_order(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Return values of the rows, given by row group, in the order of this epoch."""
        found = []
        for group in self._order.tolist():
            own = values[group]
            found.append(own[self._shuffled(group)] if self._shuffles else own)
        return np.concatenate(found)

    def sums_of_steps(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Return the sum of the rows' values, given by row group, over each batch of this epoch."""
        filled = np.zeros(len(self), dtype=np.int64)
        filled[: self.num_rows] = self.in_order(values)
        num_batches = len(self) // (self._global_batch or 1)
        return filled.reshape(self._num_lanes, num_batches, -1).sum((0, 2))

    def _shuffled(self, group: int) -> np.ndarray:
        return self._generator(f"rows of row group {group}").permutation(self._counts[group])

    def _generator(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng(seed_for(self._seed, str(self._epoch), purpose))


def read_pairs(config: RunConfig, rows: Rows) -> tuple[ParquetRows, ParquetRows]:
    """Return the pairs that stage `dpo` trains on and those held out, with the pictures that `dpo.*` asks for.

    The former have REFERENCE_LOGPS where all pairs carry those of the model that training begins with; evaluation
    asks the reference itself, as it compares the tokens.
    """
    columns = ["image", "prompt", "chosen", "rejected", "chosen_finish_reason", "rejected_finish_reason"]
    settings = config.dpo
    if settings.objective == "paper":
        columns.append("more_rejected")
    maker = None
    if settings.image_terms:
        kind = settings.rejected_image
        if kind == "pair":
            columns.append("rejected_image")
        else:
            columns.append("image_id")
            num_steps = num_steps_of(settings, rows)
            maker = ImageMaker(kind, settings.rejected_image_strengths, num_steps, config.seed)
    stored = REFERENCE_LOGPS if rows.has_reference_logps else ()
    trained = ParquetRows(
        rows.trained,
        [*columns, *stored],
        seed=config.seed,
        global_batch=settings.global_batch,
        in_order=settings.order == "pool",
        image=settings.image,
        maker=maker,
    )
    return trained, ParquetRows(rows.held_out, columns, image=settings.image, maker=maker)


def num_steps_of(settings: OptimisationConfig, rows: Rows) -> int:
    """Return the optimiser steps of a training on these rows."""
    if rows.plan is not None:
        return rows.plan.num_steps
    return settings.num_steps or -(-rows.num_trained // settings.global_batch) * settings.num_epochs


def num_lanes(global_batch: int) -> int:
    """Return how many lanes the rows of a batch come from: the largest divisor that is not above MAX_LANES."""
    return next(lanes for lanes in range(min(MAX_LANES, global_batch), 0, -1) if global_batch % lanes == 0)
