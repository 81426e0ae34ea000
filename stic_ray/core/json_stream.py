"""JSON read value by value, a list or JSON Lines in any encoding; a damaged value does not stop the others."""

import ast
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

_BUFFER_BYTES = _CHUNK_CHARACTERS = 1 << 18
_MAX_VALUE_CHARACTERS = 1 << 25
_DECODER = json.JSONDecoder(strict=False)  # line ends and tabs inside strings do no harm
_BLANK = re.compile(r"[\s\ufeff]*")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BETWEEN = re.compile(r",\s*(?=\{)")
_FIRST_KEY = re.compile(r'\{\s*"[^"]*"\s*:')
_LONGEST_WORD = len("-Infinity")


def as_text(stream: pa.NativeFile) -> io.TextIOWrapper:
    """Return a file as text, in the encoding that its first bytes show, with a line feed at every line's end.

    A byte that is no UTF-8 becomes a lone surrogate, by which its line is found; of UTF-16 these are the only errors.
    """
    buffered = io.BufferedReader(stream, _BUFFER_BYTES)
    encoding = json.detect_encoding(buffered.peek(4)[:4])
    return io.TextIOWrapper(buffered, encoding, "surrogateescape" if "utf-8" in encoding else "replace")


class _Text:
    """A text of which `text[at:]` waits to be parsed and more is read when it is needed."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._rest = as_text(stream)
        self.text, self.at, self.line = "", 0, 1
        self.indent: str | None = None
        """What stands in front of the next value on its line; None where it does not begin one."""
        self.row_indent: str | None = None
        """What stood in front of the first row that began its line."""
        self.keys: set[str] = set()
        """Those of the last row."""

    def read_on(self) -> bool:
        """Read as much again as is waiting. Returns False at the end of the text."""
        waiting = self.text[self.at :]
        new = self._rest.read(max(len(waiting), _CHUNK_CHARACTERS))
        self.text, self.at = waiting + new, 0
        return bool(new)

    def skip_to(self, end: int) -> None:
        """Go forward, and count the lines."""
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def next_character(self) -> str:
        """Return the next character that is no white space, without taking it; "" at the end."""
        blank = ""
        while True:
            start = self.at
            match = _BLANK.match(self.text, start)
            self.skip_to(match.end() if match else start)
            blank = (blank + self.text[start : self.at])[-1000:]
            if self.at < len(self.text) or not self.read_on():
                break
        self.indent = blank.rpartition("\n")[2] if "\n" in blank else None
        return self.text[self.at : self.at + 1]

    def take_value(self, *, in_list: bool) -> tuple[Any, str | None]:
        """Return the next value, or the problem with it, and go behind it."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos > len(self.text) - _LONGEST_WORD
                if unfinished and len(self.text) - self.at < _MAX_VALUE_CHARACTERS and self.read_on():
                    continue
                return None, self._skip_damaged(error.msg, in_list=in_list)
            except (RecursionError, ValueError) as error:  # too deep; a number of too many digits
                why = "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]
                return None, self._skip_damaged(why, in_list=in_list)
            if end == len(self.text) and self.read_on():  # a number may go on
                continue
            written = self.text[self.at : end]
            if isinstance(value, dict):
                self.keys = set(value)
                self.row_indent = self.indent if self.row_indent is None else self.row_indent
            self.skip_to(end)
            return _mended(value, written)

    def _skip_damaged(self, why: str, *, in_list: bool) -> str:
        """Go behind a value that cannot be read, as far as that can be known."""
        while (end := self._end_of_damaged(in_list=in_list)) is None:
            if len(self.text) - self.at > _MAX_VALUE_CHARACTERS or not self.read_on():
                self.skip_to(len(self.text))
                return f"{why}; no row was found behind it" if in_list else why
        self.skip_to(end)
        return why

    def _end_of_damaged(self, *, in_list: bool) -> int | None:
        if not in_list:
            end = self.text.find("\n", self.at)
            return None if end < 0 else end
        indent = self.row_indent if self.indent is None else self.indent
        if indent is not None:  # the next row stands below this one
            below = re.compile(rf"\n(?:{re.escape(indent)}\{{|\])").search(self.text, self.at)
            return below.start() if below else None
        # Behind a stray quote, texts and brackets change places, so the next row is known by what it holds.
        first_key = _FIRST_KEY.match(self.text, self.at)
        begins = (match for match in _BETWEEN.finditer(self.text, self.at) if self._is_row(match.end(), first_key))
        begin = next(begins, None)
        return begin.start() if begin else None

    def _is_row(self, at: int, first_key: re.Match[str] | None) -> bool:
        """Whether a row begins here: an object with most keys of the row before, or one that begins as the damaged."""
        try:
            found = set(_DECODER.raw_decode(self.text, at)[0])
        except (ValueError, RecursionError):
            found = set()
        if found and self.keys:
            return 2 * len(found & self.keys) > len(self.keys)
        return first_key is not None and self.text.startswith(first_key[0], at)


def json_values(stream: pa.NativeFile) -> Iterator[tuple[int, Any, str | None]]:
    """Yield the values of a list, or one behind the other as in JSON Lines: line (from 1), value, problem.

    A few are in memory at a time. A value that cannot be read has a problem; reading goes on with the next line or, in
    a list, with the next row: below it, or on the same line an object with the same keys.
    """
    text = _Text(stream)
    in_list = text.next_character() == "["
    is_closed, problem = not in_list, None
    while character := text.next_character():
        if in_list and character in "[],":
            is_closed = character == "]"
            text.skip_to(text.at + 1)
            continue
        line = text.line
        value, problem = text.take_value(in_list=in_list)
        yield line, value, problem
    if not is_closed and problem is None:
        yield text.line, None, "the list has no end; was the file cut off?"


def literal(text: str) -> Any:
    """Return what a text spells in JSON or, as pandas writes lists, in Python; the text itself if neither."""
    for read in (_DECODER.decode, ast.literal_eval):
        try:
            return _whole_characters(read(text))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return text


def _mended(value: Any, written: str) -> tuple[Any, str | None]:
    """Return a value with U+FFFD for half characters, or the problem with its bytes."""
    try:
        written.encode()
    except UnicodeEncodeError as error:
        return None, f"the byte 0x{ord(written[error.start]) - 0xDC00:02X} is no UTF-8"
    return (_whole_characters(value) if _SURROGATE.search(written) else value), None


def _whole_characters(value: Any) -> Any:
    text = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return _DECODER.decode(text)
