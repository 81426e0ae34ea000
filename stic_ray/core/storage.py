"""Files on a local disk or an object store, behind one address."""

import mmap
import os
import posixpath
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO
from urllib.parse import quote, unquote

import pyarrow as pa
from filelock import FileLock
from pyarrow import fs

from stic_ray.core.errors import Rejected, SourceError, one_line
from stic_ray.core.schemas import Reason

_STORES_WITHOUT_RENAME = ("s3", "gcs", "abfs")
_BUCKET_SCHEMES = ("s3", "gs", "gcs")
"""In their addresses the bucket stands where others have a host."""
_AZURE_SCHEMES = ("abfs", "abfss")
"""In their addresses the container may stand before the host: abfss://container@account.dfs.core.windows.net."""
_SAFE = "/:=+,@!$&'()*;~"
"""Characters beside letters, digits and ._- that may stand in the path of a URI as they are."""
_KEPT_S = 7 * 24 * 3600
"""After so long without use, the local copy of a remote file or folder is removed."""


@lru_cache(maxsize=64)
def _open(address: str) -> fs.FileSystem:
    """Open a store once per process: each opening asks the environment, and may ask for a bucket's region."""
    return fs.FileSystem.from_uri(address)[0]


def _split(scheme: str, address: str) -> tuple[str, str]:
    """Return how the URIs of a store begin (all buckets are in one), and the path in its file system."""
    authority, slash, below = address.partition("/")
    user, at, host = authority.rpartition("@")
    if scheme in _BUCKET_SCHEMES:
        return f"{scheme}://{user}{at}", unquote(host + slash + below)
    below = f"{user}/{below}".lstrip("/") if scheme in _AZURE_SCHEMES else f"/{below}"
    return f"{scheme}://{authority}/", unquote(below)


