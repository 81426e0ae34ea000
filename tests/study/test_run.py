"""What becomes of runs that end well, badly, or not at all: real processes with a stand-in for the pipeline."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from stic_ray.report.formats import duration
from stic_ray.study.processes import DONE, FAILED, Children, Interrupted, Outcome
from stic_ray.study.run import _progress, is_done, outcome, run_study
from tests.study.builders import calls, fake_entry, study_in


def test_a_study_makes_its_source_once_and_all_cells(tmp_path: Path) -> None:
    study, home = study_in(tmp_path, variants={"a": {}, "b": {"dpo.beta": 0.2}})
    run_study(study, home, parallel=2, entry=fake_entry(tmp_path))
    assert [calls(home / source.folder) for source in study.sources] == [1]
    assert all(is_done(cell, home) for cell in study.cells)
    assert not (home.location / study.sources[0].folder / "dpo").exists()


@pytest.mark.parametrize(
    ("trouble", "status", "error"),
    [
        ("sys.exit('error: dpo.beta is wrong')", "failed", "dpo.beta is wrong"),
        ("raise ValueError('too bad')", "failed", "ValueError: too bad"),
        ("os._exit(3)", "failed", "some line before"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "out_of_memory", "killed with signal 9"),
        ("os._exit(137)", "out_of_memory", "killed with signal 9"),
        ("sys.exit('torch.OutOfMemoryError: CUDA out of memory. Tried')", "out_of_memory", "CUDA out of memory"),
        ("sys.exit(0)", "failed", "without all of its results"),
    ],
)
def test_a_cell_that_fails_is_told_and_the_others_go_on(trouble: str, status: str, error: str, tmp_path: Path) -> None:
    study, home = study_in(tmp_path, sizes=(10, 20, 30))
    run_study(study, home, entry=fake_entry(tmp_path, default_n20_seed0=f"sys.stdout.flush(); {trouble}"))
    found = {cell.size: outcome(cell, home) for cell in study.cells}
    assert (found[10], found[30]) == (("done", None), ("done", None))
    assert found[20][0] == status and error in (found[20][1] or "")
    assert "some line before" in (home.location / study.cells[1].folder / "log.txt").read().decode()


def test_a_rerun_makes_only_what_is_not_done(tmp_path: Path) -> None:
    study, home = study_in(tmp_path)
    run_study(study, home, entry=fake_entry(tmp_path, default_n20_seed0="sys.exit('error: no')"))
    (tmp_path / "trouble" / "default-n20-seed0").unlink()
    run_study(study, home, entry=fake_entry(tmp_path))
    assert [calls(home / run.folder) for run in (*study.sources, *study.cells)] == [1, 1, 2]
    assert all(is_done(cell, home) for cell in study.cells)


def test_cells_of_a_source_that_failed_say_so(tmp_path: Path) -> None:
    study, home = study_in(tmp_path, seeds=(0, 1))
    name = study.sources[0].name.replace("-", "_")
    run_study(study, home, entry=fake_entry(tmp_path, **{name: "sys.exit('error: disk full')"}))
    for cell in study.cells:
        status, error = outcome(cell, home)
        assert (status == "done") == (cell.seed == 1)
        assert cell.seed == 1 or f"its source {study.sources[0].name} is not done: disk full" in (error or "")
        assert calls(home / cell.folder) == cell.seed


def test_a_size_that_the_pool_does_not_have_is_a_row(tmp_path: Path) -> None:
    study, home = study_in(tmp_path, sizes=(100, 101))
    run_study(study, home, entry=fake_entry(tmp_path))
    status, error = outcome(study.cells[1], home)
    assert status == "failed" and "the pool has 100 images, fewer than 101" in (error or "")
    assert is_done(study.cells[0], home)


def test_stopping_ends_the_processes_with_their_children(tmp_path: Path) -> None:
    code = (
        "import subprocess; child = subprocess.Popen(['sleep', '60']);"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}\\n'); time.sleep(60)"
    )
    study, home = study_in(tmp_path)
    children = Children()
    entry = fake_entry(tmp_path, default_n10_seed0=code)
    ended: list[BaseException] = []

    def run() -> None:
        try:
            run_study(study, home, entry=entry, children=children)
        except Interrupted as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    pids = _wait_for(tmp_path / "pids")
    children.stop()
    thread.join(20)
    assert len(ended) == 1 and not any(_is_alive(pid) for pid in pids)
    assert outcome(study.cells[0], home) == ("not_run", None)
    assert calls(home / study.cells[1].folder) == 0


def test_a_run_ends_when_its_study_is_killed(tmp_path: Path) -> None:
    """The child sees its input close; nobody is left who could signal it."""
    code = (
        "import threading, time, os; from stic_ray.study import processes;"
        "threading.Thread(target=processes.end_with_the_study, daemon=True).start();"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}}\\n'); time.sleep(60)"
    )
    parent = (
        "import sys; from pathlib import Path; from stic_ray.study.processes import Children;"
        f"Children().run([sys.executable, '-c', {code!r}], Path({str(tmp_path / 'log')!r}))"
    )
    study = subprocess.Popen([sys.executable, "-c", parent])
    (pid,) = _wait_for(tmp_path / "pids")
    study.send_signal(signal.SIGKILL)
    study.wait()
    deadline = time.monotonic() + 10
    while _is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_alive(pid)


def _wait_for(path: Path) -> list[int]:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(word) for word in path.read_text().split()]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_the_time_left_follows_a_line_through_two_sizes(tmp_path: Path) -> None:
    """Cells have fixed costs, so twice the images are not twice the time."""
    study, _ = study_in(tmp_path, sizes=(10, 20, 40), seeds=(0, 1))
    by_size = {size: [cell for cell in study.cells if cell.size == size] for size in (10, 20, 40)}
    ended = {by_size[10][0]: Outcome(DONE, None, 100.0)}
    assert _progress(ended, study.cells, 6, 1) == "1 of 6 ended"
    ended[by_size[20][0]] = Outcome(DONE, None, 110.0)
    assert _progress(ended, study.cells, 6, 1) == f"2 of 6 ended, about {duration(100 + 110 + 2 * 130)} left"
    ended[by_size[40][0]] = Outcome(FAILED, "no disk", 1.0)
    assert _progress(ended, study.cells, 6, 1) == f"3 of 6 ended, about {duration(100 + 110 + 130)} left"
