"""The Ray cluster of a run: connecting, what it must hold, and giving it back between stages."""

import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError

logger = logging.getLogger(__name__)

TASK_CPUS = 0.25
"""CPUs reserved by a task that mostly waits for storage, so that actors cannot starve it."""

_RELEASE_TIMEOUT_S = 120.0


def process_environment(config: RunConfig) -> dict[str, str]:
    """Return the environment that driver and workers share: no telemetry, no progress bars among the log lines."""
    environment = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # A driver that was killed would keep its share of the cluster for three minutes.
        "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "20",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }
    return environment | ({"DS_ACCELERATOR": "cpu"} if config.workers.num_gpus == 0 else {})


@contextmanager
def connected(config: RunConfig) -> Iterator[None]:
    """Join the cluster at RAY_ADDRESS or start a Ray of our own on this machine, and leave it at the end.

    A Ray that this process is already connected to is used and left as it is. Raises ConfigError when this machine
    lacks the GPUs that the configuration asks for.
    """
    if ray.is_initialized():
        yield
        return
    _connect(config)
    try:
        yield
    finally:
        ray.shutdown()


def _connect(config: RunConfig) -> None:
    options = {"logging_level": logging.WARNING, "runtime_env": {"env_vars": process_environment(config)}}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address=os.environ["RAY_ADDRESS"], **options)
        return
    # CPUs are Ray's book-keeping: more actors than cores run, only slower.
    ray.init(address="local", num_cpus=max(os.cpu_count() or 1, _cpus_needed(config)), **options)
    reason = why_too_small(config, ray.cluster_resources())
    if reason is not None:
        ray.shutdown()
        raise ConfigError(f"{reason}. Set RAY_ADDRESS to a cluster that has what is asked for, or lower the setting.")


def why_too_small(config: RunConfig, resources: Mapping[str, float]) -> str | None:
    """Return what this machine lacks; workers would wait for it for ever."""
    num_gpus, workers = resources.get("GPU", 0.0), config.workers
    for setting, asked in _gpus_asked(config).items():
        if asked > num_gpus:
            return f"{setting} ask for {asked:g} GPUs, this machine has {num_gpus:g}"
    if workers.accelerator_type and f"accelerator_type:{workers.accelerator_type}" not in resources:
        return f"workers.accelerator_type={workers.accelerator_type} is not the GPU of this machine"
    if workers.placement_strategy == "STRICT_SPREAD" and workers.num_workers > 1:
        return f"workers.placement_strategy=STRICT_SPREAD asks for {workers.num_workers} machines, this is one"
    return None


@contextmanager
def released() -> Iterator[None]:
    """Run a stage, then wait until the CPUs and GPUs it held are free again for the next one."""
    before = _free()
    yield
    deadline = time.monotonic() + _RELEASE_TIMEOUT_S
    while any(_free()[kind] < amount for kind, amount in before.items()):
        if time.monotonic() > deadline:
            logger.warning(
                "the stage's resources are not free after %.0f s: %s, had %s", _RELEASE_TIMEOUT_S, _free(), before
            )
            return
        time.sleep(0.1)


def _free() -> dict[str, float]:
    available = ray.available_resources()
    return {kind: available.get(kind, 0.0) for kind in ("CPU", "GPU")}


def _cpus_needed(config: RunConfig) -> int:
    generation = config.actors.num_actors * config.actors.num_cpus
    training = config.workers.num_workers * config.workers.num_cpus
    return int(max(generation, training)) + 1


def _gpus_asked(config: RunConfig) -> dict[str, float]:
    return {
        "actors.num_gpus and actors.num_actors": config.actors.num_gpus * config.actors.num_actors,
        "workers.num_gpus and workers.num_workers": config.workers.num_gpus * config.workers.num_workers,
    }
