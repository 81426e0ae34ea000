"""What a run directory tells of speed and sizes: finished steps, and the first shards of their tables."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from stic_ray.core.rundir import RunDir, read_shard
from stic_ray.core.schemas import INDEX, PAIRS
from stic_ray.core.steps import read_record

_STEADY_S = 10.0
"""The second half of the shards says how fast a step is without its start, if it lasted so long at least."""


@dataclass(frozen=True)
class Measured:
    """What is known of a run; nothing of one that has not begun."""

    manifests: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of the finished steps."""
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """What finished trainings say of themselves."""
    image_bytes: float | None = None
    num_image_tokens: float | None = None
    num_answer_tokens: float | None = None

    def process_s_per_row(self, stage: str) -> float | None:
        """Return the seconds of one process per row in a finished step of a stage, its start left out where known.

        Of a step that was interrupted, what its last attempt did, with the processes that this one had.
        """
        name = next((name for name, manifest in self.manifests.items() if manifest.get("stage") == stage), None)
        if name is None:
            return None
        manifest = self.manifests[name]
        num_processes = manifest.get("made_with", {}).get("processes", {}).get("num")
        if not num_processes:
            return None
        if name in self.results:
            return _training_s_per_row(manifest, self.results[name], num_processes)
        figures = manifest.get("throughput") or {}
        steady = figures.get("steady") or {}
        chosen = steady if steady.get("seconds", 0.0) >= _STEADY_S else figures
        return num_processes / chosen["rows_per_s"] if chosen.get("rows_per_s") else None


def _training_s_per_row(manifest: Mapping[str, Any], result: Mapping[str, Any], num_processes: int) -> float | None:
    """Divide the seconds since the last restart by the rows of the steps since then."""
    num_steps = manifest.get("num_steps", 0) - result.get("resumed_from_step", 0)
    settings = manifest.get("config", {})
    global_batch = next((value for key, value in settings.items() if key.endswith(".global_batch")), 0)
    num_rows = num_steps * global_batch
    return num_processes * result["seconds"] / num_rows if num_rows and "seconds" in result else None


def measure(run: RunDir | None) -> Measured:
    """Read what a run tells. Raises OSError when its files cannot be read."""
    if run is None or not run.location.is_folder():
        return Measured()
    found = {step["name"]: (run / step["name"]).manifest for step in read_record(run).steps}
    manifests = {name: manifest for name, manifest in found.items() if manifest}
    results = {name: (run / name).read_json("result.json") for name in manifests}
    index, pairs = {}, {}
    for name in manifests:
        index = index or _means(run / name, "index", INDEX, ("num_bytes",))
        pairs = pairs or _means(run / name, "pairs", PAIRS, ("num_image_tokens", "num_chosen_tokens"))
    return Measured(
        manifests=manifests,
        results={name: result for name, result in results.items() if result},
        image_bytes=index.get("num_bytes"),
        num_image_tokens=pairs.get("num_image_tokens"),
        num_answer_tokens=pairs.get("num_chosen_tokens"),
    )


def _means(step: RunDir, family: str, schema: pa.Schema, columns: tuple[str, ...]) -> dict[str, float]:
    """Return the means of some columns over a finished step's first shard, a random sample of the images."""
    shards = step.shards(family)
    if not shards:
        return {}
    table = read_shard(shards[0], pa.schema([schema.field(name) for name in columns]))
    return {name: sum(table[name].to_pylist()) / table.num_rows for name in columns if table.num_rows}
