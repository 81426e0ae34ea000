"""Which requests share a forward pass: as many as fit, of like length, the requests of one image together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace


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
