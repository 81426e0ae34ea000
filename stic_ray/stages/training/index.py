"""On the driver: which rows of the shards are trained on and which are held out, from footers and a few columns."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import pyarrow as pa
import pyarrow.parquet as pq

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import Failed, SourceError, one_line, type_and_message
from stic_ray.core.randomness import seed_for
from stic_ray.core.storage import Location
from stic_ray.engines.adapters import model_at
from stic_ray.engines.fingerprints import fingerprint
from stic_ray.stages.training.batches import REFERENCE_LOGPS

ONE_IN = 16
"""At most about one row in so many is held out."""

_NUM_READERS = 16
"""Threads that read footers, which is mostly waiting for the storage."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group of a Parquet file, and those of its rows that are used, rising."""

    uri: str
    number: int
    rows: Sequence[int]


@dataclass(frozen=True)
class Rows:
    """What a stage reads: about 200 bytes for each row group, nothing for a row."""

    trained: list[RowGroup]
    held_out: list[RowGroup]
    has_reference_logps: bool = False
    """Whether all pairs carry REFERENCE_LOGPS of the model, and the pictures, that training begins with."""

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
    settings, found = config.dpo, list(_read_footers(shards))
    if not found:
        raise SourceError("Stage preferences left no pairs to train on; see its rejected-*.parquet.")
    if settings.num_images is not None:
        cut = [(_below(group, facts, settings.num_images), facts) for group, facts in found]
        found = [(group, facts) for group, facts in cut if group.rows]
    groups = [group for group, _ in found]
    num_pairs = sum(len(group.rows) for group in groups)
    if not num_pairs:
        raise SourceError(f"dpo.num_images={settings.num_images} leaves none of the pairs; use more images.")
    if num_pairs == 1 and settings.image == "shuffled":
        raise SourceError("dpo.image=shuffled needs at least 2 pairs to exchange their pictures, there is 1.")
    has_stored = settings.image == "own" and settings.objective != "sft"
    has_stored = has_stored and _have_reference_logps(config, start, [facts for _, facts in found])
    return Rows(*_hold_out(groups, "image_id", settings.num_held_out), has_reference_logps=has_stored)


def index_conversations(config: RunConfig, shards: Iterable[Location]) -> Rows:
    """Find the rows of stage `sft`, and hold some of them out. Raises SourceError as `index_pairs`."""
    groups = [group for group, _ in _read_footers(shards)]
    if not groups:
        raise SourceError("Stage infusion left no rows to train on; see its rejected-*.parquet.")
    return Rows(*_hold_out(groups, "id", config.sft.num_held_out))


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


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a footer says about the columns of a row group: the least and the greatest value, None if it does not."""

    position: tuple[int, int] | None
    model_revision: tuple[str, str] | None
    num_without_logps: int | None


def _read_footers(shards: Iterable[Location]) -> Iterator[tuple[RowGroup, _Facts]]:
    with ThreadPoolExecutor(_NUM_READERS) as readers:
        yield from chain.from_iterable(readers.map(_read_footer, shards))


def _read_footer(shard: Location) -> list[tuple[RowGroup, _Facts]]:
    try:
        with shard.open() as stream:
            footer = pq.read_metadata(stream)
    except (pa.ArrowException, OSError) as error:
        raise _explain(shard.uri, error) from error
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    found = [(RowGroup(shard.uri, n, range(group.num_rows)), _facts(group)) for n, group in enumerate(groups)]
    return [(group, facts) for group, facts in found if group.rows]


def _facts(group: pq.RowGroupMetaData) -> _Facts:
    columns = [group.column(number) for number in range(group.num_columns)]
    known = {column.path_in_schema: column.statistics for column in columns if column.is_stats_set}
    limits = {name: (s.min, s.max) if s.has_min_max and s.null_count == 0 else None for name, s in known.items()}
    absent = [known[name].null_count for name in REFERENCE_LOGPS if name in known]
    num_absent = sum(absent) if len(absent) == len(REFERENCE_LOGPS) else None
    return _Facts(limits.get("position"), limits.get("model_revision"), num_absent)


def _below(group: RowGroup, facts: _Facts, limit: int) -> RowGroup:
    """Return the group with the rows at positions below the limit; most are decided by the footer."""
    if facts.position is not None and facts.position[1] < limit:
        return group
    if facts.position is not None and facts.position[0] >= limit:
        return RowGroup(group.uri, group.number, ())
    positions = read_group(group, ["position"])["position"].to_pylist()
    return RowGroup(group.uri, group.number, tuple(row for row in group.rows if positions[row] < limit))


def _have_reference_logps(config: RunConfig, start: Location | None, facts: Sequence[_Facts]) -> bool:
    if any(each.num_without_logps != 0 for each in facts):
        return False
    model = model_at(config.model, start.local_copy() if start else None)
    revision = fingerprint(model)
    return all(each.model_revision == (revision, revision) for each in facts)


def _hold_out(groups: list[RowGroup], id_column: str, number: int) -> tuple[list[RowGroup], list[RowGroup]]:
    """Split the groups into what is trained on and what is held out: the first `number` rows that may be.

    Rows are added behind, so a pool that has grown keeps what it held out, and never holds out what it trained on.
    """
    trained, held_out = [], []
    for group in groups:
        if number == 0:
            trained.append(group)
            continue
        ids = read_group(group, [id_column])[id_column].to_pylist()
        out = tuple(row for row in group.rows if is_held_out(ids[row]))[:number]
        number -= len(out)
        parts = (trained, tuple(row for row in group.rows if row not in out)), (held_out, out)
        for part, rows in parts if out else ((trained, group.rows),):
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
