"""How far a stage is, how fast, and how busy its actors are: log lines, a summary for the manifest, Ray metrics."""

import logging
import time
from collections import deque
from typing import Any

from stic_ray.engines.guarded import Work

logger = logging.getLogger(__name__)

_LOG_EVERY_S = 10.0
_NUM_LOGGED_FOR_RATES = 12
"""Rates are those of the last so many log lines: what a stage does now, without its start."""


class Progress:
    """Adds up what the shards of a stage report."""

    def __init__(self, stage: str, num_shards: int) -> None:
        """Begin with nothing done of so many shards."""
        self.stage, self.num_shards = stage, num_shards
        self.num_done = self.num_rows = 0
        self.work = Work()
        self.start_s = self.logged_s = time.monotonic()
        self.first_shard_s = 0.0
        """Seconds until the first shard was finished: start-up, mostly."""
        self._halfway = (self.start_s, 0, Work())
        self._logged = deque([(self.start_s, 0, 0, Work())], maxlen=_NUM_LOGGED_FOR_RATES)

    def advance(self, num_rows: int, work: Work) -> None:
        """Count one more shard, and log every few seconds and at the end."""
        now_s = time.monotonic()
        self.num_done += 1
        self.num_rows += num_rows
        self.work += work
        self.first_shard_s = self.first_shard_s or now_s - self.start_s
        if self.num_done == self.num_shards // 2:
            self._halfway = (now_s, self.num_rows, self.work)
        every_s = _LOG_EVERY_S / 20 if logger.isEnabledFor(logging.DEBUG) else _LOG_EVERY_S  # a terminal has a bar
        if now_s - self.logged_s >= every_s or self.num_done == self.num_shards:
            self.logged_s = now_s
            self._log(now_s)

    def summary(self) -> dict[str, Any]:
        """Return the figures of the whole stage for its manifest, and as `steady` those of its second half."""
        now_s = time.monotonic()
        halfway_s, num_rows, work = self._halfway
        return {
            "seconds_to_first_shard": round(self.first_shard_s, 3),
            **_figures(now_s - self.start_s, self.num_rows, self.work),
            "steady": _figures(now_s - halfway_s, self.num_rows - num_rows, self.work - work),
        }

    def _log(self, now_s: float) -> None:
        then_s, num_done, num_rows, work = self._logged[0]
        seconds = now_s - then_s
        recent = self.work - work
        left_s = seconds / (self.num_done - num_done) * (self.num_shards - self.num_done)
        self._logged.append((now_s, self.num_done, self.num_rows, self.work))
        line = f"{self.num_done}/{self.num_shards} shards, {self.num_rows} rows"
        line += f", {(self.num_rows - num_rows) / seconds:.1f} rows/s"
        if recent.num_calls:
            line += f", {recent.num_tokens / seconds:.0f} tokens/s, {recent.requests_per_call:.1f} requests a call"
            line += f", {recent.requests_in_flight:.1f} in flight per actor, actors {recent.utilisation:.0%} busy"
        logger.info("%s: %s, %.0f s left", self.stage, line, left_s)


def _figures(seconds: float, num_rows: int, work: Work) -> dict[str, float]:
    figures = {"seconds": seconds, "num_rows": num_rows, "rows_per_s": num_rows / seconds}
    if work.num_calls:
        figures |= {"tokens_per_s": work.num_tokens / seconds, "utilisation": work.utilisation}
        figures |= {"requests_per_call": work.requests_per_call, "requests_in_flight": work.requests_in_flight}
    return {name: round(value, 3) for name, value in figures.items()}


class ActorMetrics:
    """The same as Ray metrics, from inside an actor; every one carries the tag `stage`."""

    def __init__(self, stage: str) -> None:
        """Register the metrics; Ray exports them as ray_stic_*."""
        from ray.util.metrics import Counter, Gauge, Histogram  # only where something runs

        kinds = {"tag_keys": ("stage",)}
        self._rows = Counter("stic_rows", "Rows that shards were finished with", **kinds)
        self._tokens = Counter("stic_generated_tokens", "Tokens that the model generated", **kinds)
        self._requests = Counter("stic_requests", "Requests that the model answered", **kinds)
        self._utilisation = Gauge("stic_actor_utilisation", "Share of time inside the engine, last shard", **kinds)
        self._in_flight = Gauge("stic_requests_in_flight", "Mean requests inside the engine, last shard", **kinds)
        self._call_size = Histogram(
            "stic_requests_per_call", "Requests that an engine call held", boundaries=[2**n for n in range(12)], **kinds
        )
        for metric in vars(self).values():
            metric.set_default_tags({"stage": stage})

    def record(self, num_rows: int, work: Work) -> None:
        """Add what one shard took."""
        for counter, amount in (
            (self._rows, num_rows),
            (self._tokens, work.num_tokens),
            (self._requests, work.num_requests),
        ):
            if amount:  # Ray refuses to add nothing
                counter.inc(amount)
        if not work.num_calls:
            return
        self._utilisation.set(work.utilisation)
        self._in_flight.set(work.requests_in_flight)
        self._call_size.observe(work.requests_per_call)
