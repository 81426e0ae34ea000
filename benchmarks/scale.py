"""The scheduler at the size of a cluster: up to 10^6 images through 256 actors that wait as long as GPUs would work.

Real are Ray, its data pipeline, the shards, the index that is read, the tables that are written, the account of
attempts. Nothing is decoded and no model answers: an actor waits for as long as a GPU takes for its images (10.6
images/s by default, what VILA² reports of an H100), so that two cores can drive hundreds. Printed are the share of time
in which all of them were at work, and what the driver needs: CPU per shard, and memory.

An actor is a process of its own, of about 115 MiB. Where so many do not fit, one stands for several GPUs with
--gpus-per-actor: as many threads wait, and it holds as many shards.

    python benchmarks/scale.py --num-actors 16 --num-images 100000
"""

import argparse
import json
import logging
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from fake_stage import draw_pictures, write_index
from pool import memory_mib

from stic_ray.core.config import RunConfig
from stic_ray.core.overrides import build_config
from stic_ray.core.publishing import all_families, published
from stic_ray.core.rundir import RunDir, read_shard
from stic_ray.core.schemas import INDEX
from stic_ray.core.storage import Location
from stic_ray.engines.guarded import GuardedEngine
from stic_ray.stages import cluster, flow, shards
from stic_ray.stages.ordering import index_shards
from stic_ray.stages.windows import Rows


class Waiter:
    """A worker that takes as long for a window as GPUs would, and passes its rows on."""

    engine: GuardedEngine | None = None

    def __init__(self, images_per_s: float) -> None:
        """Wait so that so many images pass in a second and thread."""
        self.images_per_s = images_per_s

    def identities(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """Nothing is rejected."""
        raise AssertionError(row["image_id"])

    def prepare(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the row."""
        return row

    def answer(self, prepared: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """Wait, and return the rows."""
        time.sleep(len(prepared) / self.images_per_s)
        return prepared

    def finish(self, prepared: dict[str, Any], answer: dict[str, Any]) -> Rows:
        """Return the row."""
        return {"seen": [answer]}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-actors", type=int, default=256)
    parser.add_argument("--gpus-per-actor", type=int, default=1, help="GPUs that an actor's process stands for")
    parser.add_argument("--num-images", type=int, default=1_000_000)
    parser.add_argument("--shard-size", type=int, default=256)
    parser.add_argument("--images-per-s", type=float, default=10.6, help="of one GPU")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir.of(f"{folder}/run")
        pictures = draw_pictures(Path(folder, "pictures"), 4, 64)
        write_long_index(run, pictures, options.num_images, options.shard_size)
        window = max(1, options.shard_size // 4)
        # A thread of an actor is a GPU; it takes windows, so that a shard is spread over the GPUs of its actor.
        actors = {"num_actors": options.num_actors, "num_cpus": 0.01, "batch_size": window}
        actors |= {"windows_in_flight": options.gpus_per_actor}
        flow._SHARDS_PER_ACTOR *= options.gpus_per_actor  # two for each GPU, as ever
        config = build_config({"name": "scale", "pool": {"shard_size": options.shard_size}, "actors": actors})
        os.environ.update(cluster.process_environment(config))
        os.environ.setdefault("RAY_worker_niceness", "0")
        with cluster.connected(config):
            measured = measure(config, run, options.images_per_s)
    num_gpus = options.num_actors * options.gpus_per_actor
    steady = measured["throughput"]["steady"]
    result = {
        "name": "scale",
        "num_gpus": num_gpus,
        **vars(options),
        "busy_share": steady["rows_per_s"] / (num_gpus * options.images_per_s),
        **measured,
        "load_average": os.getloadavg(),
    }
    print(json.dumps(result))


def write_long_index(run: RunDir, pictures: Sequence[Path], num_images: int, shard_size: int) -> None:
    """Write an index whose shards differ in the positions only, which is soon done for 10^6 images."""
    write_index(run, pictures, shard_size, shard_size)
    pool = run / "pool"
    table = read_shard(pool.shards("index")[0], INDEX)
    column = table.column_names.index("position")
    for number, start in enumerate(range(0, num_images, shard_size)):
        positions = pa.array(range(start, min(start + shard_size, num_images)), pa.int64())
        shard = table.slice(0, len(positions)).set_column(column, INDEX.field("position"), positions)
        pool.write_shard("index", number, shard, INDEX)
    extent = {"first_shard": 0, "first_position": 0, "num_rows": num_images}
    pool.write_manifest({"stage": "pool", "num_rows_written": num_images, "extents": [extent]})


def measure(config: RunConfig, run: RunDir, images_per_s: float) -> dict[str, Any]:
    """Pass the index through the actors, and return what it took of time, of the driver, and of an actor's memory."""
    output = run / "seen"
    parts = index_shards(run / "pool", config.pool.shard_size)
    job = shards.ShardJob(
        stage="seen",
        output=output,
        families={"seen": INDEX},
        load=lambda task: read_shard(Location.of(task.payload["index"]), INDEX),
        make_worker=lambda: Waiter(images_per_s),
    )
    tasks = [shards.ShardTask(part.number, {"index": part.location.uri}) for part in parts]
    connected_mib, cpu_s, began_s = memory_mib("VmRSS"), driver_cpu_s(), time.monotonic()
    throughput = shards.run_shards(job, tasks, config.actors).throughput
    assert throughput is not None
    num_rows = sum(record.num_rows_in_all for record in published(output, "", all_families(job.families)).values())
    assert num_rows == throughput["num_rows"] == run.read_json("pool/manifest.json")["num_rows_written"]
    return {
        "num_shards": len(tasks),
        "seconds": time.monotonic() - began_s,
        "driver_cpu_ms_per_shard": 1000 * (driver_cpu_s() - cpu_s) / len(tasks),
        "driver_connected_mib": connected_mib,
        "driver_peak_mib": memory_mib("VmHWM"),
        "throughput": throughput,
    }


def driver_cpu_s() -> float:
    """Return the CPU time of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
