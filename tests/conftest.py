"""What all tests share. Tiers by folder: fast ones first, then those that start Ray (stages, pipeline)."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}  # buckets of tests are on loopback

_LAST = ("stages", "pipeline")
"""Folders whose tests start Ray: minutes, not seconds."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the fast tests first, so that a mistake is told early."""

    def tier(item: pytest.Item) -> int:
        folder = Path(item.path).parent.name
        return _LAST.index(folder) + 1 if folder in _LAST else 0

    items.sort(key=tier)


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray of our own with six logical CPUs, for all tests that run stages in this process."""
    from stic_ray.recipes import demo
    from stic_ray.stages import cluster

    config = demo()
    os.environ.update(cluster.process_environment(config))
    many = config.model_copy(update={"actors": config.actors.model_copy(update={"num_actors": 5})})
    with cluster.connected(many):
        yield


@pytest.fixture(scope="session")
def tiny_llava() -> Path:
    """The model of the toy world, which is shipped with the package: not to be changed."""
    from stic_ray.toyworld.model import WEIGHTS

    return WEIGHTS
