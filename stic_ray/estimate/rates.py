"""What a run directory tells of speed and sizes: finished stages, and the first shards of its tables."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import yaml

from stic_ray.core.rundir import RunDir, read_shard
from stic_ray.core.schemas import INDEX, PAIRS

STAGES = ("pool", "preferences", "dpo", "infusion", "sft", "evaluation")
_STEADY_S = 10.0
"""The second half of the shards says how fast a stage is without its start, if it lasted so long at least."""


@dataclass(frozen=True)
class Measured:
    """What is known of a run; nothing of one that has not begun."""

    manifests: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of the finished stages."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The configuration that it was last called with."""
    training_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds of a training without its start."""
    image_bytes: float | None = None
    num_image_tokens: float | None = None
    num_answer_tokens: float | None = None

    def num_processes(self, stage: str) -> int | None:
        """Return how many actors or workers a finished stage had, as its configuration says."""
        section, count = ("workers", "num_workers") if stage in ("dpo", "sft") else ("actors", "num_actors")
        return self.config.get(section, {}).get(count)

    def process_s_per_row(self, stage: str) -> float | None:
        """Return the seconds of one process per row in a finished stage; its start is left out where it can be."""
        manifest, processes = self.manifests.get(stage), self.num_processes(stage)
        if manifest is None or not processes:
            return None
        if stage in self.training_s:
            num_rows = manifest.get("num_steps", 0) * self.config.get(stage, {}).get("global_batch", 0)
            return processes * self.training_s[stage] / num_rows if num_rows else None
        figures = manifest.get("throughput") or {}
        steady = figures.get("steady") or {}
        chosen = steady if steady.get("seconds", 0.0) >= _STEADY_S else figures
        return processes / chosen["rows_per_s"] if chosen.get("rows_per_s") else None


def measure(run: RunDir | None) -> Measured:
    """Read what a run tells. Raises OSError when its files cannot be read."""
    if run is None or not run.location.is_folder():
        return Measured()
    found = {stage: (run / stage).manifest for stage in STAGES}
    record = run.location / "config.yaml"
    config = (yaml.safe_load(record.read()) or {}).get("config", {}) if record.exists() else {}
    results = {stage: (run / stage).read_json("result.json") for stage in ("dpo", "sft") if found[stage]}
    index = _means(run / "pool", "index", INDEX, ("num_bytes",))
    pairs = _means(run / "preferences", "pairs", PAIRS, ("num_image_tokens", "num_chosen_tokens"))
    return Measured(
        manifests={stage: manifest for stage, manifest in found.items() if manifest},
        config=config,
        training_s={stage: result["seconds"] for stage, result in results.items() if result and "seconds" in result},
        image_bytes=index.get("num_bytes"),
        num_image_tokens=pairs.get("num_image_tokens"),
        num_answer_tokens=pairs.get("num_chosen_tokens"),
    )


def _means(stage: RunDir, family: str, schema: pa.Schema, columns: tuple[str, ...]) -> dict[str, float]:
    """Return the means of some columns over the first shard, which is a random sample of the images.

    Of a finished stage: the shards of another may be damaged, which its rerun mends.
    """
    shards = stage.shards(family) if stage.manifest else []
    if not shards:
        return {}
    table = read_shard(shards[0], pa.schema([schema.field(name) for name in columns]))
    return {name: sum(table[name].to_pylist()) / table.num_rows for name in columns if table.num_rows}
