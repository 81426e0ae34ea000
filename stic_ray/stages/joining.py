"""Where Ray is: in the cluster at RAY_ADDRESS, or started on this machine for this run alone."""

import logging
import os
import secrets
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import ray
import ray.exceptions
from ray._private import services, worker
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import gcs_service_pb2
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

from stic_ray.core.console import configure_worker, show
from stic_ray.core.errors import ConfigError, one_line
from stic_ray.core.placement import Node

_ANSWER_S = 15.0
"""How long the head of a cluster may take to answer. Ray itself tries for almost three minutes, and then exits."""

_MAX_TEMP_DIR_BYTES = 39
"""A socket's path has 107 bytes at most; "/ray/session_<date>_<time>_<pid>/sockets/plasma_store" is 68 of them."""

_MESSAGES: Any = gcs_service_pb2
"""Its classes are made while it is imported, where no checker of types sees them."""

_REFUSED = {
    grpc.StatusCode.UNAUTHENTICATED: "it refuses this token; set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the "
    "file with the cluster's own",
    grpc.StatusCode.DEADLINE_EXCEEDED: f"it has not answered within {_ANSWER_S:g} s",
}


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
        raise _not_joined(address, one_line(error)) from error


def ask_cluster(address: str) -> list[Node]:
    """Return the machines of a cluster without joining it. Raises ConfigError when it does not answer, or refuses."""
    return [Node(dict(node.resources_total), dict(node.labels)) for node in _nodes(address)]


def join(address: str, env_vars: dict[str, str]) -> None:
    """Join a cluster as a driver whose processes get `env_vars`.

    Raises ConfigError, within half a minute, when it does not answer, refuses, or has no node on this machine.
    """
    here = services.find_node_ids()
    if not any(node.node_id.hex() in here for node in _nodes(address)):
        raise _not_joined(
            address,
            "it is there, but this machine is none of its nodes; submit the command with cluster/submit.sh, or run "
            f"`ray start --address={address}` here first",
        )
    try:
        _init(env_vars, address=address)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _not_joined(address, one_line(error)) from error


def start_here(env_vars: dict[str, str], num_cpus: int) -> None:
    """Start a Ray of so many CPUs for this process alone, whose processes get `env_vars`.

    Raises ConfigError when the folder of temporary files is too deep for Ray's sockets and no other can be used.
    """
    if os.environ.get("RAY_AUTH_MODE", "token") == "token" and not _has_token():
        # Ray would leave a token in ~/.ray, which may be read-only, and which every later `ray start` would ask for.
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    _init(env_vars, address="local", num_cpus=num_cpus, include_dashboard=False, _temp_dir=short_temp_dir())


def _init(env_vars: dict[str, str], **options: Any) -> None:
    """Call `ray.init` so that the console shows our own lines alone; all that Ray says is in its logs."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    worker.print_to_stdstream = _show  # Ray offers all lines of all processes or none
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    hook = f"{configure_worker.__module__}.{configure_worker.__name__}"
    with _signals_kept(), _stderr_closed():  # Ray's core says there which level it was asked for
        ray.init(
            logging_level=logging.CRITICAL,
            runtime_env={"env_vars": env_vars, "worker_process_setup_hook": hook},
            **options,
        )


@contextmanager
def _stderr_closed() -> Iterator[None]:
    """Drop what C++ writes to stderr. An error of the block is a Python exception, which loses nothing."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _show(data: dict[str, Any], ignore_prefix: bool) -> None:
    """Show those lines of a process of the cluster that are ours."""
    for line in data["lines"]:
        show(line)


def _nodes(address: str) -> list[Any]:
    """Ask the head for the nodes that are alive, as Ray's own messages."""
    if os.environ.get("RAY_ADDRESS") == "auto":  # as Ray does: an address that was typed turns no tokens on
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        with cast(grpc.Channel, init_grpc_channel(address, [("grpc.enable_http_proxy", 0)])) as channel:
            request = _MESSAGES.GetAllNodeInfoRequest(state_filter="ALIVE")
            answer = NodeInfoGcsServiceStub(channel).GetAllNodeInfo(request, timeout=_ANSWER_S)
    except ray.exceptions.AuthenticationError as error:
        raise _not_joined(address, one_line(error)) from error
    except grpc.RpcError as error:
        assert isinstance(error, grpc.Call)
        reason = _REFUSED.get(error.code(), f"it does not answer as a Ray cluster does ({error.details()})")
        raise _not_joined(address, reason) from error
    return list(answer.node_info_list)


def _has_token() -> bool:
    """Return whether Ray finds a token of the user's."""
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(given) or os.path.isfile(os.path.expanduser("~/.ray/auth_token"))


def _not_joined(address: str | None, reason: str) -> ConfigError:
    return ConfigError(f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS', address)} cannot be joined: {reason.rstrip('.')}.")


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Keep this process's answer to SIGTERM, which `ray.init` replaces by an exit with status 15."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def short_temp_dir() -> str | None:
    """Return a folder for Ray's files whose path is short enough for sockets, or None for Ray's own choice."""
    chosen = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(chosen)) <= _MAX_TEMP_DIR_BYTES:
        return None
    short = Path(f"/tmp/ray-{os.getuid()}")
    try:
        if not os.environ.get("RAY_TMPDIR"):
            short.mkdir(mode=0o700, exist_ok=True)
            found = short.lstat()
            if found.st_mode == stat.S_IFDIR | 0o700 and found.st_uid == os.getuid():  # nobody else's work
                return str(short / "ray")  # Ray lets everybody write into the folder that it is given
    except OSError:
        pass
    raise ConfigError(
        f"Ray keeps its sockets below '{chosen}', whose path has more than {_MAX_TEMP_DIR_BYTES} bytes: too long for "
        "sockets. Set RAY_TMPDIR, or TMPDIR, to a folder with a short path, as RAY_TMPDIR=/tmp/mine."
    )
