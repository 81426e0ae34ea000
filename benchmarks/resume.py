"""What a kill costs: kill -9 of driver and actors at half of the shards, the same command again, against a quiet run.

The fake engine notes every request it answers, so that work done twice is counted and not estimated. The ratio is all
requests over those of the quiet run; the promise is 1.05, plus one shard for each actor. Seconds are given too: they
hold two starts of Ray and of the actors.

    nice -n -5 python benchmarks/resume.py --quick
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fake_stage import draw_pictures

from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import PAIRS

JOB = Path(__file__).resolve().parents[1] / "jobs" / "full_pipeline.py"
NUM_ACTORS = 2
BATCH_SIZE = 8


def command(folder: Path, name: str, shard_size: int, seconds_per_batch: float) -> list[str]:
    """Return the command that makes preferences into `folder`/`name`."""
    script = folder / "script.yaml"
    script.write_text(f"seconds_per_batch: {seconds_per_batch}\njournal: {folder / 'journal'}\n")
    settings = {"pool.source": folder / "pictures", "pool.shard_size": shard_size, "model.engine": "fake"}
    settings |= {"model.path": script, "actors.num_actors": NUM_ACTORS, "actors.batch_size": BATCH_SIZE}
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, str(JOB), "--stages", "pool,preferences", "--run", str(folder / name), *given]


def requests_since(journal: Path) -> int:
    """Return how many requests were answered, and forget them."""
    lines = journal.read_text().splitlines()
    journal.unlink()
    return sum(map(int, lines))


def run_until(arguments: list[str], output: Path, num_shards: int | None) -> float:
    """Run a command, killed with all its processes once so many shards are there; return its seconds."""
    began_s = time.monotonic()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None:
        if num_shards is not None and len(list(output.glob("pairs-*.parquet"))) >= num_shards:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.01)
    assert process.returncode == (0 if num_shards is None else -signal.SIGKILL), arguments
    return time.monotonic() - began_s


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=4096)
    parser.add_argument("--shard-size", type=int, default=32)
    parser.add_argument("--seconds-per-batch", type=float, default=0.1)
    parser.add_argument("--quick", action="store_true", help="2,048 images")
    options = parser.parse_args()
    num_images = 2048 if options.quick else options.num_images
    num_shards = -(-num_images // options.shard_size)
    seconds, requests = {}, {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_pictures(folder / "pictures", num_images, side_px=64)
        for run, label, until in (("quiet", "quiet", None), ("run", "killed", num_shards // 2), ("run", "rerun", None)):
            arguments = command(folder, run, options.shard_size, options.seconds_per_batch)
            seconds[label] = run_until(arguments, folder / run / "preferences", until)
            requests[label] = requests_since(folder / "journal")
        pairs = [(RunDir.of(str(folder / run)) / "preferences").read_table("pairs", PAIRS) for run in ("quiet", "run")]
        assert pairs[0].equals(pairs[1]), "the pairs differ from those of the quiet run"
    result = {
        "name": "resume",
        "ratio": (requests["killed"] + requests["rerun"]) / requests["quiet"],
        "promise": 1.05 + NUM_ACTORS / num_shards,
        "requests": requests,
        "seconds": seconds,
        "num_shards": num_shards,
        "num_actors": NUM_ACTORS,
        "load_average": os.getloadavg(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
