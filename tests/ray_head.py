"""A Ray head of a test's own: explicit ports, loopback only, tokens on; nothing of another Ray is touched."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

RAY = str(Path(sys.executable).with_name("ray"))


@dataclass(frozen=True)
class Head:
    """A head that runs, and how commands reach it."""

    process: psutil.Process
    address: str
    """Of its GCS, as nodes and drivers want it."""
    dashboard: str
    metrics_port: int
    folder: Path
    environment: dict[str, str]
    """With the tokens' mode and file; commands that get it need nothing else."""

    def processes(self) -> list[psutil.Process]:
        """Return the head's processes and all that they started."""
        return [self.process, *self.process.children(recursive=True)]

    def processes_of(self, word: str) -> list[psutil.Process]:
        """Return those of them with this word in their command line."""
        found = []
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                if word in process.cmdline():
                    found.append(process)
        return found


@contextmanager
def ray_head(
    *arguments: str, environment: dict[str, str] | None = None, ports: Sequence[int] | None = None
) -> Iterator[Head]:
    """Start `ray start --head` with further arguments, and end what was started at the end of the block."""
    # Sockets need a short path.
    folder = Path(tempfile.mkdtemp(prefix="head", dir="/tmp"))
    gcs, dashboard, metrics, client, agent, agent_grpc, *others = ports or free_ports(8)
    token = folder / "token"
    token.write_text("a token of the tests")
    settings = {
        **os.environ,
        "PATH": f"{Path(RAY).parent}:{os.environ['PATH']}",  # a job's `python` is the one that the head finds
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # loopback; --node-ip-address=127.0.0.1 alone becomes the machine's
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "AUTOSCALER_METRIC_PORT": str(others[0]),
        "DASHBOARD_METRIC_PORT": str(others[1]),
        **(environment or {}),
    }
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN"):
        settings.pop(name, None)
    command = [RAY, "start", "--head", "--block", f"--port={gcs}", f"--temp-dir={folder}/ray"]
    command += [
        f"--dashboard-port={dashboard}",
        f"--metrics-export-port={metrics}",
        f"--ray-client-server-port={client}",
    ]
    command += [f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"]
    command += ["--min-worker-port=0", "--max-worker-port=0", "--object-store-memory=200000000", *arguments]
    with ExitStack() as last:
        last.callback(shutil.rmtree, folder, ignore_errors=True)
        log = last.enter_context((folder / "head.log").open("wb"))
        started = subprocess.Popen(command, env=settings, stdout=log, stderr=log, start_new_session=True)
        last.callback(_end, started)
        _wait_for(lambda: "Ray runtime started" in (folder / "head.log").read_text(), started, folder)
        if "--include-dashboard=false" not in arguments:
            _wait_for(lambda: _answers(dashboard), started, folder)
        yield Head(
            psutil.Process(started.pid),
            f"127.0.0.1:{gcs}",
            f"http://127.0.0.1:{dashboard}",
            metrics,
            folder,
            settings,
        )


def free_ports(number: int) -> list[int]:
    """Return so many ports that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _answers(port: int) -> bool:
    with socket.socket() as asked:
        return asked.connect_ex(("127.0.0.1", port)) == 0


def _wait_for(what, process: subprocess.Popen[bytes], folder: Path) -> None:
    while not what():
        assert process.poll() is None, (folder / "head.log").read_text()[-3000:]
        time.sleep(0.1)


def _end(started: subprocess.Popen[bytes]) -> None:
    """End the head and what it started, jobs in sessions of their own included."""
    family = psutil.Process(started.pid).children(recursive=True)
    started.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=10)
    for process in alive:
        with suppress(psutil.NoSuchProcess):  # a raylet takes its workers with it
            process.kill()
    started.kill()
    started.wait()
