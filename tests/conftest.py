"""What all tests share. Tiers by folder: fast ones first, then those that start Ray (stages, pipeline)."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("STIC_RAY_STORAGE_PATIENCE_S", "1")
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
    """A Ray of our own with six logical CPUs and two pretended GPUs, for all tests that run stages in this process."""
    import ray

    from stic_ray.recipes import demo
    from stic_ray.stages import cluster

    environment = cluster.process_environment(demo().config)
    os.environ.update(environment)
    resources = {"num_cpus": 6, "num_gpus": 2}
    runtime = {"env_vars": environment}
    ray.init(address="local", include_dashboard=False, logging_level="WARNING", runtime_env=runtime, **resources)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_llava() -> Path:
    """The model of the toy world, which is shipped with the package: not to be changed."""
    from stic_ray.toyworld import WEIGHTS

    return WEIGHTS


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """An S3 server on loopback: host and port. One for the whole session, as pyarrow's clients are kept."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def endpoint(s3_server: str) -> Iterator[str]:
    """A server with the bucket `pictures`; address and credentials are in the environment and nowhere else."""
    import boto3

    settings = {
        "AWS_ENDPOINT_URL": f"http://{s3_server}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="pictures")
        yield s3_server
