"""What the trainers read, as map-style datasets, and the controls on the pictures of the pairs."""

import glob
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import Dataset, Image, concatenate_datasets, load_dataset

from stic_ray.core.config import RunConfig
from stic_ray.core.randomness import random_for
from stic_ray.engines.loading import fingerprint
from stic_ray.stages.training.batches import REFERENCE_LOGPS

_GREY = (128, 128, 128)


def read_rows(files: Sequence[Path], columns: list[str], folder: Path) -> Dataset:
    """Map the Parquet files; images are decoded when a batch is made. The Arrow copy lives and goes with `folder`."""
    dataset = load_dataset(
        "parquet",
        data_files=[glob.escape(str(file)) for file in files],
        split="train",
        columns=columns,
        cache_dir=str(folder / "data"),
    )
    assert isinstance(dataset, Dataset), "a split of Parquet files is a map-style dataset"
    return dataset


def read_pairs(config: RunConfig, files: Sequence[Path], folder: Path) -> Dataset:
    """Return the pairs that stage `dpo` trains on, with the pictures that `dpo.image` asks for.

    They keep REFERENCE_LOGPS where all of them carry those of the model, and the pictures, that training begins with.
    """
    columns = ["position", "image", "prompt", "chosen", "rejected", "model_revision", *REFERENCE_LOGPS]
    pairs = read_rows(files, columns, folder)
    is_of_this_model = set(pairs.unique("model_revision")) == {fingerprint(config.model)}
    is_complete = not any(pairs.data.column(name).null_count for name in REFERENCE_LOGPS)
    if not (is_of_this_model and is_complete and config.dpo.image == "own"):
        pairs = pairs.remove_columns([*REFERENCE_LOGPS])
    pairs = pairs.remove_columns("model_revision")
    if config.dpo.num_images is not None:
        pairs = pairs.select(np.flatnonzero(np.asarray(pairs["position"][:]) < config.dpo.num_images))
    pairs = pairs.remove_columns("position")
    if config.dpo.image == "own":
        return pairs
    pictures = pairs.select_columns("image")
    if config.dpo.image == "blank":
        pictures = blank(pictures)
    else:
        pictures = pictures.select(derangement(pairs.num_rows, config.seed))
    return concatenate_datasets([pairs.remove_columns("image"), pictures], axis=1)


def as_conversations(pairs: Dataset) -> Dataset:
    """Return the preferred answers alone, as rows of `image` and `messages`."""
    return pairs.map(
        lambda prompt, chosen: {"messages": prompt + chosen},
        input_columns=["prompt", "chosen"],
        remove_columns=[name for name in pairs.column_names if name != "image"],
    )


def blank(pictures: Dataset) -> Dataset:
    """Return a uniform grey picture of the same size for each; sizes are read without decoding."""

    def replace(batch: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
        sizes = [PIL.Image.open(io.BytesIO(image["bytes"])).size for image in batch["image"]]
        encoded = {size: _grey(size) for size in set(sizes)}
        return {"image": [{"bytes": encoded[size], "path": None} for size in sizes]}

    stored = pictures.cast_column("image", Image(decode=False))
    return stored.map(replace, batched=True, batch_size=64, features=pictures.features)


def derangement(number: int, seed: int) -> list[int]:
    """Return the indices below `number` in a seeded order in which none is at its own place.

    Each index takes the one that follows it on a random cycle through all of them.
    """
    assert number > 1, "one alone has no other to take"
    cycle = list(range(number))
    random_for(seed, "", "shuffled pictures").shuffle(cycle)
    follows = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    return [follows[index] for index in range(number)]


def _grey(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, _GREY).save(buffer, "PNG")
    return buffer.getvalue()
