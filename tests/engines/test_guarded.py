"""What stands around every engine: the time limit, one kind of error, the account."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from PIL import Image

from stic_ray.core.config import ActorsConfig, ModelConfig
from stic_ray.core.errors import EngineError
from stic_ray.engines.base import AnsweredPrompt, Request, Sampling
from stic_ray.engines.guarded import GuardedEngine, Work
from stic_ray.engines.opening import open_engine

RED = Image.new("RGB", (30, 20), (255, 0, 0))
REQUESTS = [Request("x", RED, seed) for seed in range(10)]
SAMPLING = Sampling(5)


def engine(folder: Path, script: str, timeout_s: float | None = None) -> GuardedEngine:
    (folder / "script.yaml").write_text(script)
    model = ModelConfig(engine="fake", path=str(folder / "script.yaml"))
    return open_engine(model, ActorsConfig(timeout_s=timeout_s))


def test_an_engine_that_raises_says_so_and_goes_on(tmp_path: Path) -> None:
    fragile = engine(tmp_path, "faults: [{prompt: bad, happens: raise}]")
    with pytest.raises(EngineError, match="RuntimeError: the script raises at bad"):
        fragile.generate([Request("bad", RED)], SAMPLING)
    assert len(fragile.generate(REQUESTS, SAMPLING)) == 10


@pytest.mark.parametrize(
    ("script", "last_words"),
    [
        ("faults: [{happens: hang}]", "Timeout (0:00:0"),
        ("faults: [{happens: lose}]", "ending this process, its engine is lost: the script loses"),
        ("", "survived"),
    ],
)
def test_a_hanging_or_lost_engine_ends_its_process_and_no_other(script: str, last_words: str, tmp_path: Path) -> None:
    """The last one lives on for longer than the limit, after its call."""
    (tmp_path / "script.yaml").write_text(script)
    code = (
        "import sys, time; from tests.engines.test_guarded import *\n"
        f"model = ModelConfig(engine='fake', path={str(tmp_path / 'script.yaml')!r})\n"
        "open_engine(model, ActorsConfig(timeout_s=1.0)).generate(REQUESTS, SAMPLING)\n"
        "time.sleep(1.2); sys.exit('survived')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and last_words in done.stderr
    assert ("survived" in done.stderr) == (last_words == "survived")


def test_answers_that_are_scored_count_as_requests(tmp_path: Path) -> None:
    guarded = engine(tmp_path, "")
    assert guarded.score_answers([]) == guarded.score_tokens([]) == []
    guarded.score_answers([AnsweredPrompt("q", None, ("a", "b")), AnsweredPrompt("r", None, ("c",))])
    work = guarded.take_work()
    assert (work.num_calls, work.num_requests, guarded.num_answered) == (1, 3, 3)


def test_the_account_counts_time_once_and_requests_each(tmp_path: Path) -> None:
    """Two threads at once: the engine is busy as long as one of them is inside, requests wait in both."""
    slow = engine(tmp_path, "seconds_per_batch: 0.2")
    begin = threading.Barrier(2)

    def ask() -> None:
        begin.wait()
        slow.generate(REQUESTS, SAMPLING)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    work = slow.take_work()
    assert 0.4 <= work.busy_s <= work.elapsed_s
    assert work.request_s >= 10 * (0.2 + 0.4) and work.requests_in_flight <= 20
    assert (work.num_calls, work.requests_per_call) == (2, 10)
    assert slow.take_work().num_requests == 0
    assert work - work == Work() and work + Work() == work
