"""What was being worked on when a process died: small files beside the shards, read by whoever tries again.

Ray tries again without end, wherever an actor dies. These files count the deaths, so that an image or a model that
kills every actor is found out. They are there only while a shard is being made, or a model loaded.

A first attempt at a shard leaves one note for all of it. Only where somebody has died over the shard is every part
noted: each note is a file replaced, which a disk may take milliseconds for, and an object store more.
"""

import json
import threading
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from stic_ray.core.errors import StageError
from stic_ray.core.rundir import ATTEMPTS_FAMILY, RunDir

_WHOLE_SHARD = "shard"
_MAX_DEATHS_ELSEWHERE = 5
"""So many actors may die over a shard while no image is to blame."""


class Attempts:
    """The parts of one shard that are being worked on, and how often an attempt at each ended in death."""

    def __init__(self, output: RunDir, number: int) -> None:
        """Begin an attempt at shard `number`: what the last one was working on has died."""
        self._output = output
        self._number = number
        before = _read(output, attempts_name(number))
        self._is_first = before is None
        self.deaths = Counter[str](before["deaths"] if before else {})
        """By part, without those of the first attempt."""
        self.deaths.update(before["working_on"] if before else {})
        self._working_on: set[str] = set()
        self._lock = threading.Lock()
        if self._is_first:
            self._write([_WHOLE_SHARD])

    @contextmanager
    def working_on(self, part: str) -> Iterator[None]:
        """Note that `part` is being worked on until the end of the block; an error that ends it is no death."""
        if self._is_first:
            yield
            return
        with self._lock:
            self._working_on.add(part)
            self._write(self._working_on)
        try:
            yield
        finally:
            with self._lock:
                self._working_on.remove(part)
                del self.deaths[part]
                self._write(self._working_on)

    @contextmanager
    def handling(self, what: str) -> Iterator[None]:
        """Work on something other than images, as reading the shard. Raises StageError when it keeps being deadly."""
        if self.deaths[what] >= _MAX_DEATHS_ELSEWHERE:
            (self._output.location / attempts_name(self._number)).delete()  # a rerun tries again
            raise StageError(
                f"{self.deaths[what]} actors died while {what} shard {self._number}. A likely cause is too little "
                f"memory for pool.shard_size images."
            )
        with self.working_on(what):
            yield

    def _write(self, working_on: Collection[str]) -> None:
        state = {"working_on": sorted(working_on), "deaths": dict(self.deaths)}
        self._output.write_text(attempts_name(self._number), json.dumps(state))


def _read(output: RunDir, name: str) -> Any:
    try:
        return output.read_json(name)
    except ValueError:  # a machine that lost power may leave an empty file
        return None


def attempts_name(number: int) -> str:
    """Return the file name of the attempts at a shard."""
    return f"{ATTEMPTS_FAMILY}-{number:06d}.json"


@contextmanager
def loading(output: RunDir, actor: str, num_tries: int) -> Iterator[None]:
    """Count how often an actor died inside this block; Ray starts the same actor again after each death.

    Raises StageError where it has died `num_tries` times.
    """
    name = f"{ATTEMPTS_FAMILY}-{actor}.json"
    num_deaths = _read(output, name) or 0
    if num_deaths >= num_tries:
        raise StageError(
            f"an actor died {num_deaths} times while it loaded the model. A likely cause is too little memory; "
            f"Ray's logs say what ended it."
        )
    output.write_text(name, str(num_deaths + 1))
    try:
        yield
    finally:
        (output.location / name).delete()
