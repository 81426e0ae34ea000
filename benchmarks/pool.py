"""Building the pool's index: memory of the driver and time per image, from 10^4 to 10^6 images; and looking again.

Writes Parquet files of tiny PNGs (8 px, each of another colour), builds the index of each pool in a process of its
own, and reads the peak memory (VmHWM) of that process, the driver, and what it had once Ray was connected. The promise
is that a hundred times the images take no more than 1.25 times the driver's memory; the ratio of the times per image
is printed beside it. With --near-duplicates the pools are checked for near-duplicates, too.

With --repeat it measures what a command that is repeated over a finished pool does first: comparing the source, single
files in folders of 1,000, with the listing. The promise is 30 s at the largest size, and a time that is linear.

    python benchmarks/pool.py --quick
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

PROMISE = 0.8
"""Driver memory at the smallest pool over that at the largest."""
REPEAT_S = 30.0
"""What looking at a source of the largest size again may take."""
_PER_FILE = 2500
_HERE = Path(__file__)


def main() -> None:
    """Measure every size and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10^4 and 10^5 images only")
    parser.add_argument("--sizes", help="numbers of images, smallest first, in place of 10^4, 10^5, 10^6")
    parser.add_argument("--near-duplicates", type=int, metavar="BITS", help="set pool.near_duplicate_bits")
    parser.add_argument("--repeat", action="store_true", help="measure a repeated command in place of building")
    parser.add_argument("--build", nargs=2, metavar=("SOURCE", "RUN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.build:
        source_folder, run_folder = options.build
        print(json.dumps(build(source_folder, run_folder, options.near_duplicates)))
        return
    sizes = [int(size) for size in (options.sizes or "10000,100000,1000000").split(",")]
    sizes = sizes[:2] if options.quick else sizes
    if options.repeat:
        print(json.dumps(repeat(sizes)))
        return
    pools = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            source = write_source(Path(folder) / f"{size}", size)
            command = [sys.executable, str(_HERE), "--build", str(source), f"{folder}/run-{size}"]
            if options.near_duplicates is not None:
                command += ["--near-duplicates", str(options.near_duplicates)]
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            measured = json.loads(said.strip().splitlines()[-1])
            assert measured["num_images"] + measured["num_rejected"] == size
            pools.append(measured)
            print(f"{size} images: {measured}", flush=True)
    result = {
        "name": "pool",
        "ratio": pools[0]["peak_mib"] / pools[-1]["peak_mib"],
        "promise": PROMISE,
        "near_duplicate_bits": options.near_duplicates,
        "seconds_per_image_ratio": pools[-1]["ms_per_image"] / pools[0]["ms_per_image"],
        "pools": pools,
    }
    print(json.dumps(result))


def build(source: str, run: str, near_duplicate_bits: int | None) -> dict[str, float]:
    """Build the pool in this process, the driver, and say what it took."""
    from stic_ray.core.overrides import build_config
    from stic_ray.core.rundir import RunDir
    from stic_ray.core.steps import StepRun
    from stic_ray.stages import cluster
    from stic_ray.stages.pool import build_pool

    pool = {"source": source, "shard_size": 1024, "near_duplicate_bits": near_duplicate_bits}
    config = build_config({"name": "benchmark", "pool": pool})
    with cluster.connected(config):
        connected_mib = memory_mib("VmRSS")
        began_s = time.perf_counter()
        accounts = build_pool(StepRun("pool", config, RunDir.of(run) / "pool"))
        seconds = time.perf_counter() - began_s
    num_images, num_rejected = accounts["num_rows_written"], accounts["num_rows_rejected"]
    return {
        "num_images": num_images,
        "num_rejected": num_rejected,
        "seconds": round(seconds, 2),
        "ms_per_image": round(1000 * seconds / accounts["num_rows_in"], 4),
        "connected_mib": connected_mib,
        "peak_mib": memory_mib("VmHWM"),
    }


def repeat(sizes: list[int]) -> dict[str, object]:
    """List sources of so many files each, and time what a repeated command does with them."""
    from stic_ray.core.overrides import build_config
    from stic_ray.core.rundir import RunDir
    from stic_ray.stages import listing
    from stic_ray.stages.pool import takes_in_more

    seconds = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            for number in range(size):
                name = Path(folder) / "source" / f"{number // 1000:06d}" / f"{number:09d}.jpg"
                if number % 1000 == 0:
                    name.parent.mkdir(parents=True)
                name.touch()
            config = build_config({"name": "benchmark", "pool": {"source": f"{folder}/source"}})
            pool = RunDir.of(f"{folder}/pool")
            listing.write_listing(config.pool, pool, pool)
            pool.write_manifest({"num_listing_shards": len(pool.shards(listing.FAMILY)), "num_rows_written": size})
            began_s = time.perf_counter()
            assert not takes_in_more(config, pool, has_trained=False)
            seconds[size] = round(time.perf_counter() - began_s, 2)
            print(f"{size} files: {seconds[size]} s", flush=True)
    first, *_, last = seconds
    return {
        "name": "pool, repeated command",
        "ratio": REPEAT_S / seconds[last],
        "promise": 1.0,
        "seconds_per_file_ratio": round(seconds[last] / last / (seconds[first] / first), 2),
        "seconds": seconds,
    }


def memory_mib(name: str) -> float:
    """Return a memory figure of this process from Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return round(int(line.split()[1]) / 1024, 1)


def write_source(folder: Path, number: int) -> Path:
    """Write so many different tiny PNGs as Parquet files."""
    folder.mkdir()
    for first in range(0, number, _PER_FILE):
        images = [_png(index) for index in range(first, min(first + _PER_FILE, number))]
        pq.write_table(pa.table({"image": images}), folder / f"{first:08d}.parquet", compression="none")
    return folder


def _png(index: int) -> bytes:
    buffer = io.BytesIO()
    pixels = index.to_bytes(4, "big") * 48
    Image.frombytes("RGB", (8, 8), pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
