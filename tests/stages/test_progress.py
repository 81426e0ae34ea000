"""What a stage logs while it runs, and what Ray exports of it."""

import logging
import time
import urllib.request
from types import SimpleNamespace

import pytest
import ray

from stic_ray.engines.guarded import Work
from stic_ray.stages import shards
from stic_ray.stages.flow import ActorMetrics
from stic_ray.stages.shards import Progress

WORK = Work(elapsed_s=2.0, busy_s=1.5, request_s=8.0, num_calls=2, num_requests=8, num_tokens=80)


def test_figures_are_those_of_the_whole_and_of_the_second_half(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = Progress("preferences", 4)
    for num_rows, work in ((4, WORK), (4, WORK), (4, WORK + WORK), (2, Work())):
        progress.advance(num_rows, work)
    figures = progress.summary()
    assert figures["num_rows"] == 14 and figures["steady"]["num_rows"] == 6
    assert figures["utilisation"] == figures["steady"]["utilisation"] == 0.75
    assert figures["requests_per_call"] == 4.0 and figures["requests_in_flight"] == 4.0
    assert 0 <= figures["seconds_to_first_shard"] <= figures["seconds"]
    [line] = [record.message for record in caplog.records]
    assert line.startswith("preferences: 4/4 shards, 14 rows, ")
    assert line.endswith("4.0 requests a call, 4.0 in flight per actor, actors 75% busy, 0 s left")


def test_a_stage_without_an_engine_logs_its_rows(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = Progress("pool", 1)
    progress.advance(7, Work())
    assert set(progress.summary()["steady"]) == {"seconds", "num_rows", "rows_per_s"}
    assert "busy" not in caplog.text and "7 rows" in caplog.text


def test_rates_and_the_time_left_are_those_of_now(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A minute of loading a model must not make the rest look slow for ever."""
    caplog.set_level(logging.INFO)
    now_s = 1000.0
    monkeypatch.setattr(shards, "time", SimpleNamespace(monotonic=lambda: now_s))
    progress = Progress("preferences", 100)
    now_s += 600.0
    for _ in range(90):
        now_s += 10.0
        progress.advance(20, WORK)
    assert "90/100 shards, 1800 rows, 2.0 rows/s, 8 tokens/s" in caplog.messages[-1]
    assert caplog.messages[-1].endswith(", 100 s left")


@pytest.mark.usefixtures("ray_session")
def test_ray_exports_what_an_actor_records() -> None:
    @ray.remote
    class Actor:
        def __init__(self) -> None:
            self.metrics = ActorMetrics("alone")

        def record(self) -> None:
            self.metrics.record(5, WORK)
            self.metrics.record(3, Work())

    actor = Actor.remote()
    ray.get(actor.record.remote())
    port = ray.nodes()[0]["MetricsExportPort"]
    deadline = time.monotonic() + 60
    found: dict[str, float] = {}
    while found.get("ray_stic_rows_total") != 8 and time.monotonic() < deadline:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        lines = [line for line in text.splitlines() if line.startswith("ray_stic_") and 'stage="alone"' in line]
        found = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}
        time.sleep(0.2)
    assert found["ray_stic_rows_total"] == 8
    assert found["ray_stic_generated_tokens_total"] == 80 and found["ray_stic_requests_total"] == 8
    assert found["ray_stic_actor_utilisation"] == 0.75 and found["ray_stic_requests_in_flight"] == 4.0
    assert found["ray_stic_requests_per_call_count"] == 1, "its sum is Ray's guess from the buckets"
