"""Checkpoints with one thing wrong, and what is said about it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def refusal(action: Callable[[ModelConfig], Any], path: Path, **settings: Any) -> str:
    """The message of a refusal: one line that names the path."""
    with pytest.raises(ModelError) as caught:
        action(ModelConfig(path=str(path), **settings))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def read_json(directory: Path, name: str) -> dict[str, Any]:
    return json.loads((directory / name).read_text(encoding="utf-8"))


def edit_json(directory: Path, name: str, **changes: Any) -> None:
    (directory / name).write_text(json.dumps({**read_json(directory, name), **changes}), encoding="utf-8")


def drop_json(directory: Path, name: str, *fields: str) -> None:
    content = read_json(directory, name)
    for field in fields:
        del content[field]
    (directory / name).write_text(json.dumps(content), encoding="utf-8")


def cut_into_shards(model: Path) -> None:
    """The same weights in two files, behind an index."""
    weights = load_file(model / WEIGHTS)
    names = sorted(weights)
    files = {
        name: f"model-0000{1 + (2 * place >= len(names))}-of-00002.safetensors" for place, name in enumerate(names)
    }
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, model / file, {"format": "pt"})
    (model / WEIGHTS).unlink()
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}), encoding="utf-8")


def drop_a_layer(model: Path) -> None:
    weights = load_file(model / WEIGHTS)
    save_file({name: weight for name, weight in weights.items() if ".layers.1." not in name}, model / WEIGHTS)


def cut_off(model: Path) -> None:
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[: len(content) // 2])


BAD_WEIGHTS: dict[str, Callable[[Path], Any]] = {
    "pickled only": lambda model: (model / WEIGHTS).rename(model / "pytorch_model.bin"),
    "a pointer of git-lfs": lambda model: (model / WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 4242\n", encoding="utf-8"
    ),
    "half a download": cut_off,
    "of other sizes": lambda model: edit_json(
        model, "config.json", text_config={**read_json(model, "config.json")["text_config"], "hidden_size": 64}
    ),
    "a layer missing": drop_a_layer,
}
