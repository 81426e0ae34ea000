"""Tiny checkpoints of real families, written once per session."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from stic_ray.core.config import ModelConfig
from stic_ray.engines.batching import BatchLimits
from stic_ray.engines.transformers_engine import TransformersEngine
from stic_ray.toyworld import WEIGHTS
from tests import tiny_models

Checkpoints = Callable[[str], Path]
Engines = Callable[[str], TransformersEngine]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """The directory of a family's checkpoint; `toyworld` is the model of the demo."""
    folder = tmp_path_factory.mktemp("models")

    def build(family: str) -> Path:
        if family == "toyworld":
            return WEIGHTS
        directory = folder / family
        return directory if directory.exists() else tiny_models.build(family, directory)

    return build


@pytest.fixture(scope="session")
def loaded(checkpoint: Checkpoints) -> Engines:
    """A loaded engine of a family, shared between tests that do not change it."""
    engines: dict[str, TransformersEngine] = {}

    def load(family: str) -> TransformersEngine:
        if family not in engines:
            engines[family] = TransformersEngine(
                ModelConfig(path=str(checkpoint(family))), limits=BatchLimits(4, None), on_gpu=False
            )
        return engines[family]

    return load


@pytest.fixture
def spoiled(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A copy of a good checkpoint, to be damaged."""
    return Path(shutil.copytree(checkpoint("llava"), tmp_path / "model"))
