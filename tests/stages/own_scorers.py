"""Scorers of a user's own, as `tests.stages.own_scorers:name`."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

from stic_ray.stages.scorers import Answered, Score, Scored, Scorer, Tools, by_answer

KILLED = "killed"
"""Left beside the pictures by the scorer that kills its process."""


def num_letters(images: Sequence[Answered]) -> list[list[float]]:
    """A plain function."""
    return [[float(sum(map(str.isalpha, text))) for text in image.texts] for image in images]


def _open_redness(tools: Tools) -> Score:
    def score(images: Sequence[Answered]) -> list[Scored]:
        assert all(image.picture is not None for image in images)
        reds = [image.picture.resize((1, 1)).tobytes()[0] for image in images if image.picture]
        return [by_answer(image, [float(red)] * len(image.answers)) for image, red in zip(images, reds, strict=True)]

    return score


redness = Scorer(_open_redness, frozenset({"pictures"}))
"""Looks at the picture."""


def _open_deadly(tools: Tools) -> Score:
    mark = Path(tools.config.pool.source).parent / KILLED

    def score(images: Sequence[Answered]) -> list[Scored]:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return [by_answer(image, [float(len(text)) for text in image.texts]) for image in images]

    return score


deadly = Scorer(_open_deadly)
"""Kills its process once, and counts characters."""
no_scorer = 3
