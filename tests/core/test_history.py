"""Attempts at a step: appended, closed by whoever comes next, added up with the processes that each had."""

from pathlib import Path

import pytest

from stic_ray.core import history
from stic_ray.core.placement import Need
from stic_ray.core.rundir import RunDir

ACTORS = Need("actors", 8, {"CPU": 4.0, "GPU": 1.0})


def test_an_attempt_says_what_it_was_made_with_and_how_it_ended(tmp_path: Path) -> None:
    step = RunDir.of(str(tmp_path))
    assert history.read_attempts(step) == []
    history.begin_attempt(step, ACTORS, 8)
    [begun] = history.read_attempts(step)
    assert begun["ended"] is None and begun["pid"] and begun["host"]
    assert begun["processes"] == {"what": "actors", "num": 8, "CPU": 4.0, "GPU": 1.0}
    assert begun["package_versions"]["pyarrow"] and begun["git_commit"]
    history.end_attempt(step, history.FINISHED, 100)
    history.end_attempt(step, "again")
    [ended] = history.read_attempts(step)
    assert (ended["ended"], ended["num_rows"]) == ("finished", 100)


def test_one_that_was_killed_ends_at_its_last_sign_of_life(tmp_path: Path) -> None:
    step = RunDir.of(str(tmp_path))
    history.begin_attempt(step, ACTORS, 8)
    began_s = history._seconds(history.read_attempts(step)[0]["began_at"])
    history.end_attempt(step, history.KILLED, at=began_s + 90)
    history.begin_attempt(step, ACTORS, 2)
    history.end_attempt(step, history.KILLED, at=began_s - 5)  # killed before its first sign of life
    attempts = history.read_attempts(step)
    assert [attempt["ended"] for attempt in attempts] == ["killed", "killed"]
    took = history.totals(attempts)
    assert (took.num_attempts, took.seconds) == (2, 90)


def test_hours_are_those_of_the_processes_of_each_attempt(tmp_path: Path) -> None:
    step = RunDir.of(str(tmp_path))
    for num, seconds in ((8, 3600.0), (2, 1800.0)):
        history.begin_attempt(step, ACTORS, num)
        began_s = history._seconds(history.read_attempts(step)[-1]["began_at"])
        history.end_attempt(step, history.KILLED, at=began_s + seconds)
    took = history.totals(history.read_attempts(step))
    assert took.seconds == pytest.approx(5400)
    assert (took.core_hours, took.gpu_hours) == (pytest.approx(4 * 9), pytest.approx(9))
    history.begin_attempt(step, ACTORS, 1)
    began_s = history._seconds(history.read_attempts(step)[-1]["began_at"])
    assert history.totals(history.read_attempts(step), began_s + 60).seconds == pytest.approx(5460)


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    step = RunDir.of(str(tmp_path))
    history.begin_attempt(step, ACTORS, 8)
    whole = (step.location / history.ATTEMPTS).read().decode()
    step.write_text(history.ATTEMPTS, whole + '{"began_at": "2026')
    assert len(history.read_attempts(step)) == 1
