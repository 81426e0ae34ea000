"""What a model is called: by all of its weights and settings, by its adapter, or by the commit on the Hub."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stic_ray.core.config import ModelConfig
from stic_ray.engines import fingerprints
from stic_ray.engines.fingerprints import fingerprint, pin
from tests.engines.conftest import Checkpoints
from tests.engines.spoiling import WEIGHTS, drop_a_layer, edit_json
from tests.engines.test_adapters import make_adapter, with_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def of(path: Path, adapter: Path | None = None) -> str:
    return fingerprint(ModelConfig(path=str(path), adapter=str(adapter) if adapter else None))


def test_the_fingerprint_is_that_of_the_weights(checkpoint: Checkpoints, spoiled: Path) -> None:
    before = of(spoiled)
    assert before == of(checkpoint("llava")), "the place does not matter"
    (spoiled / "README.md").write_text("A model.")
    assert of(spoiled) == before
    drop_a_layer(spoiled)
    assert of(spoiled) != before
    assert fingerprint(ModelConfig(path="owner/name", revision=COMMIT)) == COMMIT


def test_a_single_number_behind_a_long_header_is_seen(tmp_path: Path) -> None:
    """The header of a checkpoint with 700 weights is longer than what is usually sampled of a file."""
    weights = {
        f"model.language_model.layers.{number}.self_attn.q_proj.weight": torch.zeros(2, 2) for number in range(700)
    }
    found = set()
    for change in range(2):
        weights["model.language_model.layers.350.self_attn.q_proj.weight"][1, 1] = change
        (tmp_path / str(change)).mkdir()
        save_file(weights, tmp_path / str(change) / WEIGHTS)
        found.add(of(tmp_path / str(change)))
    assert len(found) == 2


def test_every_chunk_counts(spoiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_CHUNK_BYTES", 1000)
    size = (spoiled / WEIGHTS).stat().st_size
    found = {of(spoiled)}
    for place in (size // 2, size - 1):
        content = bytearray((spoiled / WEIGHTS).read_bytes())
        content[place] ^= 1
        (spoiled / WEIGHTS).write_bytes(content)
        found.add(of(spoiled))
    assert len(found) == 3


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.json"])
def test_settings_that_change_answers_count(name: str, spoiled: Path) -> None:
    before = of(spoiled)
    edit_json(spoiled, name, other=1)
    assert of(spoiled) != before


def test_an_adapter_counts(checkpoint: Checkpoints, tmp_path: Path) -> None:
    base = checkpoint("llava")
    adapter = make_adapter(base, tmp_path / "adapter")
    other = with_weights(adapter, tmp_path / "other", lambda name, weight: weight + 1)
    assert len({of(base), of(base, adapter), of(base, other)}) == 3


def test_a_file_is_hashed_once_and_again_when_it_was_replaced(spoiled: Path, own_cache: Path) -> None:
    """Even by one of the same size that brings its time stamp along, as `cp -p` and rsync do."""
    before = of(spoiled)
    assert not own_cache.exists(), "a file that is being written has no hash that holds"
    facts = (spoiled / WEIGHTS).stat()
    while time.time() - facts.st_ctime <= fingerprints._FRESH_S:
        time.sleep(0.1)
    assert of(spoiled) == before
    (cached,) = [file for file in own_cache.rglob("*") if file.is_file()]
    cached.write_text("0" * 128)
    assert of(spoiled) != before, "what is remembered is used"
    weights = {name: weight + 1 for name, weight in load_file(spoiled / WEIGHTS).items()}
    save_file(weights, spoiled / WEIGHTS, metadata={"format": "pt"})
    os.utime(spoiled / WEIGHTS, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert (spoiled / WEIGHTS).stat().st_size == facts.st_size
    shutil.copytree(spoiled, spoiled.parent / "elsewhere")
    assert of(spoiled) == of(spoiled.parent / "elsewhere") != before


def test_a_cache_that_cannot_be_written_is_done_without(spoiled: Path, own_cache: Path) -> None:
    own_cache.write_text("in the way")
    assert of(spoiled) == of(spoiled)


def test_a_hub_id_is_its_commit_for_every_process(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """From a cache as huggingface_hub lays it out, without a network; `main` may stand for another commit tomorrow."""
    cached = tmp_path / "hub" / "models--owner--name"
    shutil.copytree(checkpoint("llava"), cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    code = (
        "from stic_ray.core.config import ModelConfig\n"
        "from stic_ray.engines.checking import check_model\n"
        "from stic_ray.engines.fingerprints import fingerprint, pin\n"
        "model = ModelConfig(path='owner/name')\n"
        "check_model(model)\n"
        "print(fingerprint(model), pin(model).revision, fingerprint(pin(model)))"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert output.stdout.split() == [COMMIT] * 3, output.stderr


def test_a_directory_needs_no_revision(spoiled: Path) -> None:
    model = ModelConfig(path=str(spoiled))
    assert pin(model) == model
