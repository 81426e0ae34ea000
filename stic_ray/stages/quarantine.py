"""What has killed actors, and is therefore tried with more care.

A shard goes through these states, each of which a death over it or, for the third, an error of the engine leads to:

| state      | reached when                                          | noted meanwhile | how it is done          |
|------------|-------------------------------------------------------|-----------------|-------------------------|
| Whole      | at first                                              | the shard       | several windows at once |
| Windows    | an actor died over the shard                          | each window     | several windows at once |
| One by one | a window killed `max_retries` times, or raised        | each image      | alone, nothing beside   |
| Rejected   | an image killed `max_retries` times, or raised, alone |                 | a rejected row          |

Ray tries again without end, wherever an actor dies, so deaths are counted in small files beside the shards: what was
noted as worked on when the next attempt begins has died. The files are there only while a shard is being made, or a
model loaded. A note is a file replaced, which a disk may take milliseconds for and an object store more; hence the
first state.
"""

import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from stic_ray.core.errors import StageError, UserError, type_and_message
from stic_ray.core.rundir import NOTES_FAMILY, RunDir

logger = logging.getLogger(__name__)

_WHOLE_SHARD = "shard"
_MAX_DEATHS_ELSEWHERE = 5
"""So many actors may die over a shard while no image is to blame."""
_MAX_TRIES_BESIDE_OTHERS = 30
"""So often an actor may fail to load while others have loaded: half an hour, as it waits for longer and longer."""
_MAX_WAIT_S = 60.0
_LOADED = f"{NOTES_FAMILY}-loaded.json"
"""Is there once an actor has loaded its model."""


class Quarantine:
    """The parts of one shard that are being worked on, and how often an attempt at each ended in death."""

    def __init__(self, output: RunDir, number: int, max_retries: int) -> None:
        """Begin an attempt at shard `number`: what the last one was working on has died."""
        self._output = output
        self._number = number
        self._max_retries = max_retries
        before = output.read_json(notes_name(number))
        self._is_first = before is None
        self.deaths = Counter[str]((before or {}).get("deaths"))
        """By part, without those of the first attempt."""
        self.deaths.update((before or {}).get("working_on"))
        self._working_on: set[str] = set()
        self._lock = threading.Lock()
        if self._is_first:
            self._write([_WHOLE_SHARD])

    def is_suspect(self, window: str, images: Collection[str]) -> bool:
        """Whether a window is to be done one by one."""
        return self.is_deadly(window) or any(self.deaths[image] for image in images)

    def is_deadly(self, part: str) -> bool:
        """Whether a window, or an image alone, has killed too often."""
        return self.deaths[part] >= self._max_retries

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
            (self._output.location / notes_name(self._number)).delete()  # a rerun tries again
            raise StageError(
                f"{self.deaths[what]} actors died while {what} shard {self._number}. A likely cause is too little "
                f"memory for pool.shard_size images."
            )
        with self.working_on(what):
            yield

    def _write(self, working_on: Collection[str]) -> None:
        state = {"working_on": sorted(working_on), "deaths": dict(self.deaths)}
        self._output.write_text(notes_name(self._number), json.dumps(state))


def notes_name(number: int) -> str:
    """Return the file name of the notes on a shard."""
    return f"{NOTES_FAMILY}-{number:06d}.json"


@contextmanager
def loading(output: RunDir, actor: str, num_tries: int) -> Iterator[None]:
    """Load the model of an actor in this block; Ray starts the same actor again after each death.

    A mistake of the user's is raised as it came. Any other error ends the process, so that the next try, a while later,
    has a new one. Raises StageError after `num_tries` deaths or errors, and where others have loaded, after many more.
    """
    note, loaded = output.location / f"{NOTES_FAMILY}-{actor}.json", output.location / _LOADED
    tried = output.read_json(note.name) or {"num_times": 0, "error": None}
    num_times, error = tried["num_times"], tried["error"]
    if num_times >= (max(num_tries, _MAX_TRIES_BESIDE_OTHERS) if loaded.exists() else num_tries):
        note.delete()
        raise StageError(
            f"an actor could not load the model, {num_times} times one after another: {error}"
            if error
            else f"an actor died {num_times} times while it loaded the model. A likely cause is too little memory; "
            "Ray's logs say what ended it."
        )
    if num_times:
        time.sleep(min(2.0**num_times, _MAX_WAIT_S))  # for a hub or a store that asks for patience
    output.write_json(note.name, {"num_times": num_times + 1, "error": None})
    try:
        yield
        loaded.write(b"")
    except (UserError, StageError):
        raise
    except Exception as error:
        message = type_and_message(error)
        logger.warning("an actor could not load the model, it is started again: %s", message)
        output.write_json(note.name, {"num_times": num_times + 1, "error": message})
        os._exit(1)
    finally:  # unless the process has ended
        note.delete()


def nobody_has_loaded(output: RunDir) -> None:
    """Begin a stage: forget that actors of an earlier call have loaded."""
    (output.location / _LOADED).delete()
