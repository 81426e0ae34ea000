"""One shard, window by window: several windows at once, and past what kills, hangs or breaks the engine.

A window is a run of rows whose pictures are decoded together. Windows are answered in order, those of the shard that
came first before those of the next, so that an actor that dies leaves little more than one shard undone.

What goes wrong is narrowed down. A window that failed, or that actors died over, is done image by image, with nothing
beside it; an image that fails or kills alone becomes a rejected row.
"""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from stic_ray.core.config import ActorsConfig
from stic_ray.core.errors import EngineError, StageError
from stic_ray.core.schemas import Reason, table_of
from stic_ray.engines.watched import WatchedEngine
from stic_ray.method.preferences import Rejection
from stic_ray.stages.attempts import Attempts

logger = logging.getLogger(__name__)

Tables = dict[str, pa.Table]
Rows = dict[str, list[dict[str, Any]]]
"""Output rows by family; a family without rows may be left out."""

_NUM_FAILURES_OF_A_BROKEN_ENGINE = 8
"""So many errors one after another are no coincidence, nor is a whole window of an engine that never answered."""
_NUM_DEADLY_IMAGES_OF_A_BROKEN_ENGINE = 3
"""Nor are so many images that kill, with none between that does not."""


@runtime_checkable
class WindowWorker(Protocol):
    """Owns a model, or what else is expensive to set up, and works on a few rows at a time; from several threads."""

    engine: WatchedEngine | None

    def __call__(self, window: list[dict[str, Any]]) -> Rows:
        """Return the output rows of some input rows. Raises EngineError as the engine does."""
        ...

    def reject(self, row: dict[str, Any], rejection: Rejection) -> Rows:
        """Return the output rows of an input row that the engine cannot answer."""
        ...


class Windows:
    """Takes shards through a worker."""

    def __init__(self, worker: WindowWorker, families: Mapping[str, pa.Schema], actors: ActorsConfig) -> None:
        """Work with so many threads as windows may be in flight."""
        self._worker = worker
        self._families = families
        self._actors = actors
        self._threads = ThreadPoolExecutor(actors.windows_in_flight)  # first come, first served
        self._room = _Room()
        self._has_answered = False
        self._num_failures_in_a_row = 0
        self._broken: StageError | None = None

    def do(self, shard: pa.Table, attempts: Attempts) -> Tables:
        """Return the output tables of a shard, by family, in the order of its rows.

        Raises StageError when the engine is broken, and whatever the worker raises beside EngineError.
        """
        size = self._actors.batch_size
        starts = range(0, shard.num_rows, size)
        tasks = [self._threads.submit(self._do_window, shard.slice(start, size), start, attempts) for start in starts]
        try:
            done = [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
        return {
            family: table_of([row for rows in done for row in rows.get(family, [])], schema)
            for family, schema in self._families.items()
        }

    def _do_window(self, window: pa.Table, start: int, attempts: Attempts) -> Rows:
        rows = window.to_pylist()
        name = f"{start}-{start + len(rows)}"
        images = [f"{start + place}" for place in range(len(rows))]
        suspected = attempts.deaths[name] >= self._actors.max_retries or any(attempts.deaths[i] for i in images)
        if not suspected:
            try:
                with self._room.shared(), attempts.working_on(name):
                    return self._answered(rows)
            except EngineError as error:
                logger.warning("the engine failed on %d images, trying them one by one: %s", len(rows), error)
        with self._room.alone():
            if self._broken:  # found out by the window before
                raise self._broken
            return self._one_by_one(rows, images, attempts)

    def _one_by_one(self, rows: list[dict[str, Any]], images: Sequence[str], attempts: Attempts) -> Rows:
        found: Rows = {}
        num_deadly, has_survived = 0, False
        for row, image in zip(rows, images, strict=True):
            if attempts.deaths[image] >= self._actors.max_retries:
                num_deadly += 1
                if num_deadly >= _NUM_DEADLY_IMAGES_OF_A_BROKEN_ENGINE and not has_survived:
                    raise StageError(f"every image kills its actor: {num_deadly} one after another did.")
                message = f"{attempts.deaths[image]} actors died, or hung until actors.timeout_s, over this image alone"
                result = self._worker.reject(row, Rejection(Reason.ENGINE_FAILED, message))
            else:
                with attempts.working_on(image):
                    result = self._answered_or_rejected(row, len(rows))
                has_survived = True
            for family, more in result.items():
                found.setdefault(family, []).extend(more)
        return found

    def _answered_or_rejected(self, row: dict[str, Any], num_rows: int) -> Rows:
        try:
            return self._answered([row])
        except EngineError as error:
            self._num_failures_in_a_row += 1
            limit = _NUM_FAILURES_OF_A_BROKEN_ENGINE
            if self._num_failures_in_a_row >= (limit if self._has_answered else max(2, min(limit, num_rows))):
                self._broken = StageError(
                    f"the engine fails on every image, {self._num_failures_in_a_row} one after another: {error}"
                )
                raise self._broken from error
            return self._worker.reject(row, Rejection(Reason.ENGINE_FAILED, str(error)))

    def _answered(self, rows: list[dict[str, Any]]) -> Rows:
        result = self._worker(rows)
        self._has_answered, self._num_failures_in_a_row = True, 0
        return result


class _Room:
    """Shared by any number, or one alone; whoever wants to be alone goes before those who come later."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_inside = self._num_waiting_to_be_alone = 0
        self._is_alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_alone and not self._num_waiting_to_be_alone)
            self._num_inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._num_waiting_to_be_alone += 1
            self._changed.wait_for(lambda: not self._is_alone and not self._num_inside)
            self._num_waiting_to_be_alone -= 1
            self._is_alone = True
        try:
            yield
        finally:
            with self._changed:
                self._is_alone = False
                self._changed.notify_all()
