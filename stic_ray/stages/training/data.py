"""What the trainers read: rows straight from Parquet, a row group at a time, in a seeded order, and batches of them.

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
import torch
from torch.utils.data import Dataset

from stic_ray.core.config import RunConfig
from stic_ray.core.randomness import seed_for
from stic_ray.engines.sequences import SequenceBuilder, TokenSequence, labels_of
from stic_ray.engines.shared_prefix import make_batch
from stic_ray.stages.training.index import REFERENCE_LOGPS, RowGroup, Rows, damaged, read_group

IGNORED = -100
"""Label of a position that the loss leaves out."""
WEIGHT = "weight"
"""Of a row in the mean over its batch: 1, or 0 for one that only fills up an epoch."""
_GREY = (128, 128, 128)
_SMALL_TALK = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": "Yes."}]
_BLANK = {"image": PIL.Image.new("RGB", (64, 64), _GREY), "messages": _SMALL_TALK, WEIGHT: 0.0}
"""A row of which nothing is learned."""
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
        image: Literal["own", "blank", "shuffled"] = "own",
    ) -> None:
        self._groups, self.columns, self._image = groups, [*columns], image
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
            offset = int(self._generator(f"rows of row group {group}").permutation(self._counts[group])[offset])
        return {**self._example(group, offset), WEIGHT: weight}

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
        if example["image"] is None:
            return example
        if self._image == "shuffled":
            example["image"] = self._next_image(group, offset)
        try:
            picture = _DECODER.decode_example(example["image"])
        except Exception as error:  # of whatever type: the stage that wrote the row could decode it
            where = self._groups[group]
            raise damaged(where.uri, f"the picture of row {row} in row group {where.number}: {error}") from error
        return {**example, "image": PIL.Image.new("RGB", picture.size, _GREY) if self._image == "blank" else picture}

    def _next_image(self, group: int, offset: int) -> dict[str, Any]:
        """Return the encoded picture of the row behind this one, and of the first row for the last.

        The order of the pool has nothing to do with what is in a picture, so the next one is a stranger's.
        """
        rows = self._groups[group].rows
        if offset + 1 < len(rows):
            return self._tables[group]["image"][rows[offset + 1]].as_py()
        following = self._groups[(group + 1) % len(self._groups)]
        return read_group(following, ["image"])["image"][following.rows[0]].as_py()

    def _generator(self, purpose: str) -> np.random.Generator:
        return np.random.default_rng(seed_for(self._seed, str(self._epoch), purpose))


def read_pairs(config: RunConfig, rows: Rows) -> tuple[ParquetRows, ParquetRows]:
    """Return the pairs that stage `dpo` trains on and those held out, with the pictures that `dpo.image` asks for.

    The former have REFERENCE_LOGPS where all pairs carry those of the model that training begins with; evaluation
    asks the reference itself, as it compares the tokens.
    """
    columns = ["image", "prompt", "chosen", "rejected", "chosen_finish_reason", "rejected_finish_reason"]
    stored = REFERENCE_LOGPS if rows.has_reference_logps else ()
    settings, image = config.dpo, config.dpo.image
    trained = ParquetRows(
        rows.trained,
        [*columns, *stored],
        seed=config.seed,
        global_batch=settings.global_batch,
        in_order=settings.order == "pool",
        image=image,
    )
    return trained, ParquetRows(rows.held_out, columns, image=image)


def num_lanes(global_batch: int) -> int:
    """Return how many lanes the rows of a batch come from: the largest divisor that is not above MAX_LANES."""
    return next(lanes for lanes in range(min(MAX_LANES, global_batch), 0, -1) if global_batch % lanes == 0)


def check_image_tokens(input_ids: torch.Tensor, token_id: int, has_image: list[bool]) -> None:
    """Raise AssertionError unless exactly the rows with an image hold image tokens.

    A row that lost them would train the language model alone and nothing else would show it (STIC's released
    code trains so: docs/method.md).
    """
    found = (input_ids == token_id).any(dim=1).tolist()
    assert found == has_image, f"rows with an image {has_image}, rows with image tokens {found}"


class Collator:
    """What makes a batch of rows."""

    def __init__(self, processor: Any) -> None:
        self.builder = SequenceBuilder(processor)

    def sequence(self, example: Example, side: str = "chosen") -> TokenSequence:
        """Return the sequence of a conversation, or of a pair's answer, which has no end where it was cut off."""
        messages = example["messages"] if "messages" in example else [*example["prompt"], *example[side]]
        cut_off = example.get(f"{side}_finish_reason") == "length"
        return self.builder.build(messages, with_image=example["image"] is not None, cut_off=cut_off)


class PreferenceCollator(Collator):
    """Preference pairs as sequences of their own: the B chosen ones first and the B rejected ones behind them."""

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Return input_ids, masks (`completion_mask`: the answers) and image inputs of 2B sequences, and B weights."""
        sequences = [self.sequence(example, side) for side in ("chosen", "rejected") for example in examples]
        batch = self.builder.batch(sequences, [example["image"] for example in examples] * 2)
        batch["completion_mask"] = batch.pop("is_answer").long()
        check_image_tokens(batch["input_ids"], self.builder.image_token_id, [True] * 2 * len(examples))
        return batch | _columns(examples, WEIGHT)


class SharedPrefixCollator(Collator):
    """Preference pairs with image and prompt there once; rows may carry the reference's log-probabilities."""

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Return what `shared_prefix.make_batch` does; WEIGHT and REFERENCE_LOGPS, each (B,), where rows have them."""
        pairs = [(self.sequence(example), self.sequence(example, "rejected")) for example in examples]
        batch = make_batch(self.builder, [example["image"] for example in examples], pairs)
        check_image_tokens(batch["input_ids"], self.builder.image_token_id, [True] * len(examples))
        return batch | _columns(examples, WEIGHT, *REFERENCE_LOGPS)


class AnswersOnlyCollator(Collator):
    """Conversations with the loss on what the assistant says, its end-of-turn token included, and nowhere else.

    Of a pair, that is the preferred answer. TRL's own mask needs generation markers in the chat template, which many
    checkpoints lack.
    """

    needs_image = False
    """Whether a blank picture is put beside rows which all lack one; it weighs nothing in the loss.

    The vision tower and the projector thus take part in every micro-batch. Otherwise a worker whose rows are all
    text has no gradients for them, or never asks for the weights that ZeRO-3 keeps elsewhere, and the others wait.
    LLaVA does the same (`prepare_inputs_labels_for_multimodal` and the trainer's dummy image of its data collator).
    """

    def __call__(self, examples: list[Example]) -> dict[str, Any]:
        """Return input_ids, attention_mask, labels and, where a row has an image, pixel values.

        A row of weight 0 has no label: the loss is a mean over labels.
        """
        if self.needs_image and all(example["image"] is None for example in examples):
            examples = [*examples, _BLANK]
        images = [example["image"] for example in examples]
        batch = self.builder.batch([self.sequence(example) for example in examples], images)
        batch["labels"] = labels_of(batch, IGNORED)
        del batch["is_answer"]
        batch["labels"][torch.tensor([example.get(WEIGHT) == 0 for example in examples])] = IGNORED
        check_image_tokens(batch["input_ids"], self.builder.image_token_id, [image is not None for image in images])
        return batch


def _columns(examples: list[Example], *names: str) -> dict[str, torch.Tensor]:
    """Return the columns that all rows have."""
    known = [name for name in names if all(example.get(name) is not None for example in examples)]
    return {name: torch.tensor([example[name] for example in examples]) for name in known}
