"""The vllm engine for real, on vLLM's CPU build: `make test-vllm`. Without vLLM nothing is collected here."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from stic_ray.core.config import ActorsConfig, ModelConfig
from stic_ray.engines.batching import BatchLimits
from stic_ray.engines.transformers_engine import TransformersEngine
from stic_ray.engines.vllm_engine import VllmEngine

INSTALLED = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if INSTALLED else ["test_*.py"]

ACTORS = ActorsConfig(batch_size=16)


@pytest.fixture(scope="session")
def vllm_engine(tiny_llava: Path) -> Iterator[VllmEngine]:
    """The toy world's model; it takes half a minute to start, so all tests share it."""
    engine = VllmEngine(ModelConfig(path=str(tiny_llava), engine="vllm"), ACTORS)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def transformers_engine(tiny_llava: Path) -> TransformersEngine:
    """What the answers are compared with."""
    return TransformersEngine(ModelConfig(path=str(tiny_llava)), limits=BatchLimits(16, None), on_gpu=False)
