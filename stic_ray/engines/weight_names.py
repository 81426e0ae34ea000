"""Names of the weights in a checkpoint, as the checkpoints on the Hugging Face Hub have them.

transformers 5 calls the weights of a CLIP vision tower `vision_tower.embeddings...`, released checkpoints call them
`vision_tower.vision_model.embeddings...`, and so do the engines that were written for these, vLLM 0.32 for one.
transformers reads both, and writes what it has read; for a model that began in transformers 5 it writes its own names.
"""

import json
import re
import shutil
import struct
from pathlib import Path
from typing import Any

_OWN_NAME = re.compile(r"^((?:model\.)?vision_tower\.)(?!vision_model\.)")
INDEX = "model.safetensors.index.json"


def has_hub_names(folder: Path) -> bool:
    """Return whether the checkpoint in `folder` has the names of the Hub; reads headers, no weights."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = (name for file in folder.glob("*.safetensors") for name in _read_header(file))
    has_clip_tower = config.get("vision_config", {}).get("model_type") == "clip_vision_model"
    return not has_clip_tower or all(name == _hub_name(name) for name in names)


def use_hub_names(folder: Path) -> None:
    """Give the weights of the checkpoint in `folder` the names of the Hub.

    Only the header of a file changes, and only of files that hold such weights; each is replaced in one step, so that a
    link is replaced by a file of its own.
    """
    if has_hub_names(folder):
        return
    for file in sorted(folder.glob("*.safetensors")):
        header = _read_header(file)
        renamed = {_hub_name(name): entry for name, entry in header.items()}
        if renamed.keys() != header.keys():
            _write_header(file, renamed)
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index["weight_map"] = {_hub_name(name): file for name, file in index["weight_map"].items()}
        partial = folder / f".{INDEX}.tmp"
        partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / INDEX)


def link_with_hub_names(folder: Path, target: Path) -> None:
    """Make `target` a checkpoint like `folder` with the names of the Hub, of links where nothing differs."""
    for file in folder.iterdir():
        if file.is_file():
            (target / file.name).symlink_to(file.resolve())
    use_hub_names(target)


def _hub_name(name: str) -> str:
    return _OWN_NAME.sub(r"\1vision_model.", name)


def _read_header(file: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: what it holds by name, under a length of 8 bytes."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(length))


def _write_header(file: Path, header: dict[str, Any]) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the weights begin at a multiple of 8 bytes
    partial = file.with_name(f".{file.name}.tmp")
    with file.open("rb") as source, partial.open("wb") as target:
        (length,) = struct.unpack("<Q", source.read(8))
        source.seek(8 + length)
        target.write(struct.pack("<Q", len(text)) + text)
        shutil.copyfileobj(source, target, length=1 << 24)
    partial.replace(file)
