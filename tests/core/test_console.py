"""What a command shows: lines of ours in a file, and a bar for those of progress on a terminal."""

import io
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stic_ray.core import console

OURS = logging.getLogger("stic_ray.stages.some")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("stic_ray")
    before = (root.handlers[:], root.level, ours.handlers[:], ours.level, ours.propagate)
    yield
    root.handlers, root.level, ours.handlers, ours.level, ours.propagate = before


def say() -> None:
    OURS.info("pool: started")
    OURS.debug("pool: 1/4 shards, 8 rows, 3.0 rows/s, 9 s left")
    OURS.info("pool: 2/4 shards, 16 rows, 3.0 rows/s, 6 s left")
    OURS.info("pool: 4/4 shards, 32 rows, 3.0 rows/s, 0 s left")
    logging.getLogger("other").info("a plan")
    OURS.debug("a detail")


def test_a_file_has_lines() -> None:
    stream = io.StringIO()
    console.configure(stream)
    say()
    assert [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()] == [
        "pool: started",
        "pool: 2/4 shards, 16 rows, 3.0 rows/s, 6 s left",
        "pool: 4/4 shards, 32 rows, 3.0 rows/s, 0 s left",
    ]


def test_a_terminal_has_a_bar_with_rate_and_time_left() -> None:
    stream = Terminal()
    console.configure(stream)
    say()
    shown = stream.getvalue()
    assert "pool: started\n" in shown and "a plan" not in shown and "a detail" not in shown
    for part in ("pool  25%|", "1/4 shards", "3.0 rows/s, 9 s left", "100%|####", "4/4 shards"):
        assert part in shown
    assert shown.endswith("\n"), "the next line does not stand in the bar"


def test_another_stage_and_a_training_get_bars_of_their_own() -> None:
    stream = Terminal()
    console.configure(stream)
    OURS.info("pool: 1/4 shards, 8 rows, 9 s left")
    OURS.info("dpo: step 3/60, loss 0.31, 80.0 rows/s, 57 s left")
    OURS.info("dpo: step 15, held out: loss 0.40")
    shown = stream.getvalue()
    assert "dpo   5%|" in shown and "3/60 steps, loss 0.31, 80.0 rows/s, 57 s left" in shown
    assert "held out" in shown


def test_lines_of_other_processes_are_shown_when_they_are_ours() -> None:
    command = (
        "import logging; from stic_ray.core.console import configure_worker; configure_worker();"
        "log = logging.getLogger('stic_ray.stages.training'); log.info('dpo: step 2/9, loss 1'); print('noise');"
        "log.warning('two\\nlines'); logging.getLogger('ray').error('trace')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, env=environment)
    stream = io.StringIO()
    console.configure(stream)
    for line in (done.stdout + done.stderr).splitlines():
        console.show(line)
    assert [line.split(" ", 1)[1] for line in stream.getvalue().splitlines()] == ["dpo: step 2/9, loss 1", "two lines"]
