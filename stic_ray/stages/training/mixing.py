"""Trainings on several sources: how much of each is read, in which order, and when a budget of tokens is spent.

Each row of a mix is of the source that has had least of its share so far, in rows or in tokens, so what was read is
never further from what was asked for than a few rows, however short the training. A source is read in passes, each in
another order. All of this is known before the training begins, from the lengths of the rows: it depends on seed,
settings and rows alone, and so not on the number of workers or on where a training goes on.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, pairwise
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import SourceError
from stic_ray.core.randomness import seed_for
from stic_ray.core.section import Weights
from stic_ray.core.training import SFTConfig
from stic_ray.stages.training.data import MAX_LANES, Example, ParquetRows, num_steps_of
from stic_ray.stages.training.index import LENGTH, Plan, RowGroup, Rows, read_lengths

Lengths = Sequence[np.ndarray]
"""Tokens of each row, by row group."""


class Passes(ParquetRows):
    """The rows of one source of a mix, over and over: each pass has every row once, in an order of its own.

    As in an epoch, rows come from several lanes in turn; a pass is not filled up to whole batches.
    """

    def __init__(
        self,
        groups: Sequence[RowGroup],
        columns: Sequence[str],
        *,
        seed: int,
        num_lanes: int,
        image: Literal["own", "none"] = "own",
    ) -> None:
        super().__init__(groups, columns, seed=seed, global_batch=num_lanes, image=image)

    def __len__(self) -> int:
        return self.num_rows

    def draw(self, number: int) -> Example:
        """Return a row by its number, counted over all passes."""
        number_of_pass, index = divmod(number, self.num_rows)
        if number_of_pass != self._epoch:
            self.set_epoch(number_of_pass)
        return self[index]

    @property
    def num_lanes(self) -> int:
        """Lanes that the rows come from in turn."""
        return self._num_lanes

    def lanes(self, number: int) -> np.ndarray:
        """Return the lanes of the first so many rows, counted over all passes."""
        return np.arange(number) % self.num_rows % self._num_lanes

    def values(self, values: Sequence[np.ndarray]) -> Iterator[list[int]]:
        """Yield values of the rows, given by row group, as the rows come: a list for each pass, without an end."""
        places = self._places(np.arange(self.num_rows))
        for number_of_pass in count():
            self.set_epoch(number_of_pass)
            yield self.in_order(values)[places].tolist()

    def _place(self, index: int) -> tuple[int, int, float]:
        return index % self._num_lanes, int(self._places(np.array(index))), 1.0

    def _places(self, index: np.ndarray) -> np.ndarray:
        lane, offset = index % self._num_lanes, index // self._num_lanes
        return lane * (self.num_rows // self._num_lanes) + np.minimum(lane, self.num_rows % self._num_lanes) + offset


class MixedRows(Dataset[Example]):
    """The rows of a whole training on a mix, by their place in it."""

    def __init__(self, rows: Rows, columns: Sequence[str], seed: int, image: Literal["own", "none"] = "own") -> None:
        assert rows.plan is not None and rows.plan.sources is not None, "a mix is planned on the driver"
        self._passes = passes_of(rows, columns, seed, image)
        self._sources = rows.plan.sources
        self._numbers = np.empty(len(self._sources), dtype=np.int64)
        global_batch = len(self._sources) // rows.plan.num_steps
        for number, passes in enumerate(self._passes):
            own = np.flatnonzero(self._sources == number)
            # A worker has the same places of every batch: in the order of their lanes, its rows stay in a few of these.
            self._numbers[own] = np.lexsort((passes.lanes(len(own)), own // global_batch))

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: int) -> Example:
        return self._passes[self._sources[index]].draw(int(self._numbers[index]))


def passes_of(rows: Rows, columns: Sequence[str], seed: int, image: Literal["own", "none"] = "own") -> list[Passes]:
    """Return the rows of each source; a batch comes from as many row groups of all of them as without a mix."""
    lanes = max(1, MAX_LANES // len(rows.num_groups))
    found = []
    for name, groups in groups_of(rows).items():
        most = min(lanes, sum(len(group.rows) for group in groups))
        found.append(Passes(groups, columns, seed=seed_for(seed, name, "mix"), num_lanes=most, image=image))
    return found


def groups_of(rows: Rows) -> dict[str, list[RowGroup]]:
    """Return the row groups that are trained on, by source."""
    ends = np.cumsum([0, *rows.num_groups.values()]).tolist()
    return {name: rows.trained[begin:end] for name, (begin, end) in zip(rows.num_groups, pairwise(ends), strict=True)}


@dataclass
class Account:
    """What a training reads of each source, by number."""

    num_rows: list[int]
    num_tokens: list[int]
    asked: list[float] | None
    """Share that was asked for, over the whole training; None without a mix."""
    num_steps: int = 0

    def facts(self, rows: Rows, unit: str, *, has_lengths: bool) -> dict[str, Any]:
        """Return rows, tokens and shares of each source for result.json; no tokens where lengths are not known."""
        total_rows, total_tokens, found = sum(self.num_rows), sum(self.num_tokens), {}
        for number, (name, groups) in enumerate(groups_of(rows).items()):
            own: dict[str, Any] = {"num_rows": self.num_rows[number], "row_share": self.num_rows[number] / total_rows}
            if has_lengths:
                own |= {
                    "num_tokens": self.num_tokens[number],
                    "token_share": self.num_tokens[number] / total_tokens,
                }
            if self.asked is not None:
                own[f"asked_{unit[:-1]}_share"] = self.asked[number]
            own["num_passes"] = self.num_rows[number] / sum(len(group.rows) for group in groups)
            found[name] = own
        return {"sources": found, **({"num_tokens": total_tokens} if has_lengths else {})}


def plan(config: RunConfig, rows: Rows) -> Rows:
    """Return the rows with the plan of their training, where it is more than passes over a single source.

    Raises SourceError where lengths are needed, and files do not have them.
    """
    settings = config.sft
    if len(rows.num_groups) == 1 and settings.num_tokens is None:
        return rows
    lengths = read_lengths(rows.trained) if settings.image == "own" else None
    if lengths is None and (settings.num_tokens is not None or settings.mix_unit == "tokens"):
        setting = "sft.mix_unit=tokens" if settings.num_tokens is None else f"sft.num_tokens={settings.num_tokens}"
        raise SourceError(
            f"{setting} needs the length of every row, and files of the rows lack it (column {LENGTH}): count rows "
            "(sft.mix_unit=rows, sft.num_steps), or write them with a stage of this run."
        )
    known = lengths or [np.zeros(len(group.rows), dtype=np.int64) for group in rows.trained]
    sources = None
    if settings.mix:
        account, sources = _plan_mix(config, rows, known)
    else:
        account = _plan_epochs(config, rows, known)
    facts = account.facts(rows, settings.mix_unit, has_lengths=lengths is not None)
    return replace(rows, plan=Plan(account.num_steps, sources, facts))


def shares_at(settings: SFTConfig, names: Iterable[str], progress: float) -> list[float]:
    """Return the share of each source where a training has got so far, from 0 at its first step to 1 at its last."""
    begin, end = (_shares(weights) for weights in (settings.mix, settings.mix_end or settings.mix))
    return [begin[name] + (end[name] - begin[name]) * progress for name in names]


def _shares(weights: Weights) -> dict[str, float]:
    total = sum(weight for _, weight in weights)
    return {name: weight / total for name, weight in weights}


def _plan_mix(config: RunConfig, rows: Rows, lengths: Lengths) -> tuple[Account, np.ndarray]:
    """Return what is read of each source of a mix, and the source of each row."""
    settings, num_sources = config.sft, len(rows.num_groups)
    num_steps = None if settings.num_tokens else num_steps_of(settings, rows)
    passes = passes_of(rows, [], config.seed)
    streams = [
        chain.from_iterable(each.values(own)) for each, own in zip(passes, _by_source(rows, lengths), strict=True)
    ]
    by_tokens = settings.mix_unit == "tokens"
    typical = float(np.concatenate(lengths).mean()) if by_tokens else 1.0
    account = Account([0] * num_sources, [0] * num_sources, None)
    had = account.num_tokens if by_tokens else account.num_rows
    targets, drawn, num_tokens = [0.0] * num_sources, array("h"), 0
    while account.num_steps < num_steps if num_steps else num_tokens < (settings.num_tokens or 0):
        step = account.num_steps
        done = step / max(1, num_steps - 1) if num_steps else num_tokens / (settings.num_tokens or 1)
        shares = shares_at(settings, rows.num_groups, done)
        for _ in range(settings.global_batch):
            behind = [target + share * typical - own for target, share, own in zip(targets, shares, had, strict=True)]
            source = behind.index(max(behind))
            length = next(streams[source])
            account.num_rows[source] += 1
            account.num_tokens[source] += length
            num_tokens += length
            amount = length if by_tokens else 1
            targets = [target + share * amount for target, share in zip(targets, shares, strict=True)]
            drawn.append(source)
        account.num_steps += 1
    account.asked = [target / sum(targets) for target in targets]
    sources = np.array(drawn, dtype=np.int16).reshape(account.num_steps, -1)
    return account, _in_lanes(sources, passes, seed_for(config.seed, "places in a batch", "mix")).reshape(-1)


def _in_lanes(sources: np.ndarray, passes: Sequence[Passes], seed: int) -> np.ndarray:
    """Return the sources of each batch (steps x rows), in the order of the lanes that their rows come from.

    A worker has the same places of every batch, and so reads about the same lanes of every source. In one lane the
    sources come by chance: if they took turns, one worker could have all rows of a source.
    """
    generator, positions = np.random.default_rng(seed), np.empty(sources.shape)
    for number, each in enumerate(passes):
        is_own = sources == number
        lanes = each.lanes(int(is_own.sum()))
        positions[is_own] = (lanes + generator.random(len(lanes))) / each.num_lanes
    return np.take_along_axis(sources, positions.argsort(axis=1), axis=1)


def _plan_epochs(config: RunConfig, rows: Rows, lengths: Lengths) -> Account:
    """Return what is read of each source when every row is read once an epoch."""
    settings, num_sources = config.sft, len(rows.num_groups)
    epochs = ParquetRows(rows.trained, [], seed=config.seed, global_batch=settings.global_batch)
    account = Account([0] * num_sources, [0] * num_sources, None)
    left = settings.num_tokens or num_steps_of(settings, rows)
    for epoch in count():
        if left <= 0:
            return account
        epochs.set_epoch(epoch)
        counts, tokens = (
            np.stack([epochs.sums_of_steps(own) for own in _of_each_source(rows, values)])
            for values in ([np.ones_like(each) for each in lengths], lengths)
        )
        read = tokens.sum(0).cumsum() if settings.num_tokens else np.arange(1, len(epochs) // settings.global_batch + 1)
        num_steps = min(len(read), int(np.searchsorted(read, left)) + 1)
        left -= int(read[num_steps - 1])
        account.num_steps += num_steps
        account.num_rows = [a + int(b) for a, b in zip(account.num_rows, counts[:, :num_steps].sum(1), strict=True)]
        account.num_tokens = [a + int(b) for a, b in zip(account.num_tokens, tokens[:, :num_steps].sum(1), strict=True)]
    raise AssertionError("unreachable: epochs do not end")


def _by_source(rows: Rows, values: Lengths) -> list[Lengths]:
    ends = np.cumsum([0, *rows.num_groups.values()]).tolist()
    return [values[begin:end] for begin, end in pairwise(ends)]


def _of_each_source(rows: Rows, values: Lengths) -> Iterator[Lengths]:
    """Yield the values of all rows once for each source, 0 for the rows of others."""
    owners = np.repeat(np.arange(len(rows.num_groups)), [*rows.num_groups.values()])
    for number in range(len(rows.num_groups)):
        yield [own * (owner == number) for own, owner in zip(values, owners, strict=True)]
