"""One shard, window by window: several windows at once, and past what kills, hangs or breaks the engine.

A window is a run of rows whose pictures are decoded together. Windows are answered in order, those of the shard that
came first before those of the next, so that an actor that dies leaves little more than one shard undone.

Here, and only here, it is decided how a row ends: written, rejected or failed (core/errors.py). What goes wrong with
a window is narrowed down to its rows (stages/quarantine.py).
"""

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from stic_ray.core.config import ActorsConfig
from stic_ray.core.errors import EngineError, Failed, Rejected, StageError, SticError, type_and_message
from stic_ray.core.rundir import FAILED_FAMILY, REJECTED_FAMILY
from stic_ray.core.schemas import Reason, table_of
from stic_ray.engines.guarded import GuardedEngine, as_engine_error
from stic_ray.stages.quarantine import Quarantine

logger = logging.getLogger(__name__)

Tables = dict[str, pa.Table]
Rows = Mapping[str, list[dict[str, Any]]]
"""Output rows by family; a family without rows may be left out."""

_NUM_ERRORS_OF_A_BROKEN_ENGINE = 8
"""So many errors one after another are no coincidence, nor is a whole window of an engine that never answered."""
_NUM_DEADLY_IMAGES_OF_A_BROKEN_ENGINE = 3
"""Nor are so many images that kill, with none between that does not."""
_ENDED = {REJECTED_FAMILY, FAILED_FAMILY}


