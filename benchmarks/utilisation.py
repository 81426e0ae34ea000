"""How busy 32 actors are whose engine sleeps 50 ms a batch, as a GPU would: pictures, Parquet and Ray around it.

A window is two images, four requests, two batches: an actor can do 20 images/s, twice what is published for an H100
(10.6 images/s), and 32 of them 640. The pictures are small, so that decoding them does not need more cores than a
laptop has; benchmarks/data_plane.py has what decoding costs. The share is that of the second half of the shards, when
all actors have started; it is the time inside the engine's calls, and beside it the part of it that was slept.

    nice -n -5 python benchmarks/utilisation.py --quick
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

from fake_stage import draw_pictures, fake_config, make_preferences, write_index

from stic_ray.core.rundir import RunDir

PROMISE = 0.95
SECONDS_PER_BATCH = 0.05
BATCH_SIZE = 2
SCRIPT = f"rules: [{{prompt: step, answer: Chosen.}}]\ndefault: Rejected.\nseconds_per_batch: {SECONDS_PER_BATCH}"


def main() -> None:
    """Measure and print the share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-actors", type=int, default=32)
    parser.add_argument("--num-images", type=int, default=65536)
    parser.add_argument("--shard-size", type=int, default=128)
    parser.add_argument("--windows-in-flight", type=int, default=4)
    parser.add_argument("--side-px", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="32,768 images")
    options = parser.parse_args()
    num_images = 32768 if options.quick else options.num_images
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir.of(f"{folder}/run")
        pictures = draw_pictures(Path(folder, "pictures"), 64, options.side_px)
        write_index(run, pictures, num_images, options.shard_size)
        actors = {"num_actors": options.num_actors, "num_cpus": 0.1, "batch_size": BATCH_SIZE}
        actors |= {"windows_in_flight": options.windows_in_flight}
        config = fake_config(Path(folder), SCRIPT, shard_size=options.shard_size, **actors)
        stage = make_preferences(config, run)
    steady = stage["steady"]
    most_rows_per_s = options.num_actors * BATCH_SIZE / 2 / SECONDS_PER_BATCH
    result = {
        "name": "utilisation",
        "ratio": steady["utilisation"],
        "promise": PROMISE,
        "slept_share": steady["rows_per_s"] / most_rows_per_s,
        "num_actors": options.num_actors,
        "num_images": num_images,
        "seconds_per_batch": SECONDS_PER_BATCH,
        "stage": stage,
        "load_average": os.getloadavg(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
