"""Files behind one address: a reader never sees a part, and a failed write leaves nothing behind."""

import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import pytest
from pyarrow import fs

from stic_ray.core.errors import Rejected, SourceError
from stic_ray.core.rundir import RunDir
from stic_ray.core.storage import Location

MEGABYTE = 1 << 20
OPTIONS = "endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"


@contextmanager
def disk_full_after(num_bytes: int) -> Iterator[None]:
    """Let no file grow beyond `num_bytes`, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def names_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_location_is_written_read_and_listed(tmp_path: Path) -> None:
    folder = Location.of(str(tmp_path)) / "a" / "b"
    (folder / "two.txt").write(b"2")
    (folder / "one.txt").write(b"1")
    assert (folder / "one.txt").read() == b"1"
    assert [file.base_name for file in folder.files()] == ["one.txt", "two.txt"]
    assert [file.base_name for file in Location.of(str(tmp_path)).files(recursive=True)] == ["one.txt", "two.txt"]
    assert folder.is_folder() and not (folder / "one.txt").is_folder()
    assert (folder / "one.txt").exists() and not (folder / "three.txt").exists()
    assert (folder.name, (folder / "one.txt").name) == ("b", "one.txt")
    assert (folder / "absent").files() == []


def test_a_relative_path_is_below_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Location.of("runs/a.txt").write(b"x")
    assert (tmp_path / "runs" / "a.txt").read_bytes() == b"x"


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_the_address_is_what_the_user_can_type_again(prefix: str, tmp_path: Path) -> None:
    location = Location.of(f"{prefix}{tmp_path}") / "x"
    location.write(b"x")
    assert Location.of(location.uri).read() == b"x"
    assert location.is_local
    assert location.at(f"{tmp_path}/x").read() == b"x"


@pytest.mark.parametrize(
    "uri",
    [
        "ftp://host/images",
        "nonsense://x",
        pytest.param(
            "hdfs://namenode:8020/images",
            marks=pytest.mark.skipif("HADOOP_HOME" in os.environ, reason="there is a Hadoop client"),
        ),
    ],
)
def test_an_address_that_cannot_be_opened_is_refused_in_one_line(uri: str) -> None:
    with pytest.raises(SourceError) as caught:
        Location.of(uri)
    assert uri in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_reader_sees_the_old_content_or_the_new_and_never_another_name(tmp_path: Path) -> None:
    """A writer replaces a shard again and again; what a reader's glob finds is always whole."""
    contents = [letter * MEGABYTE for letter in (b"a", b"b", b"c")]
    shard = Location.of(str(tmp_path)) / "pairs-000000.parquet"
    shard.write(contents[0])
    done = threading.Event()

    def write_often() -> None:
        for number in range(60):
            shard.write(contents[number % 3])
        done.set()

    writer = threading.Thread(target=write_often)
    writer.start()
    seen, names = set(), set()
    while not done.is_set():
        found = os.listdir(tmp_path)
        names |= {name for name in found if fnmatch(name, "*.parquet") or fnmatch(name, "pairs-*")}
        seen |= {Path(tmp_path, name).read_bytes() for name in names}
    writer.join()
    assert seen <= set(contents)
    assert len(seen) > 1, "the reader looked on while the content changed"
    assert names == {"pairs-000000.parquet"}


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    file = Location.of(str(tmp_path)) / "pairs-000000.parquet"
    file.write(b"old")
    with disk_full_after(MEGABYTE), pytest.raises(OSError):
        file.write(b"x" * (3 * MEGABYTE))
    assert file.read() == b"old"
    assert names_below(tmp_path) == ["pairs-000000.parquet"]


@pytest.mark.usefixtures("endpoint")
@pytest.mark.parametrize("size", [0, 10, 12 * MEGABYTE])
def test_a_block_that_raises_leaves_an_object_of_a_bucket_as_it_was(size: int) -> None:
    """S3's streams publish what they have when they are closed, even by an error."""
    file = Location.of("s3://pictures") / "blocks" / f"{size}.bin"
    for content in (b"old", None):
        with pytest.raises(ConnectionError, match="interrupted"), file.writing() as stream:
            stream.write(b"new" * size)
            raise ConnectionError("interrupted")
        assert file.read() == b"old" if content is None else not file.exists()
        file.write(b"old")
    with file.writing() as stream:
        stream.write(b"x" * size)
        assert stream.tell() == size
        stream.write(b"y")
    assert file.read() == b"x" * size + b"y"
    with file.writing():
        pass
    assert file.read() == b""


def test_a_write_that_cannot_be_published_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "taken" / "inner").mkdir(parents=True)
    with pytest.raises(OSError):
        (Location.of(str(tmp_path)) / "taken").write(b"x")
    assert names_below(tmp_path) == ["taken", "taken/inner"]


