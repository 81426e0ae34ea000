"""How large a model is, from its files where they are here, else from its name; no weight is loaded."""

import json
import math
import re
from pathlib import Path
from typing import Any

from stic_ray.core.config import TOYWORLD, RunConfig
from stic_ray.core.workload import ModelSize
from stic_ray.estimate.costs import cache_bytes_per_token

_TOY_WEIGHTS = Path(__file__).parents[1] / "toyworld" / "weights"
_IMAGE_TOKENS = {
    # Of a photograph of 640 x 480 px.
    r"llava-?(v?1\.6|next)": 2340,  # 24 x 24 whole, 48 x 36 in tiles with a token at the end of each row
    r"qwen2(\.5)?-vl": 23 * 17,  # squares of 28 px
    r"llava": 576,  # 24 x 24
}
_CACHE_BYTES_PER_PARAMETER = 131_072 / 7.25e9
"""Mistral-7B's, where the model's own layers are not known."""


def model_size(config: RunConfig) -> ModelSize | None:
    """Return the size of the run's model, or None where nothing says how many parameters it has."""
    given = config.estimate
    folder = _TOY_WEIGHTS if config.model.path == TOYWORLD else Path(config.model.path).expanduser()
    described = _described(folder)
    num_parameters = given.num_parameters or _stored_parameters(folder) or _named_parameters(config.model.path)
    if num_parameters is None:
        return None
    family = config.model.path.lower()
    named = next((tokens for pattern, tokens in _IMAGE_TOKENS.items() if re.search(pattern, family)), 576)
    return ModelSize(
        num_parameters,
        given.num_image_tokens or _image_tokens(described) or named,
        _cache_bytes(described) or num_parameters * _CACHE_BYTES_PER_PARAMETER,
    )


def _described(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _stored_parameters(folder: Path) -> int | None:
    """Add up the shapes in the headers of the safetensors files: 8 bytes with the length of a JSON text, then it."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total or None


def _named_parameters(path: str) -> float | None:
    """Return 7e9 for "llava-hf/llava-v1.6-mistral-7b-hf"."""
    found = re.search(r"(?<![\w.])(\d+(?:\.\d+)?)b(?![a-z0-9])", path.rstrip("/").rsplit("/", 1)[-1].lower())
    return float(found[1]) * 1e9 if found else None


def _image_tokens(described: dict[str, Any]) -> int | None:
    vision = described.get("vision_config", {})
    if described.get("model_type") != "llava" or not {"image_size", "patch_size"} <= vision.keys():
        return None
    return (vision["image_size"] // vision["patch_size"]) ** 2


def _cache_bytes(described: dict[str, Any]) -> int | None:
    text = described.get("text_config", {})
    if not {"num_hidden_layers", "hidden_size", "num_attention_heads"} <= text.keys():
        return None
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    return cache_bytes_per_token(
        text["num_hidden_layers"], text.get("num_key_value_heads") or text["num_attention_heads"], head_dim
    )
