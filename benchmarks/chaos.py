"""Kills at random moments of a demo-sized run, and the same command again until it is done: nothing may differ.

The undisturbed run comes first. Then, for each kill, a step is drawn and a moment within the time that it took: when
the run is there, the driver alone or every process that it started is killed with SIGKILL, and the command is given
again. When a run is done, its pairs, infused rows, losses of each optimiser step and scores are compared with the
undisturbed run's, to the last bit; kills that are left go into another run. The exit status is 1 when something
differs or the last command fails.

    python benchmarks/chaos.py --kills 10 --seed 1
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq

from stic_ray.core.rundir import RunDir

JOB = Path(__file__).resolve().parents[1] / "jobs" / "full_pipeline.py"
STEPS = ("pool", "preferences", "dpo", "infusion", "sft", "evaluation")
TABLES = {"preferences": ("pairs",), "infusion": ("rows", "text")}
QUICK = {"toyworld.num_pictures": 256, "toyworld.num_instructions": 64, "toyworld.num_scenes": 20}
SETTINGS = {"pool.shard_size": 32, "workers.save_every_steps": 5}
_MEASURED = ("seconds/", "rows_per_second", "tokens_per_second", "peak_memory_gib", "mfu", "runtime", "per_second")
"""Metrics that differ from one run to the next by their nature."""


def start(run: Path, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Start the command, whose output goes behind what the calls before it left in `run`.log."""
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    with open(f"{run}.log", "ab") as log:
        command = [sys.executable, str(JOB), "--run", str(run), *given]
        return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def has_begun(run: Path, step: str, offset: int) -> bool:
    """Whether this call works on a step, or found it finished."""
    log = Path(f"{run}.log").read_bytes()[offset:].decode(errors="replace")
    return any(f"{step}: {word}" in log for word in ("started", "already done"))


def kill(process: subprocess.Popen[bytes], *, everything: bool) -> int:
    """Kill the driver, with all processes that it started or without, and return how many."""
    family = psutil.Process(process.pid).children(recursive=True) if everything else []
    process.kill()
    for each in family:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    process.wait()
    psutil.wait_procs(family)
    return 1 + len(family)


def kill_once(run: Path, settings: dict[str, Any], step: str, after_s: float, *, everything: bool) -> bool:
    """Give the command and kill it so long after a step has begun. Returns False when it ended before."""
    offset = Path(f"{run}.log").stat().st_size if Path(f"{run}.log").exists() else 0
    process = start(run, settings)
    began_s = time.monotonic()
    while process.poll() is None and not has_begun(run, step, offset):
        time.sleep(0.05)
    with suppress(subprocess.TimeoutExpired):
        process.wait(after_s)
    if process.poll() is not None:
        print(f"no kill in {step}: the command ended with status {process.returncode} before", flush=True)
        return False
    num_killed = kill(process, everything=everything)
    whom = f"all {num_killed} processes" if everything else "the driver"
    print(
        f"killed {whom} in {step}, {after_s:.1f} s after its begin, {time.monotonic() - began_s:.1f} s after the "
        "command's",
        flush=True,
    )
    return True


def finish(run: Path, settings: dict[str, Any]) -> float:
    """Give the command, which must succeed, and return its seconds."""
    began_s = time.monotonic()
    status = start(run, settings).wait()
    if status != 0:
        last = Path(f"{run}.log").read_text(errors="replace").splitlines()[-1:]
        raise SystemExit(f"the command ended with status {status}: {' '.join(last)}")
    return time.monotonic() - began_s


def results(run: Path) -> dict[str, Any]:
    """Return what must not differ: tables but for places of pictures and models, metrics but for times, scores."""
    found: dict[str, Any] = {}
    for step, families in TABLES.items():
        folder = RunDir.of(str(run)) / step
        for family in families:
            tables = [pq.read_table(shard.path) for shard in folder.shards(family)]
            found[f"{step}/{family}"] = [_without_path(row) for table in tables for row in table.to_pylist()]
    for step in ("dpo", "sft"):
        lines = [json.loads(line) for line in (run / step / "metrics.jsonl").read_text().splitlines()]
        found[f"{step}/metrics"] = [
            {key: value for key, value in line.items() if not any(part in key for part in _MEASURED)} for line in lines
        ]
    found["evaluation/scores"] = json.loads((run / "evaluation" / "scores.json").read_text())
    return found


def _without_path(row: dict[str, Any]) -> dict[str, Any]:
    if isinstance(row.get("image"), dict):
        row["image"].pop("path", None)
    return {key: value for key, value in row.items() if key not in ("path", "model")}  # places in the run's own folder


def main() -> None:
    """Run, kill, compare, and exit with status 1 when something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="how many (default: 10; 3 with --quick)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of who is killed")
    parser.add_argument("--quick", action="store_true", help="a quarter of the demo's pictures")
    parser.add_argument("--folder", help="where the runs and their logs stay (default: a temporary folder)")
    options = parser.parse_args()
    settings = SETTINGS | (QUICK if options.quick else {})
    draw = random.Random(options.seed)
    num_kills = options.kills or (3 if options.quick else 10)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        quiet = folder / "quiet"
        quiet_s = finish(quiet, settings)
        seconds = {step: json.loads((quiet / step / "manifest.json").read_text())["seconds"] for step in STEPS}
        print(f"undisturbed: {quiet_s:.0f} s; {', '.join(f'{step} {s:.1f} s' for step, s in seconds.items())}")
        expected = results(quiet)
        done, num_runs, differing = 0, 0, set[str]()
        while done < num_kills:  # a run that was done before a kill's moment came leaves kills for another one
            num_runs += 1
            run = folder / f"killed_{num_runs}"
            steps = draw.choices(STEPS, weights=[seconds[step] for step in STEPS], k=num_kills - done)
            for step in sorted(steps, key=STEPS.index):
                after_s, everything = draw.uniform(0.0, seconds[step]), draw.random() < 0.5
                done += kill_once(run, settings, step, after_s, everything=everything)
            last_s = finish(run, settings)
            found = results(run)
            differing |= {name for name in expected if expected[name] != found[name]}
            print(f"run {num_runs}: {done} of {num_kills} kills so far, then done in {last_s:.0f} s", flush=True)
    counts = {name: len(values) for name, values in expected.items()}
    print(f"{done} kills in {num_runs} runs; compared {counts}; differing: {', '.join(sorted(differing)) or 'none'}")
    print(json.dumps({"name": "chaos", "kills": done, "seed": options.seed, "differing": sorted(differing)}))
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