@dataclass(frozen=True)
class Location:
    """A file or folder: a file system of pyarrow and a path in it. Travels between processes."""

    filesystem: fs.FileSystem
    path: str
    store: str = ""
    """How its URI begins, in front of the path; empty for local paths."""
    options: str = ""
    """How its URI ends, as "?endpoint_override=..."."""

    @staticmethod
    def of(uri: str) -> "Location":
        """Open what a user typed: a local path (relative to the working directory) or an s3://, gs://, hdfs:// URI.

        Options of a URI (`s3://bucket/images?endpoint_override=...`) hold for every address derived from it.
        Credentials come from the environment. Raises SourceError for a scheme that pyarrow does not know, and for
        credentials in a URI, which would end up in the files of the run. What data says is opened by `inside`.
        """
        if "://" not in uri:
            return Location(fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri)))
        scheme, _, rest = uri.partition("://")
        address, mark, query = rest.partition("?")
        host = address.partition("/")[0]
        user = host.rpartition("@")[0]
        if ":" in user or (user and scheme == "s3"):
            raise SourceError(
                f"'{scheme}://...@{address.split('@', 1)[1]}' holds credentials, which would be written into the run; "
                "set them in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for one)."
            )
        options = mark + query
        store, path = _split(scheme, address.rstrip("/"))
        try:
            if scheme == "file":
                return Location(*fs.FileSystem.from_uri(uri))
            filesystem = _open(f"{scheme}://{host}{options}")
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise SourceError(f"Cannot open '{uri}': {one_line(error)}") from error
        return Location(filesystem, path, store, options)

    @property
    def uri(self) -> str:
        """The address, of which `of` makes the same location."""
        scheme, _, authority = self.store.partition("://")
        if not scheme:
            return self.path
        container = authority.rpartition("@")[0] if scheme in _AZURE_SCHEMES else ""
        return self.store + quote(self.path.removeprefix(container).lstrip("/"), safe=_SAFE) + self.options

    def __truediv__(self, name: str) -> "Location":
        """Return the location of `name` below this one."""
        return self.at(f"{self.path.rstrip('/')}/{name}")

    def at(self, path: str) -> "Location":
        """Return the location of another path of the same file system."""
        return replace(self, path=path)

    @property
    def folder(self) -> "Location":
        """The folder that a file is in."""
        return self.at(self.path.rsplit("/", 1)[0])

    def inside(self, path: str, root: "Location | None" = None) -> "Location":
        """Return what a path or URI that stands in data means in this folder: in its store, with its options.

        Raises Rejected for what is not below `root` (this folder, when None): a '..' that leads out, an absolute path
        or another store, and for options behind a '?', which would choose the server that gets our requests.
        """
        scheme, separator, address = path.partition("://")
        if not separator:
            target = path if path.startswith("/") else f"{self.path}/{path}"
        elif scheme == "file" and self.is_local:
            target = unquote(address)
        else:
            store, target = _split(scheme, address)
            if store != self.store or "?" in address:
                target = ""
        limit = (root or self).path.strip("/")
        normal = posixpath.normpath(target)
        if not target or not f"/{normal.strip('/')}/".startswith(f"/{limit}/" if limit else "/"):
            raise Rejected(Reason.UNREADABLE_FILE, f"'{path}' is not below '{(root or self).uri}'")
        return self.at(normal if ".." in target.split("/") else target)

    def address_of(self, path: str) -> str:
        """Return the address that a path or URI of a list means: any place, relative ones in this folder.

        The options of this folder hold for its own kind of store. Options behind a '?' stay for the reader to refuse.
        """
        scheme, separator, _ = path.partition("://")
        if not separator:
            return path if path.startswith("/") else (self / path).uri
        is_alike = self.store.startswith(f"{scheme}://") and "?" not in path
        return path + self.options if is_alike else path

    @property
    def is_local(self) -> bool:
        """Whether ordinary programs can open the path."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    def info(self) -> fs.FileInfo:
        """Return type and size."""
        return self.filesystem.get_file_info(self.path)

    def exists(self) -> bool:
        """Whether there is a file or folder."""
        return self.info().type != fs.FileType.NotFound

    def is_folder(self) -> bool:
        """Whether there is a folder."""
        return self.info().type == fs.FileType.Directory

    def files(self, *, recursive: bool = False) -> list[fs.FileInfo]:
        """List what is below and no folder, ordered by path. Raises SourceError as `below`."""
        return [info for info in self.below(recursive=recursive) if info.type != fs.FileType.Directory]

    def below(self, *, recursive: bool = False) -> list[fs.FileInfo]:
        """List files and folders below, ordered by path; an absent folder has none.

        Raises SourceError for a name that is not UTF-8.
        """
        selector = fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        try:
            return sorted(self.filesystem.get_file_info(selector), key=lambda info: info.path)
        except UnicodeDecodeError as error:
            name = error.object.decode("utf-8", "backslashreplace")
            raise SourceError(f"A file below '{self.uri}' has a name that is not UTF-8, rename it: {name}") from error

    def open(self) -> pa.NativeFile:
        """Open the file for reading at any place. Raises OSError when it cannot be, as a pipe or a broken link."""
        if self.is_local and not os.path.isfile(self.path):
            raise FileNotFoundError(f"'{self.path}' is gone, is no regular file, or has a name that is not UTF-8")
        return self.filesystem.open_input_file(self.path)

    def read(self) -> bytes:
        """Return the content. Raises OSError as `open` does."""
        with self.open() as stream:
            return stream.read()

    def write(self, content: bytes | pa.Buffer | mmap.mmap) -> None:
        """Write the whole file at once: a reader sees the old content or the new, never a part."""
        at_once = self.filesystem.type_name in _STORES_WITHOUT_RENAME  # one call, which a store takes whole or refuses
        with self.filesystem.open_output_stream(self.path) if at_once else self.writing() as stream:
            stream.write(content)

    @contextmanager
    def writing(self) -> Iterator[pa.NativeFile | IO[bytes]]:
        """Open the file for writing; it is there, whole, when the block ends, and as before when it raises.

        Where the store can rename, a temporary file is moved into place. Object stores publish a file when it is
        closed, even by an error: what is for them is collected on the local disk and sent at the end.
        """
        if self.filesystem.type_name in _STORES_WITHOUT_RENAME:
            with tempfile.TemporaryFile() as collected:
                yield collected
                collected.flush()
                self.write(mmap.mmap(collected.fileno(), 0, access=mmap.ACCESS_READ) if collected.tell() else b"")
            return
        parent = self.path.rsplit("/", 1)[0]
        self.filesystem.create_dir(parent, recursive=True)
        temporary = f"{parent}/.{self.name}.{uuid.uuid4().hex}.tmp"
        try:
            with self.filesystem.open_output_stream(temporary) as stream:
                yield stream
            self.filesystem.move(temporary, self.path)
        except BaseException:
            if self.filesystem.get_file_info(temporary).type == fs.FileType.File:
                self.filesystem.delete_file(temporary)
            raise

    def delete(self) -> None:
        """Remove the file, if it is there."""
        if self.exists():
            self.filesystem.delete_file(self.path)

    def delete_folder(self) -> None:
        """Remove the folder and all below it, if it is there."""
        if self.is_folder():
            self.filesystem.delete_dir(self.path)

    def upload_folder(self, source: Path) -> None:
        """Copy a local folder here; where the store can rename, it appears whole or not at all."""
        if self.filesystem.type_name in _STORES_WITHOUT_RENAME:
            fs.copy_files(str(source), self.path, destination_filesystem=self.filesystem)
            return
        temporary = f"{self.path}.{uuid.uuid4().hex}.tmp"
        self.filesystem.create_dir(temporary, recursive=True)
        try:
            fs.copy_files(str(source), temporary, destination_filesystem=self.filesystem)
            self.delete_folder()
            self.filesystem.move(temporary, self.path)
        except BaseException:
            self.at(temporary).delete_folder()
            raise

    def holds_files(self) -> bool:
        """Whether the folder is there and not empty, as the place of a disk that is not mounted is."""
        try:  # there are no empty folders in an object store
            return bool(os.listdir(self.path)) if self.is_local else self.is_folder()
        except OSError:
            return False

    def local_copy(self, wanted: Callable[[str], bool] = lambda name: True) -> Path:
        """Return a local path with the content: the path itself on a local disk, else a download.

        Of a folder, the files are downloaded whose paths in it are `wanted`. Downloads go to a folder of this user's
        alone below the cache, once per machine and state of the files: other processes wait for it. Those that were
        not asked for in a week are removed.
        """
        if self.is_local:
            return Path(self.path)
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "stic_ray"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        cache.chmod(0o700)  # fails for what another user put there
        files = self.files(recursive=True) if self.is_folder() else [self.info()]
        files = [file for file in files if wanted(posixpath.relpath(file.path, self.path))]
        state = [self.uri, *(f"{file.path} {file.size} {file.mtime_ns}" for file in files)]
        target = cache / uuid.uuid5(uuid.NAMESPACE_URL, "\n".join(state)).hex
        with FileLock(f"{target}.lock"):
            if not target.exists():
                for old in cache.iterdir():
                    with suppress(OSError):  # another process may be at it, too
                        if time.time() - old.stat().st_mtime > _KEPT_S:
                            shutil.rmtree(old) if old.is_dir() else old.unlink()
                with tempfile.TemporaryDirectory(dir=cache) as folder, ThreadPoolExecutor() as threads:
                    partial = Path(folder) / "content"
                    copies = {file.path: partial / posixpath.relpath(file.path, self.path) for file in files}
                    for copy in copies.values():
                        copy.parent.mkdir(parents=True, exist_ok=True)
                    list(threads.map(lambda path: fs.copy_files(path, str(copies[path]), self.filesystem), copies))
                    partial.rename(target)
            os.utime(target)
        return target
