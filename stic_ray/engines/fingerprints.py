"""What a model is, in one word: the commit of a hub id, or a hash of a folder's weights and settings."""

import hashlib
import mmap
import os
import re
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from transformers.utils.hub import cached_file, extract_commit_hash

from stic_ray.core.config import ModelConfig
from stic_ray.core.rundir import digest
from stic_ray.engines.adapters import adapter_of
from stic_ray.engines.hub import explained, hub_arguments

_COMMIT = re.compile(r"[0-9a-f]{40}")
SETTINGS = re.compile(
    r"((adapter_)?config|generation_config|(pre)?processor_config|chat_template|tokenizer.*|special_tokens_map|"
    r"added_tokens|vocab|merges|spiece|sentencepiece.*)\.(json|jinja|model|txt)"
)
"""Files beside the weights that decide what is asked and answered; others, as a README, do not count."""
_CHUNK_BYTES = 1 << 28
_FRESH_S = 2.0
"""A file that changed less than this ago may change again without another time stamp."""


def fingerprint(model: ModelConfig) -> str:
    """Return the commit of a hub id, or a hash of the content of a directory's weights and settings.

    An adapter counts. Hashes of weights are kept in the user's cache, by place, size and times of the file. Raises
    ModelError, and Failed where the Hub cannot be reached.
    """
    found = _hash_folder(Path(model.path)) if Path(model.path).is_dir() else _commit_of(model)
    adapter = adapter_of(model)
    return found if adapter is None else digest([found, _hash_folder(adapter)])


def pin(model: ModelConfig) -> ModelConfig:
    """Return the model with the commit that its revision stands for now, so that every process loads the same files.

    A directory is returned as it is. Raises as `fingerprint`.
    """
    return model if Path(model.path).is_dir() else model.model_copy(update={"revision": _commit_of(model)})


def _commit_of(model: ModelConfig) -> str:
    if _COMMIT.fullmatch(model.revision or ""):
        return str(model.revision)
    with explained(model):
        file = cached_file(model.path, "config.json", revision=hub_arguments(model)["revision"])
    commit = extract_commit_hash(file, None)  # which the Hub's cache has in its paths
    assert commit is not None, f"{file} is not in a cache of huggingface_hub"
    return commit


def _hash_folder(folder: Path) -> str:
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    settings = [file for file in files if SETTINGS.fullmatch(file.name)]
    weights = [file for file in files if file.suffix == ".safetensors"]
    content = [(file.name, hashlib.blake2b(file.read_bytes()).hexdigest()) for file in settings]
    return digest([*content, *((file.name, _hash_weights(file)) for file in weights)])


def _hash_weights(file: Path) -> str:
    """Return a hash of a file's content, from the user's cache where the file is still the one that was hashed."""
    facts = file.stat()
    place = f"{file.resolve()} {facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns} {facts.st_ino}"
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.blake2b(place.encode(), digest_size=16).hexdigest()
    cached = Path(home) / "stic_ray" / "weights" / name
    with suppress(OSError):
        known = cached.read_text()
        if len(known) == 2 * hashlib.blake2b().digest_size:
            return known
    found = _hash_content(file)
    if time.time() - facts.st_ctime > _FRESH_S:
        partial = cached.with_name(f".{uuid.uuid4().hex}")
        with suppress(OSError):  # then each process computes it anew
            cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            partial.write_text(found)
            os.replace(partial, cached)
    return found


def _hash_content(file: Path) -> str:
    size = file.stat().st_size
    if not size:
        return hashlib.blake2b().hexdigest()
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:

        def hash_chunk(start: int) -> bytes:
            with memoryview(content) as view, view[start : start + _CHUNK_BYTES] as chunk:
                return hashlib.blake2b(chunk).digest()

        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            return hashlib.blake2b(b"".join(threads.map(hash_chunk, range(0, size, _CHUNK_BYTES)))).hexdigest()
