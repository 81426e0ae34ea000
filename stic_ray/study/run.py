"""The runs of a study: sources first, then cells, a few at a time; what is done is skipped, what fails is a row."""

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from stic_ray.core.config import RunConfig
from stic_ray.core.rundir import RunDir
from stic_ray.report.formats import duration
from stic_ray.study.plan import SCORING, SOURCE_STEPS, Cell, Source, Study
from stic_ray.study.processes import DONE, FAILED, NOT_RUN, PIPELINE, Children, Outcome, outcome_of

logger = logging.getLogger(__name__)

SETTINGS = "settings.yaml"
"""The configuration that a run is given."""
LOG = "log.txt"
OUTCOME = "outcome.json"
"""How the last attempt at a run ended."""


def run_study(
    study: Study, home: RunDir, *, parallel: int = 1, entry: Sequence[str] = PIPELINE, children: Children | None = None
) -> None:
    """Make all runs that are not done. A run that fails leaves an outcome.json; only a stop of the study raises."""
    runner = _Runner(home, tuple(entry), children or Children(), parallel)
    runner.all_of([lambda s=s: runner.source(s) for s in study.sources if not source_is_done(home / s.folder)])
    cells = [cell for cell in study.cells if not cell_is_done(home / cell.folder)]
    runner.progress = _Progress(len(study.cells), cells, parallel)
    if len(cells) < len(study.cells):
        logger.info("%d of %d cells are already done, skipped", len(study.cells) - len(cells), len(study.cells))
    runner.all_of([lambda c=c: runner.cell(c) for c in cells])


def cell_is_done(run: RunDir) -> bool:
    """Whether a cell's scores and report are there."""
    return (run / SCORING).manifest is not None and (run.location / "report.html").exists()


def source_is_done(run: RunDir) -> bool:
    """Whether a source's pairs and the base model's scores are there."""
    return all((run / stage).manifest is not None for stage in SOURCE_STEPS)


def outcome(run: RunDir, *, is_done: bool) -> tuple[str, str | None]:
    """Return status and error of a run, as it is now or as its last attempt ended."""
    if is_done:
        return DONE, None
    told: dict[str, Any] = run.read_json(OUTCOME) or {}
    if not told or told["status"] == DONE:  # done once, and something was deleted since
        return NOT_RUN, None
    return told["status"], told["error"]


@dataclass
class _Progress:
    """How many cells have ended, and how long the others may take."""

    total: int
    waiting: list[Cell]
    parallel: int
    seconds: list[tuple[int, float]] = field(default_factory=list)
    """Size and seconds of each cell that was made."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def ended(self, cell: Cell, result: Outcome) -> str:
        with self.lock:
            self.waiting = [other for other in self.waiting if other is not cell]
            if result.status == DONE:
                self.seconds.append((cell.size, result.seconds))
            text = f"{self.total - len(self.waiting)} of {self.total} ended"
            guesses_s = [self._guess_s(other.size) for other in self.waiting]
            known_s = [guess_s for guess_s in guesses_s if guess_s is not None]
            if not known_s or len(known_s) < len(guesses_s):
                return text
            return f"{text}, about {duration(sum(known_s) / self.parallel)} left"

    def _guess_s(self, size: int) -> float | None:
        """Return what a cell may take: the mean of its size, or the line through two sizes; None without them."""
        sizes = sorted({known for known, _ in self.seconds})
        means = {known: float(np.mean([s for n, s in self.seconds if n == known])) for known in sizes}
        if size in means:
            return means[size]
        if len(sizes) < 2:
            return None
        (first, second), (first_s, second_s) = sizes[-2:], (means[known] for known in sizes[-2:])
        return max(second_s, first_s + (size - first) * (second_s - first_s) / (second - first))


class _Runner:
    def __init__(self, home: RunDir, entry: tuple[str, ...], children: Children, parallel: int) -> None:
        self.home, self.entry, self.children, self.parallel = home, entry, children, parallel
        self.progress = _Progress(0, [], parallel)

    def all_of(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run the tasks, `parallel` at a time. An error of the study's own stops all of them."""
        with ThreadPoolExecutor(self.parallel) as pool:
            futures = [pool.submit(task) for task in tasks]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:  # Ctrl-C too: leaving the pool waits for every run, which would go on for hours
                for future in futures:
                    future.cancel()
                self.children.stop()
                raise

    def source(self, source: Source) -> None:
        logger.info("source %s: started", source.name)
        result = self._make(self.home / source.folder, source.config, SOURCE_STEPS, source_is_done)
        _log(f"source {source.name}", result, "")

    def cell(self, cell: Cell) -> None:
        run = self.home / cell.folder
        lack = self._lack(cell)
        if lack is None:
            logger.info("cell %s: started", cell.name)
            result = self._make(run, cell.config, (), cell_is_done)
        else:
            result = Outcome(FAILED, lack, 0.0)
            run.write_json(OUTCOME, asdict(result))
        _log(f"cell {cell.name}", result, f"; {self.progress.ended(cell, result)}")

    def _lack(self, cell: Cell) -> str | None:
        """Say what the source does not have that a cell needs."""
        source = self.home / f"sources/{cell.source}"
        if not source_is_done(source):
            return f"its source {cell.source} is not done: {outcome(source, is_done=False)[1]}"
        num_images = ((source / SOURCE_STEPS[0]).manifest or {}).get("num_rows_written", 0)
        if num_images < cell.size:
            return f"the pool has {num_images} images, fewer than {cell.size}; give sizes up to {num_images}"
        return None

    def _make(
        self, run: RunDir, config: RunConfig, stages: Sequence[str], is_done: Callable[[RunDir], bool]
    ) -> Outcome:
        """Run the pipeline in a process of its own, and keep its log and its outcome."""
        run.write_text(SETTINGS, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        settings = (run.location / SETTINGS).local_copy()
        command = [*self.entry, "--config", str(settings), "--run", run.uri]
        command += ["--stages", ",".join(stages)] if stages else []
        with tempfile.TemporaryDirectory(prefix="stic_ray_") as folder:
            log = Path((run.location / LOG).path if run.location.is_local else f"{folder}/{LOG}")
            began_s = time.monotonic()
            try:
                returncode = self.children.run(command, log)
            finally:
                if not run.location.is_local and log.exists():
                    (run.location / LOG).write(log.read_bytes())
            result = outcome_of(returncode, log, round(time.monotonic() - began_s, 3))
        if result.status == DONE and not is_done(run):
            result = Outcome(FAILED, "ended without an error, and without all of its results", result.seconds)
        run.write_json(OUTCOME, {**asdict(result), "returncode": returncode})
        return result


def _log(what: str, result: Outcome, progress: str) -> None:
    told = f": {result.error}" if result.error else ""
    logger.info("%s: %s after %s%s%s", what, result.status, duration(result.seconds), progress, told)
