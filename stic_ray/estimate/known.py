"""What is known of a run before it is made: the size of its model, what finished steps measured, and its amounts."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from stic_ray.core.config import TOYWORLD, RunConfig, is_toy
from stic_ray.core.rundir import RunDir, read_shard
from stic_ray.core.schemas import INDEX, PAIRS
from stic_ray.core.steps import Step, Steps, names_in, read_record
from stic_ray.core.workload import BYTES_PER_WEIGHT, NUM_ROWS_OUT, NUM_UNITS, ModelSize, Sizes
from stic_ray.toyworld import WEIGHTS
from stic_ray.toyworld.assets import BENCHMARKS

_IMAGE_TOKENS = {
    # Of a photograph of 640 x 480 px.
    r"llava-?(v?1\.6|next)": 2340,  # 24 x 24 whole, 48 x 36 in tiles with a token at the end of each row
    r"qwen2(\.5)?-vl": 23 * 17,  # squares of 28 px
}
_OTHER_IMAGE_TOKENS = 576
"""LLaVA's 24 x 24."""
_CACHE_BYTES_PER_PARAMETER = 131_072 / 7.25e9
"""Mistral-7B's, where the model's own layers are not known."""
_TOY_IMAGE_BYTES = 1_300
_STEADY_S = 10.0
"""The second half of the shards says how fast a step is without its start, if it lasted so long at least."""


@dataclass(frozen=True)
class Measured:
    """What a run directory says of speed and sizes; nothing where no step is finished."""

    manifests: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Of the finished steps."""
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """result.json of finished trainings."""
    image_bytes: float | None = None
    num_image_tokens: float | None = None
    num_answer_tokens: float | None = None

    def process_s_per_row(self, name: str) -> float | None:
        """Return the seconds of one process per row, as `Work` counts rows, in a finished step; None where not known.

        Its start is left out where known. Of a step that was interrupted, what its last attempt did, with the processes
        that this one had.
        """
        manifest = self.manifests.get(name, {})
        num_processes = manifest.get("made_with", {}).get("processes", {}).get("num")
        if not num_processes:
            return None
        if name in self.results:
            return _training_s_per_row(manifest, self.results[name], num_processes)
        seconds = _s_per_row_left(manifest)
        return num_processes * seconds if seconds else None


def num_rows_done(manifest: Mapping[str, Any]) -> float:
    """Return what a finished step did in rows as `Work` counts them."""
    return manifest.get(NUM_UNITS, manifest["num_rows_in"])


def _s_per_row_left(manifest: Mapping[str, Any]) -> float | None:
    """Return the seconds of a step per row as `Work` counts them, from its throughput, which is of rows that it left.

    A row of work leaves several where an image has candidates, or a question has modes and metrics.
    """
    throughput = manifest.get("throughput") or {}
    if is_by_model := "rows_per_s" not in throughput:
        parts = [part for part in throughput.values() if part and part.get("rows_per_s")]
    else:
        parts = [throughput] if throughput["rows_per_s"] else []
    if not parts or not num_rows_done(manifest) or (is_by_model and NUM_UNITS not in manifest):
        return None
    num_left = manifest.get(NUM_ROWS_OUT) or max(
        manifest["num_rows_in"], sum(part.get("num_rows", 0) for part in parts)
    )
    weights = [part.get("num_rows", 1) for part in parts]
    seconds = sum(weight / _rows_per_s(part) for weight, part in zip(weights, parts, strict=True)) / sum(weights)
    return seconds * num_left / num_rows_done(manifest)


def _rows_per_s(figures: Mapping[str, Any]) -> float:
    """Return the rate of the second half of the shards where that lasted long enough, else of all."""
    steady = figures.get("steady") or {}
    is_long = steady.get("seconds", 0.0) >= _STEADY_S and steady.get("rows_per_s")
    return (steady if is_long else figures)["rows_per_s"]


def _training_s_per_row(manifest: Mapping[str, Any], result: Mapping[str, Any], num_processes: int) -> float | None:
    """Divide the seconds since the last restart by the rows of the steps since then."""
    num_steps = manifest.get("num_steps", 0) - result.get("resumed_from_step", 0)
    settings = manifest.get("config", {})
    global_batch = next((value for key, value in settings.items() if key.endswith(".global_batch")), 0)
    num_rows = num_steps * global_batch
    return num_processes * result["seconds"] / num_rows if num_rows and "seconds" in result else None


def measure(run: RunDir | None) -> Measured:
    """Read what a run directory says. Raises OSError when its files cannot be read."""
    if run is None or not run.location.is_folder():
        return Measured()
    names = [step["name"] for step in read_record(run).steps]
    manifests = {name: manifest for name in names if (manifest := (run / name).manifest)}
    index = _means(run, manifests, "index", INDEX, ("num_bytes",))
    pairs = _means(run, manifests, "pairs", PAIRS, ("num_image_tokens", "num_chosen_tokens"))
    return Measured(
        manifests=manifests,
        results={name: result for name in manifests if (result := (run / name).read_json("result.json"))},
        image_bytes=index.get("num_bytes"),
        num_image_tokens=pairs.get("num_image_tokens"),
        num_answer_tokens=pairs.get("num_chosen_tokens"),
    )


def _means(
    run: RunDir, names: Iterable[str], family: str, schema: pa.Schema, columns: tuple[str, ...]
) -> dict[str, float]:
    """Return the means of some columns over the first shard of a family, a random sample of the images."""
    shard = next((shards[0] for name in names if (shards := (run / name).shards(family))), None)
    if shard is None:
        return {}
    table = read_shard(shard, pa.schema([schema.field(name) for name in columns]))
    return {name: sum(table[name].to_pylist()) / table.num_rows for name in columns if table.num_rows}


def model_size(config: RunConfig) -> ModelSize | None:
    """Return the size of the run's model, from its files where they are here, else from its name; loads no weight.

    None where nothing says how many parameters it has.
    """
    given, path = config.estimate, config.model.path
    folder = WEIGHTS if path == TOYWORLD else Path(path).expanduser()
    file = folder / "config.json"
    described = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    billions = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z0-9])", path.rstrip("/").rsplit("/", 1)[-1].lower())
    named = float(billions[1]) * 1e9 if billions else None  # 7e9 for "llava-hf/llava-v1.6-mistral-7b-hf"
    num_parameters = given.num_parameters or _stored_parameters(folder) or named
    if num_parameters is None:
        return None
    image_tokens = (tokens for pattern, tokens in _IMAGE_TOKENS.items() if re.search(pattern, path.lower()))
    return ModelSize(
        num_parameters,
        given.num_image_tokens or _image_tokens(described) or next(image_tokens, _OTHER_IMAGE_TOKENS),
        _cache_bytes(described) or num_parameters * _CACHE_BYTES_PER_PARAMETER,
    )


def _stored_parameters(folder: Path) -> int | None:
    """Add up the shapes in the headers of the safetensors files: 8 bytes with the length of a JSON text, then it."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total or None


