"""Captions that a source gives its images: in a column of its tables, or in files and tar members beside them.

A caption that is not there is `no_caption`; one that cannot be used is a rejected row with another reason, also where
images without a caption are welcome. Nothing is put in a caption's place.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from stic_ray.core.config import CAPTION_MEMBER, PoolConfig
from stic_ray.core.errors import Rejected, SourceError, nearest, one_line
from stic_ray.core.schemas import Reason
from stic_ray.core.storage import Location
from stic_ray.stages.reading import Patience

MAX_CHARACTERS = 10_000
"""Longer captions are rejected: about 2,500 tokens, more than any published recaption and than most text contexts of a
caption training. A whole page in a caption's place is a mistake of the source, and the index is held 50,000 rows at a
time when it is put in order."""
MAX_FILE_BYTES = 2**20
"""Larger files and members are not read: metadata of one image is a few kilobytes."""

_TEXT = ("string", "large_string", "string_view", "null")


@dataclass(frozen=True)
class Captions:
    """Where a source has its captions; no field is set where none is named."""

    column: str | None = None
    """Of tables."""
    ending: str | None = None
    """Of the file or member beside an image, without the dot."""
    key: str | None = None
    """Of the JSON object in that file; None where all of it is the caption."""

    @classmethod
    def of(cls, pool: PoolConfig) -> "Captions":
        """Return what the settings of the pool say."""
        given = CAPTION_MEMBER.fullmatch(pool.caption_member or "")
        ending, key = given.group("ending", "key") if given else (None, None)
        return cls(pool.caption_column, "json" if key else ending, key)

    def of_value(self, value: pa.Scalar | None) -> str | Rejected | None:
        """Return the caption of a table's row; `value` is None where no column was read."""
        if self.column is None:
            why = "a row of a table; its caption needs pool.caption_column"
            return Rejected(Reason.NO_CAPTION, why) if self.ending else None
        try:
            return _as_caption(None if value is None else value.as_py(), f"column '{self.column}'")
        except Rejected as rejected:
            return rejected
        except UnicodeError as error:  # Arrow does not check what it reads
            return _unreadable(f"column '{self.column}' is no UTF-8: {one_line(error)}")

    def of_content(self, content: bytes, name: str) -> str | Rejected:
        """Return the caption in a file or member."""
        try:
            text = content.decode("utf-8-sig")
        except UnicodeError as error:
            return _unreadable(f"'{name}' is no UTF-8: {one_line(error)}")
        try:
            if self.key is None:
                return _as_caption(text, f"'{name}'")
            found = json.loads(text)
            if not isinstance(found, dict):
                return _unreadable(f"'{name}' is no JSON object")
            if self.key not in found:
                return Rejected(Reason.NO_CAPTION, f"'{name}' has no key '{self.key}'.{nearest(self.key, found)}")
            return _as_caption(found[self.key], f"'{self.key}' of '{name}'")
        except Rejected as rejected:
            return rejected
        except (ValueError, RecursionError) as error:
            return _unreadable(f"'{name}' is no JSON: {one_line(error)}")

    def missing(self, stem: str) -> Rejected | None:
        """Return why an image with this name up to its ending has no caption, when nothing is beside it."""
        if self.ending is None:
            why = "no row of a table, where pool.caption_column looks; set pool.caption_member, too"
            return Rejected(Reason.NO_CAPTION, why) if self.column else None
        return Rejected(Reason.NO_CAPTION, f"no '{stem}.{self.ending}' beside it")

    def beside(self, image: Location, patience: Patience) -> str | Rejected | None:
        """Return the caption in the file beside an image that is a file. Raises Failed."""
        stem = PurePosixPath(image.name).stem
        if self.ending is None:
            return self.missing(stem)
        # To list the folder, for endings like .tXt, would take too long where it has a million files.
        endings = (self.ending, self.ending.upper(), self.ending.capitalize())
        usual, *others = (image.folder / f"{stem}.{ending}" for ending in endings)
        found = self._in_file(usual, patience)
        if isinstance(found, str) or patience.read(usual, usual.exists):
            return found
        other = next((file for file in others if patience.read(file, file.exists)), None)
        return self._in_file(other, patience) if other else self.missing(stem)

    def _in_file(self, file: Location, patience: Patience) -> str | Rejected:
        def read() -> bytes:
            with file.open() as stream:
                check_file_size(stream.size())
                return stream.read()

        try:
            return self.of_content(patience.read(file, read), file.name)
        except Rejected as rejected:
            return rejected

    def is_file(self, name: PurePosixPath) -> bool:
        """Whether a file of a folder is one with a caption, and so no image."""
        return self.ending is not None and name.suffix.lower() == f".{self.ending}"


def _as_caption(value: Any, what: str) -> str:
    """Return a caption without the white space around it. Raises Rejected for what is none; `what` names it there."""
    if value is None:
        raise Rejected(Reason.NO_CAPTION, f"{what} is null")
    if not isinstance(value, str):
        raise _unreadable(f"{what} is of type {type(value).__name__}; a caption is text")
    text = value.strip()
    if not text:
        raise Rejected(Reason.NO_CAPTION, f"{what} is empty")
    if len(text) > MAX_CHARACTERS:
        raise Rejected(Reason.TOO_LONG, f"{what} has {len(text)} characters; a caption has at most {MAX_CHARACTERS}")
    try:
        text.encode()
    except UnicodeError as error:  # half of a pair, as JSON can escape it
        raise _unreadable(f"{what} is no Unicode text: {one_line(error)}") from error
    return text


def check_file_size(num_bytes: int) -> None:
    """Raise Rejected for a file or member that is too large to hold one image's caption."""
    if num_bytes > MAX_FILE_BYTES:
        raise Rejected(Reason.TOO_LONG, f"{num_bytes} bytes; a caption is read from at most {MAX_FILE_BYTES}")


def check_caption_column(file: Location, schema: pa.Schema, column: str | None) -> None:
    """Raise SourceError where a table has no such column, or one that holds no text; None asks for none."""
    if column is None:
        return
    if column not in schema.names:
        raise SourceError(
            f"'{file.uri}' has no column '{column}'.{nearest(column, schema.names)} Its columns: "
            f"{', '.join(schema.names)}. Name the one with the captions with pool.caption_column, or leave that out."
        )
    kind = schema.field(column).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if str(plain) not in _TEXT:
        way_out = "write the one to use into a column of its own" if "list" in str(plain) else "name one that has text"
        raise SourceError(
            f"Column '{column}' of '{file.uri}' is {kind}; pool.caption_column is one caption per row: {way_out}."
        )


def check_places(pool: PoolConfig, kinds: Iterable[str]) -> None:
    """Raise SourceError where a whole source of these kinds of files has nothing that the settings fit."""
    captions, found = Captions.of(pool), set(kinds)
    tables = found & {"parquet", "arrow"}
    if captions.column and not captions.ending and not tables:
        raise SourceError(
            f"pool.caption_column={captions.column} names a column of tables, and pool.source has none; for captions "
            "in files or tar members beside the images set pool.caption_member=txt or json:KEY."
        )
    if captions.ending and not captions.column and found == tables:
        raise SourceError(
            "pool.caption_member names files or tar members beside the images, and pool.source has only tables; name "
            "their column with pool.caption_column."
        )


def _unreadable(why: str) -> Rejected:
    return Rejected(Reason.UNREADABLE_ROW, f"caption: {why}")
