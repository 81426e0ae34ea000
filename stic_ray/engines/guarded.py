"""What stands between a stage and its engine: a time limit, one kind of error, an account.

An engine below it must be safe to call from several threads, raise what goes wrong and stay usable after that, or
raise EngineLost where it cannot.
"""

import faulthandler
import logging
import math
import operator
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass

from stic_ray.core.errors import EngineError, EngineLost, SticError, type_and_message
from stic_ray.engines.base import Answer, AnsweredPrompt, Engine, Request, Sampling, Scorer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """What an engine did in a while."""

    elapsed_s: float = 0.0
    """Length of the while; the first one begins with the first call."""
    busy_s: float = 0.0
    """Seconds of it in which at least one call was running."""
    request_s: float = 0.0
    """Seconds that requests spent in calls, over all requests: `request_s / elapsed_s` were in flight on average."""
    num_calls: int = 0
    num_requests: int = 0
    num_tokens: int = 0
    """Generated tokens."""

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: "Work") -> "Work":
        return Work(*map(operator.sub, astuple(self), astuple(other)))

    @property
    def utilisation(self) -> float:
        """Share of the time in which the engine was at work."""
        return self.busy_s / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def requests_in_flight(self) -> float:
        """Mean number of requests inside the engine."""
        return self.request_s / self.elapsed_s if self.elapsed_s else 0.0

    @property
    def requests_per_call(self) -> float:
        """Mean size of a call."""
        return self.num_requests / self.num_calls if self.num_calls else 0.0


class GuardedEngine:
    """An engine, guarded."""

    def __init__(self, engine: Engine, timeout_s: float | None = None) -> None:
        """Guard `engine`; a call longer than `timeout_s` ends the process."""
        self.name = engine.name
        self.revision = engine.revision
        self.count_text_tokens = engine.count_text_tokens
        self.count_added_tokens = engine.count_added_tokens
        self._engine = engine
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._running: dict[int, float] = {}
        """Thread and start of the running calls, the oldest first."""
        self._work = Work()
        self.num_answered = 0
        """Requests since the start: signs of life."""
        self._since_s = self._busy_since_s = math.inf

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        """Answer every request, in order. Raises EngineError for an error that is not one of ours.

        Where the engine is lost or takes too long the process ends: whoever started it notices, and starts another.
        """
        if not requests:
            return []
        with self._call(len(requests)):
            answers = self._engine.generate(requests, sampling)
        num_tokens = sum(answer.num_tokens for answer in answers)
        with self._lock:
            self._work += Work(num_calls=1, num_requests=len(requests), num_tokens=num_tokens)
            self.num_answered += len(requests)
        return answers

    def score_answers(self, asked: Sequence[AnsweredPrompt]) -> list[list[float]]:
        """Return log p of every answer to every prompt; raises and ends as `generate` does."""
        if not asked:
            return []
        assert isinstance(self._engine, Scorer), f"{type(self._engine).__name__} cannot score; checked before work"
        num_answers = sum(len(each.answers) for each in asked)
        with self._call(num_answers):
            logps = self._engine.score_answers(asked)
        with self._lock:
            self._work += Work(num_calls=1, num_requests=num_answers)
            self.num_answered += num_answers
        return logps

    def score_tokens(self, conversations: Sequence[Sequence[dict[str, str]]]) -> list[list[float]]:
        """Return log p of each token of the answers of conversations; raises and ends as `generate` does."""
        if not conversations:
            return []
        assert isinstance(self._engine, Scorer), f"{type(self._engine).__name__} cannot score; checked before work"
        with self._call(len(conversations)):
            logps = self._engine.score_tokens(conversations)
        with self._lock:
            self._work += Work(num_calls=1, num_requests=len(conversations))
            self.num_answered += len(conversations)
        return logps

    def take_work(self) -> Work:
        """Return what was done since the last time this was asked."""
        with self._lock:
            now_s = time.monotonic()
            work, self._work = self._work + Work(elapsed_s=max(now_s - self._since_s, 0.0)), Work()
            self._since_s = now_s
            if self._running:
                work += Work(busy_s=now_s - self._busy_since_s)
                self._busy_since_s = now_s
            return work

    @contextmanager
    def _call(self, num_requests: int) -> Iterator[None]:
        thread, began_s = threading.get_ident(), time.monotonic()
        with self._lock:
            self._since_s = min(self._since_s, began_s)
            if not self._running:
                self._busy_since_s = began_s
            self._running[thread] = began_s
            self._set_alarm()
        try:
            with as_engine_error():
                yield
        except EngineLost as error:
            logger.error("ending this process, its engine is lost: %s", error)
            os._exit(1)
        finally:
            with self._lock:
                ended_s = time.monotonic()
                del self._running[thread]
                self._set_alarm()
                busy_s = 0.0 if self._running else ended_s - self._busy_since_s
                self._work += Work(busy_s=busy_s, request_s=num_requests * (ended_s - began_s))

    def _set_alarm(self) -> None:
        """Have the process ended when the oldest running call reaches its limit.

        By faulthandler: its thread needs no interpreter lock, which a hanging call may hold, and it prints all stacks.
        """
        if self._timeout_s is None:
            return
        if not self._running:
            faulthandler.cancel_dump_traceback_later()
            return
        oldest_s = next(iter(self._running.values()))
        left_s = max(oldest_s + self._timeout_s - time.monotonic(), 0.001)
        faulthandler.dump_traceback_later(left_s, exit=True, file=sys.__stderr__ or sys.stderr)


@contextmanager
def as_engine_error() -> Iterator[None]:
    """Raise EngineError for an error that is not one of ours."""
    try:
        yield
    except SticError:
        raise
    except Exception as error:
        raise EngineError(type_and_message(error)) from error
