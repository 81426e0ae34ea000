"""What a source names: the files of a folder, of a list of paths, or of a folder that `datasets` saved."""

import io
import json
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import pyarrow as pa
from pyarrow import fs

from stic_ray.core.errors import Rejected, SourceError
from stic_ray.core.storage import Location
from stic_ray.stages.containers import kind_of

LISTING = pa.schema([("uri", pa.string()), ("num_bytes", pa.int64()), ("mtime_ns", pa.int64())])
"""A file of the source; size and time are unknown (null) where a list of paths names it."""

_NUM_THREADS = 8
"""Folders that are listed at a time."""
_LINES_AT_A_TIME = 50_000


def entries(uri: str) -> Iterator[pa.Table]:
    """Yield the files of a source as tables of LISTING, in an order of their own; no more than a folder at a time.

    Raises SourceError when the source is missing or empty.
    """
    source = Location.of(uri)
    info = source.info()
    if info.type == fs.FileType.NotFound:
        raise SourceError(f"pool.source='{uri}' does not exist.")
    if info.type == fs.FileType.Directory:
        tables = _saved_dataset(source) or (_walk_disk if source.is_local else _walk)(source)
        problem = "is an empty folder; it needs at least one image"
    elif kind_of(source.path) == "list":
        tables, problem = _listed(source), "names no file; it needs one path or URI per line"
    else:
        tables, problem = iter([_table(source, [info])]), ""
    num_files = 0
    for table in tables:
        num_files += table.num_rows
        if table.num_rows:
            yield table
    if not num_files:
        raise SourceError(f"pool.source='{uri}' {problem}.")


def _walk_disk(folder: Location) -> Iterator[pa.Table]:
    """List a local folder and all below it, several folders at a time; what cannot be read is listed, too."""
    waiting, entered = deque([folder.path]), set[tuple[int, int]]()
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        while waiting:
            some = [waiting.popleft() for _ in range(min(len(waiting), 8 * _NUM_THREADS))]
            for path, found in zip(some, threads.map(_scan_folder, some), strict=True):
                rows = []
                for entry, info in found if found is not None else ():
                    name = os.fsencode(entry.path).decode("utf-8", "backslashreplace")
                    if info is None or name != entry.path:
                        rows.append((name, None, None))
                    elif not stat.S_ISDIR(info.st_mode) or (entry.is_symlink() and _inode(info) in entered):
                        rows.append((name, info.st_size, info.st_mtime_ns))
                    else:  # links may go round in circles
                        entered.add(_inode(info))
                        waiting.append(name)
                if found is None:
                    rows.append((path, None, None))
                yield _rows(rows)


def _inode(info: os.stat_result) -> tuple[int, int]:
    return info.st_dev, info.st_ino


def _scan_folder(path: str) -> list[tuple[os.DirEntry[str], os.stat_result | None]] | None:
    """Return what is in a folder, by name, with its state where there is one; None for a folder that cannot be read."""

    def state(entry: os.DirEntry[str]) -> os.stat_result | None:
        try:
            return entry.stat()
        except OSError:  # a link to nowhere, for one
            return None

    try:
        with os.scandir(path) as found:
            return [(entry, state(entry)) for entry in sorted(found, key=lambda entry: entry.name)]
    except OSError:
        return None


def _walk(folder: Location) -> Iterator[pa.Table]:
    """List the files of a folder, then each of its folders with all below it, several at a time."""
    found = folder.below()
    yield _table(folder, [info for info in found if info.type != fs.FileType.Directory])
    inner = [info.path for info in found if info.type == fs.FileType.Directory]
    with ThreadPoolExecutor(_NUM_THREADS) as threads:
        for start in range(0, len(inner), 64):  # bounds what is held
            below = threads.map(lambda path: folder.at(path).files(recursive=True), inner[start : start + 64])
            yield from (_table(folder, infos) for infos in below)


def _table(place: Location, infos: Iterable[fs.FileInfo]) -> pa.Table:
    return _rows([(place.at(info.path).uri, info.size, info.mtime_ns) for info in infos])


def _rows(rows: list[tuple[str, int | None, int | None]]) -> pa.Table:
    return pa.table([list(column) for column in zip(*rows, strict=True)] or [[], [], []], schema=LISTING)


def _listed(source: Location) -> Iterator[pa.Table]:
    """Read paths and URIs, one per line; relative ones are below the file's folder. Bad bytes are those of Windows."""
    folder = source.folder
    with source.open() as stream:
        encoding = json.detect_encoding(stream.read(4))  # by its zeros, as any text that begins in ASCII has
        stream.seek(0)
        errors = "surrogateescape" if encoding.startswith("utf-8") else "replace"
        with io.TextIOWrapper(io.BufferedReader(stream), encoding, errors) as text:
            lines = (_in_windows(line).strip() for line in text)
            uris = (folder.address_of(line) for line in lines if line and not line.startswith("#"))
            while some := list(islice(uris, _LINES_AT_A_TIME)):
                yield _rows([(uri, None, None) for uri in some])


def _in_windows(line: str) -> str:
    """Return a line that is UTF-8, or else was written in the code page of Western Windows."""
    if line.isascii():
        return line
    try:
        line.encode()
    except UnicodeEncodeError:
        encoded = line.encode("utf-8", "surrogateescape")
        return encoded.decode("cp1252", "replace")
    return line


def _saved_dataset(folder: Location) -> Iterator[pa.Table] | None:
    """Return the Arrow files that `save_to_disk` of `datasets` wrote, or None when the folder holds something else."""
    try:
        splits = _json(folder / "dataset_dict.json")
        inner = [folder.inside(name) for name in splits["splits"]] if splits else [folder]
        states = [(each, _json(each / "state.json")) for each in inner]
        files = [each.inside(file["filename"]) for each, state in states if state for file in state["_data_files"]]
    except (ValueError, LookupError, TypeError, Rejected):  # of another program
        return None
    return (_table(file, [file.info()]) for file in files) if files else None


def _json(file: Location) -> dict[str, Any] | None:
    return json.loads(file.read()) if file.info().is_file else None
