"""A cluster that is not there, is no cluster, or refuses: one line that names RAY_ADDRESS, and no wait of minutes."""

import socket
import tempfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from stic_ray.core.errors import ConfigError
from stic_ray.stages import cluster


@pytest.fixture
def web_server() -> Iterator[str]:
    server = ThreadingHTTPServer(
        ("0.0.0.0", 0), BaseHTTPRequestHandler
    )  # Ray takes localhost for the machine's own name
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def silence() -> Iterator[str]:
    """The address of something that takes connections and never says a word."""
    with socket.socket() as listening:
        listening.bind(("0.0.0.0", 0))
        listening.listen()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def refusal(address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The line that both a plan and a run end with."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    lines = set()
    for act in (cluster.ask_cluster, lambda place: cluster.join(place, {})):
        with pytest.raises(ConfigError) as caught:
            act(cluster.cluster_address() or "")
        lines.add(str(caught.value))
    [line] = lines
    assert "\n" not in line and not line.endswith("..")
    return line


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:1", "Connection refused"),
        ("no-such-host.invalid:6379", "no-such-host.invalid"),
        ("no address", "no address"),
        ("ray://127.0.0.1:10001", "HEAD:6379"),
        ("https://127.0.0.1:8265", "takes jobs"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(address: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line = refusal(address, monkeypatch)
    assert f"RAY_ADDRESS={address}" in line and reason in line


def test_a_server_that_is_no_ray_is_one_line(web_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"RAY_ADDRESS={web_server} cannot be joined: it does not answer" in refusal(web_server, monkeypatch)


def test_a_server_that_never_answers_is_given_up(silence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_ANSWER_S", 1.0)
    assert f"RAY_ADDRESS={silence} cannot be joined" in refusal(silence, monkeypatch)


@pytest.mark.parametrize("address", ["", "local"])
def test_without_a_cluster_there_is_no_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster.cluster_address() is None


def test_a_long_folder_of_temporary_files_is_replaced_and_a_chosen_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is often set by the system, the second is the user's own word."""
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert cluster.short_temp_dir() is None
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    chosen = cluster.short_temp_dir()
    assert chosen is not None and len(chosen) < 30 and Path(chosen).parent.stat().st_mode & 0o77 == 0
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(ConfigError, match=r"RAY_TMPDIR, or TMPDIR.*short path"):
        cluster.short_temp_dir()
