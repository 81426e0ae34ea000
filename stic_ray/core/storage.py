"""Files on a local disk or an object store, behind one address."""

import mmap
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow import fs

from stic_ray.core.errors import SourceError

_STORES_WITHOUT_RENAME = ("s3", "gcs", "abfs")
_BUCKET_SCHEMES = ("s3", "gs", "gcs")
"""In their addresses the bucket stands where others have a host."""
_SAFE = "/:=+,@!$&'()*;~"
"""Characters beside letters, digits and ._- that may stand in the path of a URI as they are."""
_LOCAL = fs.LocalFileSystem()


@lru_cache(maxsize=64)
def _of_bucket(root: str) -> fs.FileSystem:
    """Open the store of a bucket once per process: each opening asks the environment, and may ask for the region."""
    return fs.FileSystem.from_uri(root)[0]


@dataclass(frozen=True)
class Location:
    """A file or folder: a file system of pyarrow and a path in it. Travels between processes."""

    filesystem: fs.FileSystem
    path: str
    uri: str

    @staticmethod
    def of(uri: str) -> "Location":
        """Open a local path (relative ones against the working directory) or an s3://, gs://, hdfs:// URI.

        Options of a URI (`s3://bucket/images?endpoint_override=...`) hold for every address derived from it.
        Credentials come from the environment. Raises SourceError for a scheme that pyarrow does not know, and for
        credentials in a URI, which would end up in the files of the run.
        """
        if "://" not in uri:
            path = os.path.abspath(os.path.expanduser(uri))
            return Location(_LOCAL, path, path)
        scheme, _, rest = uri.partition("://")
        address, mark, query = rest.partition("?")
        if "@" in address.split("/", 1)[0]:
            raise SourceError(
                f"'{scheme}://...@{address.split('@', 1)[1]}' holds credentials, which would be written into the run; "
                "set them in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for one)."
            )
        address = quote(address.rstrip("/"), safe=_SAFE + "%") if scheme != "file" else address
        options = mark + query
        try:
            if scheme in _BUCKET_SCHEMES:
                bucket = address.split("/", 1)[0]
                filesystem, path = _of_bucket(f"{scheme}://{bucket}{options}"), unquote(address)
            else:
                filesystem, path = fs.FileSystem.from_uri(f"{scheme}://{address}{options}")
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise SourceError(f"Cannot open '{uri}': {str(error).splitlines()[0]}") from error
        return Location(filesystem, path, path if scheme == "file" else f"{scheme}://{address}{options}")

    def __truediv__(self, name: str) -> "Location":
        """Return the location of `name` below this one."""
        return self.at(f"{self.path.rstrip('/')}/{name}")

    def at(self, path: str) -> "Location":
        """Return the location of another path of the same file system."""
        scheme, separator, rest = self.uri.partition("://")
        if not separator:
            return Location(self.filesystem, path, path)
        address, mark, query = rest.partition("?")
        host = "" if scheme in _BUCKET_SCHEMES else address.split("/", 1)[0]
        return Location(self.filesystem, path, f"{scheme}://{host}{quote(path, safe=_SAFE)}{mark}{query}")

    @property
    def folder(self) -> "Location":
        """The folder that a file is in."""
        return self.at(self.path.rsplit("/", 1)[0])

    def address_of(self, path: str) -> str:
        """Return what a path or URI means to a reader in this folder: relative ones are below it."""
        return path if path.startswith("/") or "://" in path else (self / path).uri

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
            raise FileNotFoundError(f"'{self.path}' is no regular file, or is gone")
        return self.filesystem.open_input_file(self.path)

    def read(self) -> bytes:
        """Return the content. Raises OSError as `open` does."""
        with self.open() as stream:
            return stream.read()

    def read_range(self, offset: int, num_bytes: int) -> bytes:
        """Return a part of the content, fewer bytes where the file ends. Raises OSError as `open` does."""
        with self.open() as stream:
            return stream.read_at(num_bytes, offset)

    def write(self, content: bytes | pa.Buffer | mmap.mmap) -> None:
        """Write the whole file at once: a reader sees the old content or the new, never a part."""
        if self.filesystem.type_name in _STORES_WITHOUT_RENAME:
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(content)  # one call, which a store takes whole or refuses
            return
        with self.writing() as stream:
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
        """Remove the file."""
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

    def local_copy(self) -> Path:
        """Return a local path with the content: the path itself on a local disk, else a download.

        Downloads go to the machine's temporary folder, once per machine and state of the files.
        """
        if self.is_local:
            return Path(self.path)
        files = self.files(recursive=True) if self.is_folder() else [self.info()]
        state = [self.uri, *(f"{file.path} {file.size} {file.mtime_ns}" for file in files)]
        target = Path(tempfile.gettempdir()) / "stic_ray" / uuid.uuid5(uuid.NAMESPACE_URL, "\n".join(state)).hex
        if not target.exists():
            partial = Path(tempfile.mkdtemp(prefix="stic_ray_")) / "content"
            if self.is_folder():
                partial.mkdir()
                fs.copy_files(self.path, str(partial), source_filesystem=self.filesystem)
            else:
                partial.write_bytes(self.read())
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                partial.rename(target)
            except OSError:
                if not target.exists():  # else another process of this machine was first
                    raise
            shutil.rmtree(partial.parent)
        return target
