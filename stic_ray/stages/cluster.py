"""The Ray cluster of a run: the one at RAY_ADDRESS, or a Ray that is started on this machine for this run alone."""

import logging
import math
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast

import grpc
import ray
import ray.exceptions
from ray._private import services, worker
from ray._private.accelerators import get_accelerator_manager_for_resource
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import gcs_service_pb2
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from stic_ray.core.config import ModelConfig, RunConfig
from stic_ray.core.console import configure_worker, show
from stic_ray.core.errors import ConfigError, SticError, UserError, one_line
from stic_ray.core.placement import ACCELERATOR, Machines, Need, Node, check_fits

logger = logging.getLogger(__name__)

_ANSWER_S = 15.0
"""How long the head of a cluster may take to answer. Ray itself tries for almost three minutes, and then exits."""

_MAX_TEMP_DIR_BYTES = 39
"""A socket's path has 107 bytes at most; "/ray/session_<date>_<time>_<pid>/sockets/plasma_store" is 68 of them."""

_NODE_GROUP = "ray.io/node-group"
"""Label of a machine that something starts when it is asked for: Ray's cluster launcher or KubeRay."""


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
        if is_ours and (address := cluster_address()):
            join(address, process_environment(config))
        elif is_ours:
            _start_here(config)
            here = Node({**nodes()[0].resources, "CPU": math.inf})
            check_fits(needs or {}, Machines("this machine", [here]))
        yield
    except Exception as error:
        if worker._global_node is not None and not isinstance(error, UserError):
            logger.error("Ray's logs are on each machine in %s", worker._global_node.get_logs_dir_path())
        raise
    finally:
        if is_ours:
            ray.shutdown()


def nodes() -> list[Node]:
    """Return the machines of the cluster that this process is connected to."""
    return [Node(node["Resources"], node.get("Labels") or {}) for node in ray.nodes() if node["Alive"]]


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
    address = cluster_address()
    if address is None:
        return Machines("this machine", [Node({"CPU": math.inf, **_gpus_of_this_machine(config)})])
    found = [Node(dict(node.resources_total), dict(node.labels)) for node in ask_cluster(address)]
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


def cluster_address() -> str | None:
    """Return the address of the cluster to join as HEAD:PORT, or None for a Ray of our own.

    Raises ConfigError when RAY_ADDRESS is no address that a driver can join.
    """
    address = os.environ.get("RAY_ADDRESS") or None
    if address and address.startswith("http"):
        raise ConfigError(
            f"RAY_ADDRESS={address} is a dashboard, which takes jobs: use cluster/submit.sh or `ray job submit`. A "
            "command that joins a cluster by itself needs the address of the head, as HEAD:6379."
        )
    if address and "://" in address:
        raise ConfigError(f"RAY_ADDRESS={address} is none that a driver can join; give that of the head, as HEAD:6379.")
    try:
        return services.canonicalize_bootstrap_address(address) if address else None
    except (ValueError, OSError) as error:
        raise _not_joined(error) from error


def ask_cluster(address: str) -> list[Any]:
    """Return the nodes of a cluster that are alive, as Ray's own messages, without joining it.

    Raises ConfigError when the head does not answer, or refuses.
    """
    if os.environ.get("RAY_ADDRESS") == "auto":  # as Ray does: an address that was typed turns no tokens on
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    messages: Any = gcs_service_pb2  # its classes are made while it is imported
    try:
        with cast(grpc.Channel, init_grpc_channel(address, [("grpc.enable_http_proxy", 0)])) as channel:
            request = messages.GetAllNodeInfoRequest(state_filter="ALIVE")
            return list(NodeInfoGcsServiceStub(channel).GetAllNodeInfo(request, timeout=_ANSWER_S).node_info_list)
    except ray.exceptions.AuthenticationError as error:
        raise _not_joined(error) from error
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        refused = {
            grpc.StatusCode.UNAUTHENTICATED: "it refuses this token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH "
            "to the file with the cluster's own",
            grpc.StatusCode.DEADLINE_EXCEEDED: f"it has not answered within {_ANSWER_S:g} s",
        }
        raise _not_joined(
            refused.get(error.code(), f"it does not answer as a Ray cluster does ({error.details()})")
        ) from error


