"""An epoch over pairs as a training worker reads them: memory, disk and speed, against `datasets` on the same files.

Ours reads row groups from the Parquet files in a seeded order; `datasets` copies all files into an Arrow file on the
worker's disk first, and picks rows there. Each runs in a process of its own, over a small and a large number of pairs;
the small one already fills the row groups that a worker holds at once, 16 of 256. Memory is what the process has to
itself (RssAnon), without the pages of a mapped file, which the system may drop.

    python benchmarks/training_data.py --quick
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datasets import load_dataset
from PIL import Image
from torch.utils.data import RandomSampler

from stic_ray.core.config import RunConfig
from stic_ray.core.overrides import build_config
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import PAIRS, table_of
from stic_ray.method.images import encode_png
from stic_ray.stages.training.data import num_lanes, read_pairs
from stic_ray.stages.training.index import index_pairs
from stic_ray.toyworld import WEIGHTS

PROMISE = 1.1
"""Most that memory may grow by from the small to the large number of pairs."""
SIDES = ("ours", "datasets")
_COLUMNS = ["image", "prompt", "chosen", "rejected"]


def main() -> None:
    """Measure and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-pairs", type=int, default=50_000, help="the large number; the small one is a tenth")
    parser.add_argument("--side-px", type=int, default=64, help="of the pictures, noise that nothing compresses")
    parser.add_argument("--global-batch", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="20,000 pairs, and 5,000")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(read_epoch(options)))
        return
    sizes = [5_000, 20_000] if options.quick else [options.num_pairs // 10, options.num_pairs]
    measured: dict[str, dict[str, Any]] = {}
    for num_pairs in sizes:
        with tempfile.TemporaryDirectory() as folder:
            num_bytes = write_pairs(Path(folder) / "pairs", num_pairs, options.side_px)
            for side in SIDES:
                name = f"{side}, {num_pairs:,} pairs"
                measured[name] = {"parquet_mib": num_bytes / 2**20, **run_in_process(options, side, folder)}
                print(name, json.dumps(measured[name]))
    small, large = (measured[f"ours, {num_pairs:,} pairs"] for num_pairs in sizes)
    ratio = large["peak_mib"] / small["peak_mib"]
    facts = {"num_lanes": num_lanes(options.global_batch), "measured": measured}
    print(json.dumps({"name": "training_data", "ratio": ratio, "promise": PROMISE, **facts}))


def run_in_process(options: argparse.Namespace, side: str, folder: str) -> dict[str, Any]:
    """Read an epoch in a fresh process and return what it measured."""
    command = [sys.executable, __file__, "--side", side, "--folder", folder]
    command += ["--global-batch", str(options.global_batch)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def read_epoch(options: argparse.Namespace) -> dict[str, Any]:
    """Decode every picture of an epoch once."""
    before_mib = memory_mib()
    began_s = time.perf_counter()
    rows = ours(options) if options.side == "ours" else those_of_datasets(options)
    peak_mib, first_s, number = 0.0, 0.0, 0
    for number, row in enumerate(rows, 1):
        row["image"].load()
        first_s = first_s or time.perf_counter() - began_s
        if number % 50 == 0:
            peak_mib = max(peak_mib, memory_mib())
    seconds = time.perf_counter() - began_s - first_s
    cache = sum(file.stat().st_size for file in (options.folder / "cache").rglob("*") if file.is_file())
    return {
        "peak_mib": round(peak_mib, 1),
        "before_mib": round(before_mib, 1),
        "disk_mib": round(cache / 2**20, 1),
        "seconds_to_first_row": round(first_s, 2),
        "rows_per_s": round((number - 1) / seconds, 1),
    }


def ours(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows as a training worker gets them."""
    settings = {"model": {"path": str(WEIGHTS)}, "dpo": {"global_batch": options.global_batch}}
    config: RunConfig = build_config({"name": "benchmark", **settings})
    shards = RunDir.of(str(options.folder / "pairs")).shards("pairs")
    trained, _ = read_pairs(config, index_pairs(config, shards))
    yield from (trained[number] for number in range(len(trained)))


def those_of_datasets(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the rows of the same files in a random order from the Arrow copy."""
    files = str(options.folder / "pairs" / "*.parquet")
    cache = str(options.folder / "cache")
    rows: Any = load_dataset("parquet", data_files=files, split="train", columns=_COLUMNS, cache_dir=cache)
    yield from (rows[number] for number in RandomSampler(rows))


def write_pairs(folder: Path, num_pairs: int, side_px: int) -> int:
    """Write pairs with pictures of noise in shards of 256; return their bytes."""
    generator = np.random.default_rng(0)
    run = RunDir.of(str(folder))
    for number, start in enumerate(range(0, num_pairs, 256)):
        rows = []
        for position in range(start, min(start + 256, num_pairs)):
            noise = generator.integers(0, 255, (side_px, side_px, 3), dtype=np.uint8)
            rows.append(
                {
                    **{name: 0 for name in PAIRS.names if PAIRS.field(name).type == "int64"},
                    **{name: "x" for name in PAIRS.names if PAIRS.field(name).type == "string"},
                    "image_id": f"{position:032x}",
                    "position": position,
                    "image": {"bytes": encode_png(Image.fromarray(noise)), "path": None},
                    "prompt": [{"role": "user", "content": "Describe the picture."}],
                    "chosen": [{"role": "assistant", "content": "Noise of every colour. " * 20}],
                    "rejected": [{"role": "assistant", "content": "A dog on a beach. " * 20}],
                }
            )
        run.write_shard("pairs", number, table_of(rows, PAIRS), PAIRS)
    return sum(file.stat().st_size for file in folder.glob("*.parquet"))


def memory_mib() -> float:
    """Return what this process has to itself."""
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) / 1024


if __name__ == "__main__":
    main()