def test_a_writer_killed_in_the_middle_of_a_shard_leaves_none(tmp_path: Path) -> None:
    """The kernel kills the process as its file passes one megabyte."""
    program = (
        "import resource, signal, sys\n"
        "from stic_ray.core.storage import Location\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({MEGABYTE}, {MEGABYTE}))\n"
        "Location.of(sys.argv[1]).write(b'x' * (3 << 20))\n"
    )
    target = tmp_path / "pairs-000007.parquet"
    finished = subprocess.run([sys.executable, "-c", program, str(target)], capture_output=True, check=False)
    assert finished.returncode == -signal.SIGXFSZ
    left = names_below(tmp_path)
    assert len(left) == 1, "it was killed while it wrote"
    assert not any(fnmatch(name, pattern) for name in left for pattern in ("*.parquet", "pairs-*", "*.json", "*.html"))
    assert RunDir.of(str(tmp_path)).shards("pairs") == []


def a_checkpoint(folder: Path, size: int = 10) -> Path:
    (folder / "nested").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"w" * size)
    (folder / "nested" / "config.json").write_text("{}", encoding="utf-8")
    return folder


def test_a_folder_is_uploaded_whole_and_replaces_the_one_before(tmp_path: Path) -> None:
    target = Location.of(str(tmp_path / "run" / "checkpoint"))
    (target / "stale.txt").write(b"from an earlier attempt")
    target.upload_folder(a_checkpoint(tmp_path / "local"))
    expected = ["checkpoint", "checkpoint/model.safetensors", "checkpoint/nested", "checkpoint/nested/config.json"]
    assert names_below(tmp_path / "run") == expected


def test_an_upload_that_fails_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    source = a_checkpoint(tmp_path / "local", size=3 * MEGABYTE)
    target = Location.of(str(tmp_path / "run" / "checkpoint"))
    (target / "old.txt").write(b"old")
    with disk_full_after(MEGABYTE), pytest.raises(OSError):
        target.upload_folder(source)
    assert names_below(tmp_path / "run") == ["checkpoint", "checkpoint/old.txt"]


def test_a_folder_is_deleted_if_it_is_there(tmp_path: Path) -> None:
    folder = Location.of(str(a_checkpoint(tmp_path / "x")))
    folder.delete_folder()
    folder.delete_folder()
    assert not (tmp_path / "x").exists()