def _image_tokens(described: dict[str, Any]) -> int | None:
    vision = described.get("vision_config", {})
    if described.get("model_type") != "llava" or not {"image_size", "patch_size"} <= vision.keys():
        return None
    return (vision["image_size"] // vision["patch_size"]) ** 2


def _cache_bytes(described: dict[str, Any]) -> int | None:
    text = described.get("text_config", {})
    if not {"num_hidden_layers", "hidden_size", "num_attention_heads"} <= text.keys():
        return None
    num_heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or text["hidden_size"] // num_heads
    return cache_bytes_per_token(text["num_hidden_layers"], text.get("num_key_value_heads") or num_heads, head_dim)


def cache_bytes_per_token(num_layers: int, num_key_value_heads: int, head_dim: int) -> int:
    """Return the bytes that keys and values of one token take; Mistral-7B: 32 layers x 8 x 128 x 2 x 2 = 131,072."""
    return num_layers * num_key_value_heads * head_dim * 2 * BYTES_PER_WEIGHT


def sizes_of(config: RunConfig, steps: Steps, own: Measured, pilot: Measured) -> Sizes | None:
    """Return the sizes of a run's parts, or None when nothing says how large the model is."""
    model, given, toy, benchmarks = model_size(config), config.estimate, config.toyworld, config.evaluation.benchmarks
    if model is None:
        return None
    image_tokens = given.num_image_tokens or own.num_image_tokens or pilot.num_image_tokens or model.num_image_tokens
    is_toy_pool = is_toy(config.pool.source)
    there = _finished("num_images", steps, own) or (toy.num_pictures if is_toy_pool else given.num_images)
    instructions = toy.num_instructions if is_toy(config.infusion.source) else given.num_instructions
    num_toy_benchmarks = sum(1 if ":" in name else len(BENCHMARKS) for name in benchmarks)
    image_bytes = _TOY_IMAGE_BYTES if is_toy_pool else given.image_bytes
    return Sizes(
        replace(model, num_image_tokens=round(image_tokens)),
        there or _most_asked_about(config, steps),
        config.infusion.num_rows or _finished("num_instructions", steps, own) or instructions,
        num_toy_benchmarks * toy.num_scenes if all(map(is_toy, benchmarks)) else given.num_questions,
        image_tokens + given.num_prompt_tokens,
        own.num_answer_tokens or pilot.num_answer_tokens or given.num_answer_tokens,
        own.image_bytes or pilot.image_bytes or image_bytes,
    )


def sizes_for(step: Step, steps: Steps, config: RunConfig, sizes: Sizes, own: Measured) -> Sizes:
    """Return the sizes as a step meets them: a training has the rows that its inputs in the run leave it.

    Of an input that is finished, what it wrote; of another, a row for each that it works on, rejected ones among them.
    """
    if step.stage.need(config).what != "workers":
        return sizes
    makers = {each.name: each for each in steps}
    given: dict[str, list[float | None]] = {}
    for role, source in step.inputs.items():
        names = () if role == "model" else names_in(source)
        maker = makers.get(next((name for name in names if name in own.manifests), names[0] if names else ""))
        if maker is None:
            continue
        work = maker.stage.work(maker.configured(config), sizes)
        num_rows = own.manifests.get(maker.name, {}).get("num_rows_written", work.num_rows if work else None)
        given.setdefault(maker.stage.amount, []).append(num_rows)
    totals = {amount: None if None in rows else sum(filter(None, rows)) for amount, rows in given.items()}
    return replace(
        sizes,
        num_images=totals.get("num_images", sizes.num_images),
        num_instructions=totals.get("num_instructions", sizes.num_instructions),
    )


def _most_asked_about(config: RunConfig, steps: Steps) -> float | None:
    """Return how many images of a pool of unknown size the steps ask about at most, where all of them is not said."""
    asking = [step for step in steps if step.stage.amount == "num_images" and step.stage.section]
    limits = [getattr(getattr(step.configured(config), step.stage.section), "num_images", None) for step in asking]
    return max(filter(None, limits), default=None)


def _finished(amount: str, steps: Steps, own: Measured) -> float | None:
    """Return an amount from the manifest of the finished step that counts it."""
    found = [step for step in steps if step.stage.amount == amount and step.name in own.manifests]
    counts = [own.manifests[step.name].get(step.stage.amount_in_manifest or "") for step in found]
    return next((count for count in counts if count is not None), None)
