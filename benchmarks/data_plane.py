"""The stage `preferences` with a fake engine, against a plain multiprocessing loop that does the same work.

Both read each JPEG, decode it, corrupt half of the images, measure the change, and write pairs with the image as
Parquet (zstd), one file per shard, with as many processes. The loop has no model, no retries, no checks; it is what a
script without Ray would do. The ratio is that of the steady rates: of the second half of the shards, when all
processes have started. The whole time, Ray's start left out but that of the actors included, is given too.

With --side-px 16 and --num-images 10000, 100000, ... it shows that the driver's memory and the time per image do not
grow with the pool.

    nice -n -5 python benchmarks/data_plane.py --quick
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
from fake_stage import draw_pictures, fake_config, make_preferences, write_index
from PIL import Image

from stic_ray.core.preferences import PreferencesConfig
from stic_ray.core.rundir import RunDir, read_shard
from stic_ray.core.schemas import INDEX, PAIRS, table_of
from stic_ray.core.storage import Location
from stic_ray.method.corruption import corrupt, pixel_change
from stic_ray.method.preferences import AnswerText, pair_row, plan_pair
from stic_ray.method.prompts import load_prompts

PROMISE = 0.8
SCRIPT = "rules: [{prompt: step, answer: 'A long answer with seed {seed}.'}]\ndefault: A picture of {size}, {seed}."
SHARED_FILES = 256
"""So many different pictures stand for all images: the page cache of both sides holds them."""


def plain_shard(index: str, output: str) -> tuple[float, int]:
    """Make one shard with PIL and pyarrow; return when it was done, and its rows."""
    config, prompts, rows = PreferencesConfig(), load_prompts(None), []
    facts = {"num_image_tokens": 16, "num_sequence_tokens": 40, "model": "none", "model_revision": "", "seed": 0}
    for row in read_shard(Location.of(index), INDEX).to_pylist():
        encoded = Path(row["path"]).read_bytes()
        picture = Image.open(Path(row["path"])).convert("RGB")
        plan = plan_pair(row["image_id"], 0, config, prompts, row["position"])
        change = pixel_change(picture, corrupt(picture, plan.corruption)) if plan.corruption else None
        answers = [
            AnswerText(f"A long answer with seed {row['position']}.", 6, "stop"),
            AnswerText("Short.", 1, "stop"),
        ]
        image = {"bytes": encoded, "path": row["path"]}
        identity = {"image_id": row["image_id"], "position": row["position"], "image": image}
        rows.append({**identity, **pair_row(plan, *answers), "pixel_change": change, **facts})
    pq.write_table(table_of(rows, PAIRS), output, compression="zstd", use_dictionary=False, row_group_size=256)
    return time.monotonic(), len(rows)


def plain_loop(run: RunDir, output: Path, num_processes: int) -> dict[str, float]:
    """Make all shards; return the rate over all of them, and over the second half."""
    output.mkdir()
    shards = [shard.path for shard in (run / "pool").shards("index")]
    began_s = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        jobs = [pool.apply_async(plain_shard, (path, str(output / Path(path).name))) for path in shards]
        done = sorted(job.get() for job in jobs)
    half = len(done) // 2
    steady = sum(rows for _, rows in done[half:]) / (done[-1][0] - done[half - 1][0])
    return {"rows_per_s": sum(rows for _, rows in done) / (done[-1][0] - began_s), "steady_rows_per_s": steady}


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-images", type=int, default=16384)
    parser.add_argument("--side-px", type=int, default=512)
    parser.add_argument("--shard-size", type=int, default=128)
    parser.add_argument("--num-processes", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="4,096 images")
    options = parser.parse_args()
    num_images = 4096 if options.quick else options.num_images
    actors = {"num_actors": options.num_processes, "batch_size": 16}
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir.of(f"{folder}/run")
        pictures = draw_pictures(Path(folder, "pictures"), SHARED_FILES, options.side_px)
        write_index(run, pictures, num_images, options.shard_size)
        config = fake_config(Path(folder), SCRIPT, shard_size=options.shard_size, **actors)
        plain = plain_loop(run, Path(folder, "plain"), options.num_processes)
        stage = make_preferences(config, run)
    result = {
        "name": "data_plane",
        "ratio": stage["steady"]["rows_per_s"] / plain["steady_rows_per_s"],
        "promise": PROMISE,
        "ratio_of_whole_time": stage["rows_per_s"] / plain["rows_per_s"],
        "num_images": num_images,
        "side_px": options.side_px,
        "shard_size": options.shard_size,
        "num_processes": options.num_processes,
        "plain": plain,
        "stage": stage,
        "driver_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "load_average": os.getloadavg(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