def join(address: str, env_vars: dict[str, str]) -> None:
    """Join a cluster as a driver whose processes get `env_vars`.

    Raises ConfigError, within half a minute, when it does not answer, refuses, or has no node on this machine.
    """
    here = services.find_node_ids()
    if not any(node.node_id.hex() in here for node in ask_cluster(address)):
        raise _not_joined(
            "it is there, but this machine is none of its nodes; submit the command with cluster/submit.sh, or run "
            f"`ray start --address={address}` here first"
        )
    try:
        _init(env_vars, address=address)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _not_joined(error) from error


def _not_joined(reason: BaseException | str) -> ConfigError:
    return ConfigError(f"RAY_ADDRESS={os.environ['RAY_ADDRESS']} cannot be joined: {one_line(reason).rstrip('.')}.")


def _start_here(config: RunConfig) -> None:
    """Start a Ray for this process alone, with CPUs for the processes of any stage and a task.

    Raises ConfigError when the folder of temporary files is too deep for Ray's sockets and no other can be used.
    """
    has_token = any(os.environ.get(f"RAY_AUTH_TOKEN{ending}") for ending in ("", "_PATH")) or os.path.isfile(
        os.path.expanduser("~/.ray/auth_token")
    )
    if os.environ.get("RAY_AUTH_MODE", "token") == "token" and not has_token:
        # Ray would leave a token in ~/.ray, which may be read-only, and which every later `ray start` would ask for.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    generation = config.actors.num_actors * config.actors.num_cpus
    training = config.workers.num_workers * config.workers.num_cpus
    num_cpus = max(os.cpu_count() or 1, int(max(generation, training)) + 1)
    options = {"num_cpus": num_cpus, "include_dashboard": False, "_temp_dir": short_temp_dir()}
    _init(process_environment(config), address="local", **options)


def _init(env_vars: dict[str, str], **options: Any) -> None:
    """Call `ray.init` so that the console shows our own lines alone; all that Ray says is in its logs."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    worker.print_to_stdstream = _show  # Ray offers all lines of all processes or none
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    hook = f"{configure_worker.__module__}.{configure_worker.__name__}"
    sys.stderr.flush()
    on_sigterm, stderr = signal.getsignal(signal.SIGTERM), os.dup(2)
    try:
        with open(os.devnull, "wb") as nothing:  # Ray's core says there which level it was asked for
            os.dup2(nothing.fileno(), 2)
        ray.init(
            logging_level=logging.CRITICAL,
            runtime_env={"env_vars": env_vars, "worker_process_setup_hook": hook},
            **options,
        )
    except SystemExit:  # of the handler that Ray puts in the place of ours, with status 15
        signal.signal(signal.SIGTERM, on_sigterm)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
        os.dup2(stderr, 2)
        os.close(stderr)


def _show(data: dict[str, Any], ignore_prefix: bool) -> None:
    """Show those lines of a process of the cluster that are ours."""
    for line in data["lines"]:
        show(line)


def short_temp_dir() -> str | None:
    """Return a folder for Ray's files whose path is short enough for sockets, or None for Ray's own choice."""
    chosen = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(chosen)) <= _MAX_TEMP_DIR_BYTES:
        return None
    if not os.environ.get("RAY_TMPDIR"):
        with suppress(OSError):  # Ray lets everybody write into the folder that it is given
            return tempfile.mkdtemp(prefix="ray-", dir="/tmp") + "/ray"
    raise ConfigError(
        f"Ray keeps its sockets below '{chosen}', whose path has more than {_MAX_TEMP_DIR_BYTES} bytes: too long for "
        "sockets. Set RAY_TMPDIR, or TMPDIR, to a folder with a short path, as RAY_TMPDIR=/tmp/mine."
    )