def test_a_location_travels_between_processes(tmp_path: Path) -> None:
    location = Location.of(str(tmp_path)) / "x"
    location.write(b"x")
    assert pickle.loads(pickle.dumps(location)).read() == b"x"


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Location:
    """A folder that ordinary programs cannot open by its path, as in an object store."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "machine"))
    store = fs.SubTreeFileSystem(str(a_checkpoint(tmp_path / "store").parent), fs.LocalFileSystem())
    return Location(store, "store", "s3://bucket/")


def test_a_local_copy_is_the_place_itself_or_a_download(remote: Location, tmp_path: Path) -> None:
    assert Location.of(str(tmp_path)).local_copy() == tmp_path
    assert not remote.is_local
    copy = remote.local_copy()
    assert copy.is_relative_to(tmp_path / "machine")
    assert names_below(copy) == ["model.safetensors", "nested", "nested/config.json"]
    assert remote.local_copy() == copy
    [private] = (tmp_path / "machine").iterdir()
    assert private.stat().st_mode & 0o777 == 0o700, "nobody else can put a model there"
    assert {path.name for path in private.iterdir()} == {copy.name, f"{copy.name}.lock"}, "no half of one stays"


def test_a_checkpoint_made_anew_is_downloaded_anew(remote: Location) -> None:
    """A stage that is deleted and run again leaves another model at the same address."""
    assert (remote.local_copy() / "model.safetensors").read_bytes() == b"w" * 10
    (remote / "model.safetensors").write(b"another model")
    assert (remote.local_copy() / "model.safetensors").read_bytes() == b"another model"


def test_processes_that_ask_together_download_once(remote: Location, tmp_path: Path) -> None:
    """Each download would be a folder of its own in the cache; all wait for the first and get its files."""
    with ThreadPoolExecutor(8) as threads:
        copies = list(threads.map(lambda _: remote.local_copy(), range(8)))
    inodes = {(copy / "model.safetensors").stat().st_ino for copy in copies}
    assert len(set(copies)) == len(inodes) == 1


def test_a_copy_that_nobody_asks_for_is_removed_in_the_end(remote: Location) -> None:
    old = remote.local_copy()
    (remote / "model.safetensors").write(b"another model")
    os.utime(old, (0, 0))
    new = remote.local_copy()
    assert new.exists() and not old.exists()


@pytest.mark.parametrize(
    ("folder", "path", "expected"),
    [
        ("/data/set", "a.png", "/data/set/a.png"),
        ("/data/set", "b/../a?.png", "/data/set/a?.png"),
        ("/data/set", "/data/set/deep/a.png", "/data/set/deep/a.png"),
        ("/data/set", "file:///data/set/a.png", "/data/set/a.png"),
        ("/data/set", "../a.png", None),
        ("/data/set", "/data/set/../settings/a.png", None),
        ("/data/set", "/data/settings/a.png", None),
        ("/data/set", "/etc/passwd", None),
        ("/data/set", "s3://bucket/a.png", None),
        ("/data/set", "https://host/a.png", None),
        (f"s3://bucket/set?{OPTIONS}", "a b.png", f"s3://bucket/set/a%20b.png?{OPTIONS}"),
        (f"s3://bucket/set?{OPTIONS}", "a.png?b", f"s3://bucket/set/a.png%3Fb?{OPTIONS}"),
        (f"s3://bucket/set?{OPTIONS}", "x//a.png", f"s3://bucket/set/x//a.png?{OPTIONS}"),
        (f"s3://bucket/set?{OPTIONS}", "s3://bucket/set/a%20b.png", f"s3://bucket/set/a%20b.png?{OPTIONS}"),
        (f"s3://bucket/set?{OPTIONS}", "s3://bucket/set/a.png?endpoint_override=127.0.0.1:1", None),
        (f"s3://bucket/set?{OPTIONS}", "s3://bucket/other/a.png", None),
        (f"s3://bucket/set?{OPTIONS}", "s3://other/set/a.png", None),
        (f"s3://bucket/set?{OPTIONS}", "s3://key:secret@bucket/set/a.png", None),
        (f"s3://bucket/set?{OPTIONS}", "../../other/a.png", None),
        (f"s3://bucket/set?{OPTIONS}", "gs://bucket/set/a.png", None),
        (f"s3://bucket/set?{OPTIONS}", "/etc/passwd", None),
        ("gs://anonymous@bucket/set", "a.png", "gs://anonymous@bucket/set/a.png"),
        ("gs://anonymous@bucket/set", "gs://bucket/set/a.png", None),
        ("abfss://box@account.dfs.core.windows.net/set", "a.png", "abfss://box@account.dfs.core.windows.net/set/a.png"),
        ("abfss://box@account.dfs.core.windows.net/set", "abfss://box@evil.dfs.core.windows.net/set/a.png", None),
    ],
)
def test_what_data_says_stays_below_its_source_and_in_its_store(folder: str, path: str, expected: str | None) -> None:
    if expected is None:
        with pytest.raises(Rejected, match="unreadable_file") as caught:
            Location.of(folder).inside(path)
        assert repr(path)[1:-1] in caught.value.message
    else:
        found = Location.of(folder).inside(path)
        assert found.uri == expected
        assert Location.of(found.uri).path == found.path, "as an index row carries it to another machine"


def test_a_table_in_an_inner_folder_reaches_all_of_its_source() -> None:
    source = Location.of("/data/set")
    assert (source / "tables").inside("../images/a.png", source).path == "/data/set/images/a.png"
    with pytest.raises(Rejected):
        (source / "tables").inside("../../other/a.png", source)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.png", f"s3://bucket/lists/a.png?{OPTIONS}"),
        ("s3://other/a.png", f"s3://other/a.png?{OPTIONS}"),
        ("s3://other/a.png?region=x", "s3://other/a.png?region=x"),
        ("gs://other/a.png", "gs://other/a.png"),
        ("/data/a.png", "/data/a.png"),
    ],
)
def test_a_list_names_any_place_with_the_options_of_its_own(path: str, expected: str) -> None:
    assert Location.of(f"s3://bucket/lists?{OPTIONS}").address_of(path) == expected


@pytest.mark.parametrize("uri", ["gs://anonymous@bucket/images", "abfss://box@account.dfs.core.windows.net/images"])
def test_an_account_in_an_address_is_no_secret(uri: str) -> None:
    location = Location.of(uri)
    assert (location / "a.png").folder.uri == location.uri
    assert Location.of((location / "a.png").uri).path == (location / "a.png").path


@pytest.mark.parametrize("uri", ["s3://key:secret@b/x", "s3://key@b/x", "gs://me:secret@b/x", "abfss://c:secret@a/x"])
def test_a_secret_in_an_address_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(SourceError, match="holds credentials") as caught:
        Location.of(uri)
    assert "secret" not in str(caught.value)
