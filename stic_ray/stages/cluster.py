"""The Ray cluster of a run: connecting, what it must hold, and giving it back between stages."""

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import ray
import ray.exceptions
from ray._private import state, worker
from ray._private.accelerators import get_accelerator_manager_for_resource

from stic_ray.core.config import ModelConfig, RunConfig
from stic_ray.core.errors import SticError, UserError
from stic_ray.core.placement import ACCELERATOR, Machines, Need, Node, check_fits
from stic_ray.stages import joining

logger = logging.getLogger(__name__)

PROCESSES = {"actors": "MapWorker", "workers": "RayTrainWorker"}
"""How the classes begin that Ray Data and Ray Train start for a stage."""

_NODE_GROUP = "ray.io/node-group"
"""Label of a machine that something starts when it is asked for: Ray's cluster launcher or KubeRay."""

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
def connected(config: RunConfig, needs: Mapping[str, Need] | None = None) -> Iterator[None]:
    """Join the cluster at RAY_ADDRESS or start a Ray of our own on this machine, and leave it at the end.

    A Ray that this process is already connected to is used and left as it is. Raises ConfigError when this machine
    lacks the GPUs that the `needs` of a step ask for, which a cluster may get yet, and when RAY_ADDRESS cannot be
    joined. Where the block fails for another reason than a mistake of the user's, the log says where Ray's logs are.
    """
    is_ours = not ray.is_initialized()
    try:
        if is_ours:
            _connect(config, needs or {})
        yield
    except Exception as error:
        if worker._global_node is not None and not isinstance(error, UserError):
            logger.error("Ray's logs are on each machine in %s", worker._global_node.get_logs_dir_path())
        raise
    finally:
        if is_ours:
            ray.shutdown()


def _connect(config: RunConfig, needs: Mapping[str, Need]) -> None:
    if address := joining.cluster_address():
        joining.join(address, process_environment(config))
        return
    joining.start_here(process_environment(config), _local_cpus(config))
    here = Node({**nodes()[0].resources, "CPU": math.inf})
    check_fits(needs, Machines("this machine", [here]))


def is_local() -> bool:
    """Whether this machine does the work, and no cluster."""
    return joining.cluster_address() is None


def check_model(config: RunConfig) -> ModelConfig:
    """Return what `check_engine` does where the actors of a step will be: in a task that holds what an actor holds.

    The machine of the driver may lack the model, the engine and GPUs. Raises ModelError.
    """
    from stic_ray.engines.opening import check_engine  # libraries look at `process_environment` when they are imported

    actors = config.actors
    task = cast(Any, ray.remote(check_engine)).options(
        num_cpus=0, num_gpus=actors.num_gpus, label_selector=dict(actors.label_selector) or None
    )
    try:
        return ray.get(task.remote(config.model))
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, SticError) else error from None


def machines(config: RunConfig) -> Machines:
    """Return the machines that a run would find, in the cluster at RAY_ADDRESS or here, joining and starting nothing.

    CPUs of this machine are not counted: more actors than cores run, only slower. Raises ConfigError when RAY_ADDRESS
    leads to no cluster, or one that refuses.
    """
    address = joining.cluster_address()
    if address is None:
        return Machines("this machine", [Node({"CPU": math.inf, **_gpus_of_this_machine(config)})])
    found = joining.ask_cluster(address)
    return Machines(f"the cluster at {address}", found, may_grow=any(_NODE_GROUP in node.labels for node in found))


def _gpus_of_this_machine(config: RunConfig) -> dict[str, float]:
    """Return the GPUs that a Ray of our own would find, looked for where something asks for them."""
    if not config.actors.num_gpus and not config.workers.num_gpus:
        return {}
    manager = get_accelerator_manager_for_resource("GPU")
    assert manager is not None, "Ray knows GPUs"
    visible = manager.get_current_process_visible_accelerator_ids()
    num_gpus = manager.get_current_node_num_accelerators()
    kind = manager.get_current_node_accelerator_type() if config.workers.accelerator_type else None
    kinds = {f"{ACCELERATOR}{kind}": 1.0} if kind else {}
    return {"GPU": num_gpus if visible is None else min(num_gpus, len(visible)), **kinds}


def _local_cpus(config: RunConfig) -> int:
    """Return the CPUs that a Ray of our own is given, for the processes of any stage and a task."""
    generation = config.actors.num_actors * config.actors.num_cpus
    training = config.workers.num_workers * config.workers.num_cpus
    return max(os.cpu_count() or 1, int(max(generation, training)) + 1)


@contextmanager
def released() -> Iterator[None]:
    """Run a stage, then wait until the processes that it started have given back what they held.

    Other jobs of the cluster are not looked at: what they take or give back is theirs.
    """
    before = {process["ActorID"] for process in own_processes()}
    yield
    deadline = time.monotonic() + _RELEASE_TIMEOUT_S
    while left := {process["ActorID"] for process in own_processes()} - before:
        if time.monotonic() > deadline:
            logger.warning("%d processes of the stage are still there after %.0f s", len(left), _RELEASE_TIMEOUT_S)
            return
        time.sleep(0.1)


def nodes() -> list[Node]:
    """Return the machines of the cluster."""
    return [Node(node["Resources"], node.get("Labels") or {}) for node in ray.nodes() if node["Alive"]]


def own_processes(what: str | None = None) -> list[dict[str, Any]]:
    """Return this job's `actors` or `workers`, or both, that are there or wanted.

    One without a place yet has port 0. Ray's public list of actors asks the dashboard, which a cluster may not have.
    """
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    classes = (PROCESSES[what],) if what else tuple(PROCESSES.values())
    found = state.actors(job_id=job).values()
    return [each for each in found if each["State"] != "DEAD" and each["ActorClassName"].startswith(classes)]
