"""Files on a local disk or an object store, behind one address."""

import os
import shutil
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from stic_ray.core.errors import SourceError

_STORES_WITHOUT_RENAME = ("s3", "gcs", "abfs")


@dataclass(frozen=True)
class Location:
    """A file or folder: a file system of pyarrow and a path in it. Travels between processes."""

    filesystem: fs.FileSystem
    path: str
    uri: str

    @staticmethod
    def of(uri: str) -> "Location":
        """Open a local path (relative ones against the working directory) or an s3://, gs://, hdfs:// URI.

        Raises SourceError for a scheme that pyarrow does not know.
        """
        if "://" not in uri:
            path = os.path.abspath(os.path.expanduser(uri))
            return Location(fs.LocalFileSystem(), path, path)
        try:
            filesystem, path = fs.FileSystem.from_uri(uri)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise SourceError(f"Cannot open '{uri}': {str(error).splitlines()[0]}") from error
        return Location(filesystem, path, path if uri.startswith("file://") else uri.rstrip("/"))

    def __truediv__(self, name: str) -> "Location":
        """Return the location of `name` below this one."""
        return Location(self.filesystem, f"{self.path.rstrip('/')}/{name}", f"{self.uri.rstrip('/')}/{name}")

    def at(self, path: str) -> "Location":
        """Return the location of another path of the same file system."""
        scheme, separator, _ = self.uri.partition("://")
        return Location(self.filesystem, path, f"{scheme}://{path}" if separator else path)

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
        """List what is below and no folder, ordered by path; an absent folder has none.

        Raises SourceError for a name that is not UTF-8.
        """
        selector = fs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        try:
            found = self.filesystem.get_file_info(selector)
        except UnicodeDecodeError as error:
            name = error.object.decode("utf-8", "backslashreplace")
            raise SourceError(f"A file below '{self.uri}' has a name that is not UTF-8, rename it: {name}") from error
        return sorted((f for f in found if f.type != fs.FileType.Directory), key=lambda f: f.path)

    def read(self) -> bytes:
        """Return the content. Raises OSError when it cannot be read, as a pipe or a broken link cannot."""
        if self.is_local and not os.path.isfile(self.path):
            raise FileNotFoundError(f"'{self.path}' is no regular file, or is gone")
        with self.filesystem.open_input_file(self.path) as stream:
            return stream.read()

    def write(self, content: bytes | pa.Buffer) -> None:
        """Write the whole file at once: a reader sees the old content or the new, never a part.

        Where the store can rename, a temporary file is moved into place; object stores publish a file when it
        is closed, which is the same promise.
        """
        parent = self.path.rsplit("/", 1)[0]
        if self.filesystem.type_name in _STORES_WITHOUT_RENAME:
            with self.filesystem.open_output_stream(self.path) as stream:
                stream.write(content)
            return
        self.filesystem.create_dir(parent, recursive=True)
        temporary = f"{parent}/.{self.name}.{uuid.uuid4().hex}.tmp"
        try:
            with self.filesystem.open_output_stream(temporary) as stream:
                stream.write(content)
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
