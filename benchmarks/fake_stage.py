"""A pool of pictures and a fake engine, for the benchmarks that measure what is around the model."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stic_ray.core.config import RunConfig
from stic_ray.core.overrides import build_config
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import INDEX, table_of
from stic_ray.core.steps import StepRun
from stic_ray.method.images import image_id
from stic_ray.stages import cluster


def draw_pictures(folder: Path, number: int, side_px: int) -> list[Path]:
    """Write JPEGs as large as photographs: about 100 kB at 512 px."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    paths = [folder / f"{index:05d}.jpg" for index in range(number)]
    for path in paths:
        coarse = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        picture = np.asarray(coarse.resize((side_px, side_px), Image.Resampling.BICUBIC), dtype=np.int16)
        noise = random.integers(-8, 9, picture.shape, dtype=np.int16)
        Image.fromarray(np.clip(picture + noise, 0, 255).astype(np.uint8)).save(path, quality=85)
    return paths


def write_index(run: RunDir, pictures: Sequence[Path], num_images: int, shard_size: int) -> None:
    """Write the index of so many images, which share the given files, as a finished stage `pool` leaves it."""
    side_px = Image.open(pictures[0]).width
    facts = {
        "row": None,
        "offset": None,
        "perceptual_hash": None,
        "width_px": side_px,
        "height_px": side_px,
        "format": "JPEG",
        "mode": "RGB",
    }
    contents = [path.read_bytes() for path in pictures]
    for number, start in enumerate(range(0, num_images, shard_size)):
        rows: list[dict[str, Any]] = []
        for position in range(start, min(start + shard_size, num_images)):
            file = position % len(pictures)
            rows.append(
                {"image_id": image_id(contents[file]), "position": position, "path": str(pictures[file]), **facts}
            )
            rows[-1]["num_bytes"] = len(contents[file])
        (run / "pool").write_shard("index", number, table_of(rows, INDEX), INDEX)
    extent = {"first_shard": 0, "first_position": 0, "num_rows": num_images}
    (run / "pool").write_manifest({"stage": "pool", "num_rows_written": num_images, "extents": [extent]})


def fake_config(folder: Path, script: str, *, shard_size: int, **actors: Any) -> RunConfig:
    """Return a run with a fake engine that follows `script`, and with the given settings of its actors."""
    (folder / "script.yaml").write_text(script)
    model = {"engine": "fake", "path": str(folder / "script.yaml")}
    return build_config({"name": "benchmark", "model": model, "pool": {"shard_size": shard_size}, "actors": actors})


def make_preferences(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Run the stage `preferences` over the index that is there, and return the figures of its manifest."""
    os.environ.update(cluster.process_environment(config))
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 is for other people's work, and no baseline's
    from stic_ray.stages.preferences import build_preferences

    with cluster.connected(config):
        accounts = build_preferences(StepRun("preferences", config, run / "preferences", {"index": run / "pool"}))
    assert not accounts["num_rows_rejected"], accounts
    return accounts["throughput"]
