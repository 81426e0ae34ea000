"""On the driver: which rows of the shards are trained on and which are held out, from footers and a few columns."""

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import Failed, SourceError, one_line, type_and_message
from stic_ray.core.randomness import seed_for
from stic_ray.core.storage import Location
from stic_ray.engines.adapters import model_at
from stic_ray.engines.fingerprints import fingerprint

ONE_IN = 16
"""At most about one row in so many is held out."""

REFERENCE_LOGPS = ("reference_chosen_logp", "reference_rejected_logp")
"""Columns of pairs, and tensors of a batch, with the reference model's log-probabilities of both answers."""
LENGTH = "num_sequence_tokens"
"""Column of conversations with the tokens of image and text, as the model reads them."""
TEXT_LOGPS = "text_logps"
"""Column of conversations with log p of each token of the answers under a model that sees no image."""
_NUM_READERS = 16
"""Threads that read footers, which is mostly waiting for the storage."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group of a Parquet file, and those of its rows that are used, rising."""

    uri: str
    number: int
    rows: Sequence[int]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a footer says of all rows of a row group."""

    revision: str | None
    """The model whose REFERENCE_LOGPS they have, of all their answers; None without."""
    has_rejected_images: bool


@dataclass(frozen=True)
class Plan:
    """What a training reads until it ends (mixing.py)."""

    num_steps: int
    """Optimiser steps."""
    sources: np.ndarray | None
    """The source of each row, by its number, int16 of shape (num_steps * global_batch,); None without a mix."""
    facts: Mapping[str, Any]
    """What it comes to, for result.json."""


@dataclass(frozen=True)
class Rows:
    """What a stage reads: about 200 bytes for each row group, nothing for a row."""

    trained: list[RowGroup]
    held_out: list[RowGroup]
    has_reference_logps: bool = False
    """Whether all pairs carry REFERENCE_LOGPS of the model, and the pictures, that training begins with."""
    num_groups: Mapping[str, int] = field(default_factory=dict)
    """How many of the row groups in `trained` are of each source, in their order; empty for pairs."""
    plan: "Plan | None" = None
    """Which row comes when, where that takes more than passes over all of them."""

    @property
    def num_trained(self) -> int:
        """Number of rows that are trained on."""
        return sum(len(group.rows) for group in self.trained)

    @property
    def num_held_out(self) -> int:
        """Number of rows that are kept for evaluation."""
        return sum(len(group.rows) for group in self.held_out)


def index_pairs(config: RunConfig, shards: Iterable[Location], start: Location | None = None) -> Rows:
    """Find the pairs of the first `dpo.num_images` images, and hold some of them out.

    `start` is the checkpoint that training starts from, None for the model of the run: stored log-probabilities count
    only where they are of that very model.
    Raises SourceError for a shard that is no whole Parquet file, and where no pair is left, or too few to exchange
    their pictures.
    """
    settings = config.dpo
    found = _read_footers(shards, settings.num_images)
    if not found:
        raise SourceError("Stage preferences left no pairs to train on; see its rejected-*.parquet.")
    found = [(group, facts) for group, facts in found if group.rows]
    groups = [group for group, _ in found]
    revisions = {facts.revision for _, facts in found}
    num_pairs = sum(len(group.rows) for group in groups)
    if not num_pairs:
        raise SourceError(f"dpo.num_images={settings.num_images} leaves none of the pairs; use more images.")
    if settings.num_pairs is not None:
        if num_pairs < settings.num_pairs:
            raise SourceError(f"dpo.num_pairs={settings.num_pairs} are more than the {num_pairs} pairs that there are.")
        groups = _first(groups, settings.num_pairs)
    if num_pairs == 1 and settings.image == "shuffled":
        raise SourceError("dpo.image=shuffled needs at least 2 pairs to exchange their pictures, there is 1.")
    terms = [*settings.image_terms] if settings.rejected_image == "pair" else []
    if terms and not all(facts.has_rejected_images for _, facts in found):
        raise SourceError(
            f"dpo.{terms[0]}_weight needs a rejected image with every pair, and pairs are here without one; with "
            "dpo.rejected_image=crop, or another kind, training makes them from the pairs' own images."
        )
    has_stored = settings.image == "own" and settings.objective != "sft" and None not in revisions
    if has_stored:
        has_stored = revisions == {fingerprint(model_at(config.model, start.local_copy() if start else None))}
    return Rows(*_hold_out(groups, "image_id", settings.num_held_out), has_reference_logps=has_stored)


def index_conversations(config: RunConfig, sources: Mapping[str, Iterable[Location]]) -> Rows:
    """Find the rows of stage `sft` in the shards of each source, and hold some of them out, as many of each source.

    Raises SourceError as `index_pairs`.
    """
    trained: list[RowGroup] = []
    held_out: list[RowGroup] = []
    num_groups = {}
    for number, (name, shards) in enumerate(sources.items()):
        groups = [group for group, _ in _read_footers(shards)]
        if not groups:
            what = "Stage infusion" if len(sources) == 1 else f"Source '{name}'"
            raise SourceError(f"{what} left no rows to train on; see its rejected-*.parquet.")
        if config.sft.prior_alpha:
            _check_text_logps(name, groups)
        share = (config.sft.num_held_out + number) // len(sources)  # over all of them, the whole number
        own, out = _hold_out(groups, "id", share)
        trained, held_out, num_groups[name] = [*trained, *own], [*held_out, *out], len(own)
    return Rows(trained, held_out, num_groups=num_groups)


def without_text_logps(reason: str) -> str:
    """Return the message for rows that do not say what a model guesses without their images."""
    return (
        f"sft.prior_alpha needs log p of each token without the image, and {reason}: have stage text_logps write the "
        "rows with the run's model (docs/training.md)."
    )


def _check_text_logps(name: str, groups: Sequence[RowGroup]) -> None:
    """Look at the first row group of a source that has an image. Raises SourceError where it has no TEXT_LOGPS."""
    first = next((group for group in groups if Location.of(group.uri).name.startswith("rows-")), None)
    if first is not None:
        table = read_group(first, [TEXT_LOGPS])
        if TEXT_LOGPS not in table.column_names or table[TEXT_LOGPS].null_count:
            raise SourceError(without_text_logps(f"source '{name}' is without"))


def read_lengths(groups: Iterable[RowGroup]) -> list[np.ndarray] | None:
    """Return how many tokens the model reads of each used row, by row group; None where a file does not say."""

    def read(group: RowGroup) -> np.ndarray | None:
        table = read_group(group, [LENGTH])
        if LENGTH not in table.column_names or table[LENGTH].null_count:
            return None
        lengths = table[LENGTH].to_numpy()[np.asarray(group.rows)]
        return lengths if lengths.min() > 0 else None

    with ThreadPoolExecutor(_NUM_READERS) as readers:
        found = [*readers.map(read, groups)]
    known = [lengths for lengths in found if lengths is not None]
    return known if len(known) == len(found) else None


def read_group(group: RowGroup, columns: Sequence[str]) -> pa.Table:
    """Read columns of a row group, rows that are not used included.

    Raises SourceError for a file that is damaged or gone, and Failed where the storage is away.
    """
    try:
        with Location.of(group.uri).open() as stream:
            return pq.ParquetFile(stream).read_row_group(group.number, columns=list(columns), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise _explain(group.uri, error) from error


def is_held_out(row_id: str) -> bool:
    """Whether a row may be held out, which depends on its id alone: on no seed, no pool and no order."""
    return seed_for(0, row_id, "held-out") % ONE_IN == 0


def _read_footers(shards: Iterable[Location], limit: int | None = None) -> list[tuple[RowGroup, Facts]]:
    """Return the row groups with their rows at positions below `limit`, each with what `_read_footer` says of it."""
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        return [*chain.from_iterable(readers.map(partial(_read_footer, limit=limit), shards))]


def _read_footer(shard: Location, limit: int | None) -> list[tuple[RowGroup, Facts]]:
    """Return the row groups of a shard with what their statistics say."""
    try:
        with shard.open() as stream:
            footer = pq.read_metadata(stream)
    except (pa.ArrowException, OSError) as error:
        raise _explain(shard.uri, error) from error
    found = []
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        columns = [group.column(place) for place in range(group.num_columns)]
        known = {column.path_in_schema: column.statistics for column in columns if column.is_stats_set}
        limits = {name: (s.min, s.max) for name, s in known.items() if s.has_min_max and s.null_count == 0}
        full = {name for name, s in known.items() if s.null_count == 0}
        has_one_rejected = all(s.num_values == 0 for name, s in known.items() if name.startswith("more_rejected."))
        has_logps = full.issuperset(REFERENCE_LOGPS) and has_one_rejected
        revisions = limits.get("model_revision", (None, None))
        rows: Sequence[int] = range(group.num_rows)
        least, greatest = limits.get("position", (-math.inf, math.inf))
        if limit is not None and least >= limit:
            rows = ()
        elif limit is not None and greatest >= limit:
            positions = read_group(RowGroup(shard.uri, number, rows), ["position"])["position"].to_pylist()
            rows = tuple(row for row in rows if positions[row] < limit)
        if group.num_rows:
            revision = revisions[0] if has_logps and revisions[0] == revisions[1] else None
            found.append((RowGroup(shard.uri, number, rows), Facts(revision, "rejected_image.bytes" in full)))
    return found


def _first(groups: Iterable[RowGroup], num_rows: int) -> list[RowGroup]:
    """Return the groups with their first `num_rows` rows."""
    found = []
    for group in groups:
        rows = group.rows[:num_rows]
        num_rows -= len(rows)
        if rows:
            found.append(RowGroup(group.uri, group.number, rows))
    return found


def _hold_out(groups: Iterable[RowGroup], id_column: str, number: int) -> tuple[list[RowGroup], list[RowGroup]]:
    """Split the groups into what is trained on and what is held out: the first `number` rows that may be.

    Rows are added behind, so a pool that has grown keeps what it held out, and never holds out what it trained on.
    """
    trained, held_out = [], []
    for group in groups:
        ids = read_group(group, [id_column])[id_column].to_pylist() if number else []
        out = tuple(row for row in group.rows if ids and is_held_out(ids[row]))[:number]
        number -= len(out)
        rest = tuple(row for row in group.rows if row not in out) if out else group.rows
        for part, rows in ((trained, rest), (held_out, out)):
            if rows:
                part.append(RowGroup(group.uri, group.number, rows))
    return (trained, held_out) if trained else (held_out, trained)  # a handful may all be eligible


def damaged(uri: str, reason: str) -> SourceError:
    """Return the error of a file that can be read but not be understood."""
    return SourceError(f"'{uri}' is damaged ({one_line(reason)}). Delete it, {_AGAIN}.")


_AGAIN = "delete the manifest.json beside it, and run the stage that wrote it again: only what is missing is made"


def _explain(uri: str, error: Exception) -> SourceError | Failed:
    """Return what is wrong with a file that cannot be read: damaged or gone, or a storage that is away."""
    location = Location.of(uri)
    try:
        if isinstance(error, FileNotFoundError) and location.folder.holds_files():
            return SourceError(f"'{uri}' is gone. To have it made again, {_AGAIN}.")
        with location.open() as stream:  # damaged Parquet, too, is an OSError
            while stream.read(1 << 24):
                pass
    except OSError as outer:
        return Failed(f"'{uri}' cannot be read now ({type_and_message(outer)}).")
    return damaged(uri, str(error))
