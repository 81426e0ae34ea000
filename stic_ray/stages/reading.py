"""Reading the files of a source: again while the storage is away, then rejected or failed (core/errors.py)."""

import errno
import io
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_random_exponential

from stic_ray.core.errors import Failed, Rejected, one_line
from stic_ray.core.schemas import Reason
from stic_ray.core.storage import Location
from stic_ray.method.images import is_image, other_format

_T = TypeVar("_T")

_PATIENCE_S = float(os.environ.get("STIC_RAY_STORAGE_PATIENCE_S", "60"))
_SNIFFED_BYTES = 2**20
"""Larger files are read whole only when they begin as an image does."""
_ODD_NAMES = (errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO)


@dataclass(frozen=True)
class Found:
    """An image of a source: where it is, its bytes or why there are none, and the caption beside it."""

    path: str
    encoded: bytes | Rejected | Failed
    row: int | None = None
    offset: int | None = None
    caption: str | Rejected | None = None
    """The source's caption, or why there is none; None where no source of captions is named."""


class Patience:
    """How long the reads of one task wait for a storage that is away, all of them together.

    The time runs from the first error. A read that succeeds after an error ends the trouble, and the time is renewed.
    """

    def __init__(
        self,
        total_s: float = _PATIENCE_S,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        root: Location | None = None,
    ) -> None:
        """Wait for `total_s` seconds; data that lies below `root` may name folders that were never there."""
        self._root = root
        self._total_s, self._sleep, self._clock = total_s, sleep, clock
        self._since: float | None = None

    def read(self, file: Location, read: Callable[[], _T]) -> _T:
        """Return what `read` does. Raises Rejected for a file that is not there or is none, Failed when time is up."""

        def attempt(*, is_again: bool = False) -> _T:
            try:
                return read()
            except ValueError as error:  # a name that no file can have
                raise unreadable(error) from error
            except OSError as error:
                if not file_is_at_fault(file, error, self._root):
                    raise
                if is_again:
                    raise unreadable(error) from error
            return attempt(is_again=True)  # the storage may have come back between the read and the look at its folder

        try:
            try:
                return attempt()
            except OSError:
                if self._is_over():
                    raise
            retry, wait = retry_if_exception_type(OSError), wait_random_exponential(multiplier=0.5, max=15)
            result = Retrying(retry=retry, wait=wait, stop=self._is_over, sleep=self._sleep, reraise=True)(attempt)
        except OSError as error:
            raise Failed(f"'{file.uri}': {one_line(error)}") from error
        self._since = None
        return result

    def _is_over(self, state: RetryCallState | None = None) -> bool:
        now = self._clock()
        self._since = now if self._since is None else self._since
        return now - self._since >= self._total_s


class Stream(io.RawIOBase):
    """A file for Arrow and tarfile to read, at any place: whatever else they raise is the fault of its content."""

    def __init__(self, file: Location, patience: Patience) -> None:
        self._place, self._patience = file, patience
        self._file: pa.NativeFile | None = None
        self._at = 0
        self.size = self._try(lambda stream: stream.size())

    def readinto(self, buffer: Any, /) -> int:
        """Read the next bytes into a buffer. Raises Rejected and Failed."""
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next bytes. Raises Rejected and Failed."""
        found = self.read_at(self.size - self._at if size is None or size < 0 else size, self._at)
        self._at += len(found)
        return found

    def read_at(self, num_bytes: int, offset: int) -> bytes:
        """Return a part of the content, fewer bytes where the file ends. Raises Rejected and Failed."""
        return self._try(lambda stream: stream.read_at(num_bytes, offset))

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to a place and return it."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def readable(self) -> bool:
        """It can be read."""
        return True

    def seekable(self) -> bool:
        """It can be read at any place."""
        return True

    def _try(self, read: Callable[[pa.NativeFile], _T]) -> _T:
        def once() -> _T:
            if self._file is None:
                self._file = self._place.open()
            try:
                return read(self._file)
            except OSError:
                self._file = None  # a handle of what was mounted before is of no use
                raise

        return self._patience.read(self._place, once)


def read_file(file: Location, max_bytes: int, patience: Patience) -> bytes:
    """Return the content of a file that should be an image. Raises Rejected and Failed."""

    def read() -> bytes:
        with file.open() as stream:
            size = stream.size()
            check_size(size, max_bytes)
            if size > _SNIFFED_BYTES and not is_image(beginning := stream.read_at(16, 0)):
                raise other_format(beginning)
            return stream.read_at(size, 0)

    return patience.read(file, read)


def check_size(num_bytes: int, max_bytes: int) -> None:
    """Raise Rejected for what has more bytes than any image within the limits."""
    if num_bytes > max_bytes:
        raise Rejected(Reason.TOO_MANY_BYTES, f"{num_bytes} bytes; no image within the limits has over {max_bytes}")


def file_is_at_fault(file: Location, error: OSError, root: Location | None = None) -> bool:
    """Whether an error lies in one file: it is no regular file, or is missing from a folder that holds others.

    Below a `root`, which data names paths in, a missing folder is as good as a missing file.
    """
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        try:
            folder = (file.at(os.path.realpath(file.path)) if file.is_local else file).folder
            top = "" if root is None else os.path.realpath(root.path) if root.is_local else root.path
            while top and folder.path.startswith(f"{top}/") and not folder.exists():
                folder = folder.folder
            return folder.holds_files()
        except ValueError:  # no file can have such a name
            return True
    if not file.is_local:
        return False
    return error.errno in _ODD_NAMES or (isinstance(error, PermissionError) and os.access(file.folder.path, os.X_OK))


def unreadable(why: Exception | str) -> Rejected:
    """Return the rejection of a file, or of a part of it, that cannot be read."""
    return Rejected(Reason.UNREADABLE_FILE, one_line(why))
