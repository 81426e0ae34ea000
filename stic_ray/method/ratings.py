"""Scores of an image's answers put together, and the top share of a pool by them."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from stic_ray.core.verification import RulesConfig


@dataclass(frozen=True)
class RatedAnswer:
    """A candidate as far as the rules look at it."""

    number: int
    text: str
    num_tokens: int
    is_cut_off: bool = False
    """Whether it reached its token limit, where such answers are not to be learnt from."""
    score: float | None = None
    """Of all scorers that count together; None where one of them gave it none, or where none counts."""

    @property
    def value(self) -> float:
        """The score, where there must be one."""
        assert self.score is not None, f"candidate {self.number} has no score"
        return self.score


def is_whole(answer: RatedAnswer) -> bool:
    """Whether an answer says something, to its end."""
    return bool(answer.text.strip()) and not answer.is_cut_off


def best_score(answers: Iterable[RatedAnswer]) -> float | None:
    """Return the best score of the answers that can be taken; None without one."""
    return max((each.score for each in answers if is_whole(each) and each.score is not None), default=None)


class Cut(NamedTuple):
    """The last image within the top share: its best score and, among equal scores, its place by `rank_of`."""

    score: float
    rank: int

    def keeps(self, image_id: str, score: float) -> bool:
        """Whether an image with this best score is within the share."""
        return (-score, rank_of(image_id)) <= (-self.score, self.rank)


def rank_of(image_id: str) -> int:
    """Return where an image stands among others of its score: ids are hashes of the content, so anywhere."""
    return int(image_id[:15], 16)


def cut_at(share: float, scores: np.ndarray, ranks: np.ndarray) -> Cut:
    """Return the cut that keeps ceil(share x images) of the images with these best scores and ranks."""
    order = np.lexsort((ranks, -scores))
    last = order[math.ceil(share * len(scores) - 1e-9) - 1]
    return Cut(float(scores[last]), int(ranks[last]))


def combined_scores(
    scores: Iterable[Mapping[str, Any]], numbers: Iterable[int], rules: RulesConfig
) -> dict[int, float]:
    """Return one score for each of an image's candidates that has a value of every scorer that counts.

    `scores` are rows of the table SCORES. A value without a number is the image's own and holds for each of its
    candidates; a value that is no finite number is none. Ranks (CSR) are taken among the candidates that have all
    values; equal values share the mean of their ranks.
    """
    values = {(row["scorer"], row["number"]): row["value"] for row in scores if math.isfinite(row["value"])}
    names, weights = [name for name, _ in rules.scorers], np.array([weight for _, weight in rules.scorers])
    found = {number: [values.get((name, number), values.get((name, None))) for name in names] for number in numbers}
    complete = {number: row for number, row in sorted(found.items()) if None not in row}
    if not names or not complete:
        return {}
    table = np.array([*complete.values()], dtype=np.float64) * weights
    if rules.combine == "rank":
        shares = np.abs(weights) / np.abs(weights).sum()
        table = np.stack([_ranks(column) for column in table.T], axis=1) * shares
    return dict(zip(complete, table.sum(axis=1).tolist(), strict=True))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return the place of each value among all, from 0 to 1; a single one has 1."""
    if len(values) == 1:
        return np.ones(1)
    num_below = (values[:, None] > values).sum(axis=1)
    num_equal = (values[:, None] == values).sum(axis=1) - 1
    return (num_below + num_equal / 2) / (len(values) - 1)