class RowWorker(Protocol):
    """What a stage does with a row: prepare it, ask the engine, finish it; from several threads.

    Owns a model, or what else is expensive to set up. Each function raises Rejected or Failed to end a row that way,
    and any other error of `prepare` and `finish` rejects the row, too.
    """

    @property
    def engine(self) -> GuardedEngine | None:
        """The engine, if there is one."""
        ...

    def identities(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """Return `image_id` and `path` of the row in the tables of rejected and failed rows, once per row of output."""
        ...

    def prepare(self, row: dict[str, Any]) -> Any:
        """Return what `answer` and `finish` need of a row, such as its decoded picture."""
        ...

    def answer(self, prepared: Sequence[Any]) -> Sequence[Any]:
        """Ask the engine about the prepared rows of a window, and return an answer for each, in order."""
        ...

    def finish(self, prepared: Any, answer: Any) -> Rows:
        """Return the output rows of a prepared row and its answer."""
        ...


@runtime_checkable
class Completing(Protocol):
    """A worker that asks the engine a second time, about rows that are finished."""

    def complete(self, finished: Sequence[tuple[Any, Rows]]) -> None:
        """Add to the output rows of a window; each comes with what was prepared of it."""
        ...


@runtime_checkable
class Closing(Protocol):
    """A worker with something to do once all rows of a shard have ended."""

    def close_shard(self, tables: Tables) -> Tables:
        """Return a shard's output tables, by family, as they are to be written."""
        ...


@dataclass
class _Row:
    given: dict[str, Any]
    prepared: Any = None
    output: Rows | None = None
    """Set when the row has ended."""


class Windows:
    """Takes shards through a worker."""

    def __init__(self, worker: RowWorker, families: Mapping[str, pa.Schema], actors: ActorsConfig) -> None:
        """Work with so many threads as windows may be in flight; `families` has rejected and failed rows, too."""
        self._worker = worker
        self._families = families
        self._actors = actors
        self._threads = ThreadPoolExecutor(actors.windows_in_flight)  # first come, first served
        self._door = threading.Lock()
        self._places = threading.Semaphore(actors.windows_in_flight)
        self._num_errors = self._num_answered = self._num_rows_answered = 0
        self._broken: StageError | None = None

    def do(self, shard: pa.Table, quarantine: Quarantine) -> Tables:
        """Return the output tables of a shard, by family, in the order of its rows.

        Raises StageError when the engine is broken, and UserError as the worker raises it.
        """
        size = self._actors.batch_size
        starts = range(0, shard.num_rows, size)
        done = list(self._threads.map(lambda start: self._window(shard.slice(start, size), start, quarantine), starts))
        tables = {
            family: pa.concat_tables([schema.empty_table(), *(tables[family] for tables in done)])
            for family, schema in self._families.items()
        }
        return self._worker.close_shard(tables) if isinstance(self._worker, Closing) else tables

    def _window(self, window: pa.Table, start: int, quarantine: Quarantine) -> Tables:
        given = window.to_pylist()
        name = f"{start}-{start + len(given)}"
        images = [f"{start + place}" for place in range(len(given))]
        if not quarantine.is_suspect(name, images):
            try:
                with self._inside(1), quarantine.working_on(name):
                    return self._tables(self._work([_Row(row) for row in given]))
            except EngineError as error:
                logger.warning("the engine failed on %d images, trying them one by one: %s", len(given), error)
        with self._inside(self._actors.windows_in_flight):  # alone
            return self._tables(self._work_one_by_one([_Row(row) for row in given], images, quarantine))

    @contextmanager
    def _inside(self, num_places: int) -> Iterator[None]:
        """Hold places; whoever waits for all of them goes before those who come later."""
        with self._door:
            for _ in range(num_places):
                self._places.acquire()
        try:
            yield
        finally:
            self._places.release(num_places)

    def _work_one_by_one(self, rows: list[_Row], images: Sequence[str], quarantine: Quarantine) -> list[_Row]:
        num_deadly, has_survived = 0, False
        for row, image in zip(rows, images, strict=True):
            with self._ending(row):
                if quarantine.is_deadly(image):
                    num_deadly += 1
                    if num_deadly >= _NUM_DEADLY_IMAGES_OF_A_BROKEN_ENGINE and not has_survived:
                        raise StageError(f"every image kills its actor: {num_deadly} one after another did.")
                    message = (
                        f"{quarantine.deaths[image]} actors died, or hung until actors.timeout_s, over this image alone"
                    )
                    raise Rejected(Reason.ENGINE_FAILED, message)
                try:
                    with quarantine.working_on(image):
                        self._work([row])
                except EngineError as error:
                    self._check_engine(error, len(rows))
                    raise Rejected(Reason.ENGINE_FAILED, str(error)) from error
                finally:
                    has_survived |= row.prepared is not None
        return rows

    def _check_engine(self, error: EngineError, num_rows: int) -> None:
        """Count the error of an image of a window that was alone. Raises StageError when the engine is broken.

        Only what the engine answered is a sign of life.
        """
        if self._broken:
            raise self._broken
        engine = self._worker.engine
        num_answered = engine.num_answered if engine else self._num_rows_answered
        self._num_errors = self._num_errors + 1 if num_answered == self._num_answered else 1
        self._num_answered = num_answered
        limit = _NUM_ERRORS_OF_A_BROKEN_ENGINE
        if self._num_errors >= (limit if num_answered else max(2, min(limit, num_rows))):
            self._broken = StageError(f"the engine fails on every image, {self._num_errors} one after another: {error}")
            raise self._broken from error

    def _work(self, rows: list[_Row]) -> list[_Row]:
        """Have every row end."""
        for row in rows:
            with self._ending(row):
                row.prepared = self._worker.prepare(row.given)
        ready = [row for row in rows if row.output is None]
        if not ready:
            return rows
        with as_engine_error():
            try:
                answers = self._worker.answer([row.prepared for row in ready])
                self._num_rows_answered += len(ready)
            except Failed as error:  # the engine is away, for all of them
                answers = [error] * len(ready)
        for row, answer in zip(ready, answers, strict=True):
            with self._ending(row):
                if isinstance(answer, Failed):
                    raise answer
                row.output = self._worker.finish(row.prepared, answer)
        if isinstance(self._worker, Completing):
            with as_engine_error():
                finished = [row for row in ready if row.output and not _ENDED & row.output.keys()]
                self._worker.complete([(row.prepared, row.output or {}) for row in finished])
        return rows

    @contextmanager
    def _ending(self, row: _Row) -> Iterator[None]:
        """Reject the row, or have it fail, where the block says so or raises what nobody is prepared for."""
        try:
            yield
        except Failed as error:
            row.output = self._ended(row, FAILED_FAMILY, message=error.message)
        except Rejected as error:
            row.output = self._ended(row, REJECTED_FAMILY, reason=error.reason, message=error.message)
        except SticError:
            raise
        except Exception as error:
            number = row.given.get("row")
            where = f"'{row.given.get('path')}'" + ("" if number is None else f", row {number}")
            message = f"{type_and_message(error)} ({where})"
            row.output = self._ended(row, REJECTED_FAMILY, reason=Reason.UNEXPECTED_ERROR, message=message)

    def _ended(self, row: _Row, family: str, **why: str) -> Rows:
        found = [{**identity, **why} for identity in self._worker.identities(row.given)]
        return {family: [{name: _storable(text) for name, text in each.items()} for each in found]}

    def _tables(self, rows: list[_Row]) -> Tables:
        try:
            return self._collected(rows)
        except Exception:  # something in a row that a table cannot hold
            for row in rows:
                with self._ending(row):
                    self._collected([row])
            return self._collected(rows)

    def _collected(self, rows: list[_Row]) -> Tables:
        return {
            family: table_of([each for row in rows for each in (row.output or {}).get(family, [])], schema)
            for family, schema in self._families.items()
        }


def _storable(text: str) -> str:
    """Return a text without the halves of characters that no file can hold."""
    return text.encode("utf-8", "replace").decode()
