"""Which requests share a forward pass: as many as fit, of like length, the requests of one image together."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from stic_ray.core.errors import EngineError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
_NUM_BEFORE_GROWTH = 100
"""Batches that fit until larger ones are tried again."""


@dataclass(frozen=True)
class BatchLimits:
    """What one forward pass may hold."""

    num_rows: int
    num_positions: int | None
    """Rows times positions of the longest row, padding and room for the answer included; None for no limit."""

    def most_rows(self, length: int) -> int:
        """Return how many rows fit, the longest of them `length` positions long: at least one."""
        by_positions = self.num_rows if self.num_positions is None else self.num_positions // length
        return max(1, min(self.num_rows, by_positions))

    def halved(self, num_rows: int, length: int) -> "BatchLimits":
        """Return limits that half of a batch fits that ran out of memory."""
        if self.num_positions is None:
            return replace(self, num_rows=num_rows // 2)
        return replace(self, num_positions=num_rows // 2 * length)

    def doubled(self, most: "BatchLimits") -> "BatchLimits":
        """Return limits of twice as much, within `most`, from which these came."""
        positions = min(2 * (self.num_positions or 0), most.num_positions or 0) or None
        return BatchLimits(min(2 * self.num_rows, most.num_rows), positions)


def plan_batches(lengths: Sequence[int], groups: Sequence[str], limits: BatchLimits) -> list[list[int]]:
    """Return the indices of each batch, the longest rows first.

    `lengths` are the positions that each row takes. Rows of one group stay together where they fit. A row longer than
    the limit is a batch of its own. The plan depends on the arguments alone, so that work done again gives the same.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group or f"row {index}", []).append(index)
    longest_first = sorted(members.values(), key=lambda rows: -max(lengths[row] for row in rows))
    batches: list[list[int]] = []
    most = 0
    for rows in longest_first:
        if batches and len(batches[-1]) + len(rows) <= most:
            batches[-1] += rows
            continue
        most = limits.most_rows(max(lengths[row] for row in rows))
        batches += [rows[start : start + most] for start in range(0, len(rows), most)]
    return batches


class FittingBatches:
    """Work in batches that fit: one that runs out of memory is halved, and the smaller size kept for a while.

    Memory may have been short for a moment only. So after many batches that fit, twice as much is tried again; each
    time that this fails, the next try is after twice as many. Threads may share it.
    """

    def __init__(
        self,
        limits: BatchLimits,
        out_of_memory: tuple[type[Exception], ...] = (MemoryError,),
        release: Callable[[], object] = lambda: None,
    ) -> None:
        """Begin with `limits`; `out_of_memory` are an engine's errors, `release` gives unused memory back after one."""
        self.limits = self._most = limits
        self._out_of_memory = out_of_memory
        self._release = release
        self._has_grown, self._num_fitting, self._num_before_growth = False, 0, _NUM_BEFORE_GROWTH

    def run(
        self,
        rows: Sequence[int],
        lengths: Sequence[int],
        groups: Sequence[str],
        work: Callable[[list[int]], Sequence[Result]],
    ) -> dict[int, Result]:
        """Return what `work` gives for each of `rows`, which index `lengths` and `groups` (see `plan_batches`).

        Raises EngineError when a single row does not fit, and what `work` raises otherwise.
        """
        results: dict[int, Result] = {}
        waiting = list(rows)
        while waiting:
            plan = plan_batches([lengths[row] for row in waiting], [groups[row] for row in waiting], self.limits)
            batch = [waiting[place] for place in plan[0]]
            try:
                found = work(batch)
            except self._out_of_memory as error:
                self._shrink(len(batch), max(lengths[row] for row in batch), error)
                found = None
            if found is None:  # here, as the traceback holds what the batch had allocated
                self._release()
                continue
            self._grow()
            results.update(zip(batch, found, strict=True))
            waiting = [row for row in waiting if row not in results]
        return results

    def _grow(self) -> None:
        self._num_fitting += 1
        if self.limits != self._most and self._num_fitting >= self._num_before_growth:
            self._has_grown, self._num_fitting = True, 0
            self.limits = self.limits.doubled(self._most)

    def _shrink(self, num_rows: int, length: int, error: Exception) -> None:
        if num_rows == 1:
            raise EngineError(f"out of memory with a single request of about {length} tokens: {error}") from error
        if self._has_grown:  # what was tried again does not fit
            self._num_before_growth *= 2
        self._has_grown, self._num_fitting = False, 0
        self.limits = self.limits.halved(num_rows, length)
        logger.warning("out of memory with %d requests of %d tokens, going on with half of them", num_rows, length)
