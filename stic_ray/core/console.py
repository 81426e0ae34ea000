"""What a command shows: our own lines and nothing else; on a terminal those of progress become a bar.

A line of progress is a log record as "dpo: step 20/59, loss 0.31, 87.4 rows/s, 8 s left" or
"preferences: 3/8 shards, 384 rows, 12 s left". At level INFO it is for everybody, at level DEBUG for a terminal only,
where it may come every second. Lines of other processes arrive as text in Ray's hands, among whatever libraries print;
ours are marked.
"""

import logging
import os
import re
import sys
from typing import IO, Any, cast

_MARK = "stic-ray|"
_PROGRESS = re.compile(r"([^:]+): (?:step )?(\d+)/(\d+)(?: (\w+))?, (.+)")
_OURS = logging.getLogger("stic_ray")
_FORMAT = logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S")


def configure(stream: IO[str] | None = None) -> None:
    """Show this process's log records of ours, and warnings of others, on `stream` (stderr when unset)."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries, which look at it when they are imported
    stream = cast(IO[str], stream or sys.stderr)
    handler = _Terminal(stream) if stream.isatty() else logging.StreamHandler(stream)
    handler.setFormatter(_FORMAT)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    _OURS.setLevel(logging.DEBUG if stream.isatty() else logging.INFO)


def configure_worker() -> None:
    """Mark the log records of ours in a process that another one shows; called in each before any work."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Marked())
    _OURS.handlers, _OURS.propagate = [handler], False
    _OURS.setLevel(logging.DEBUG)


def show(line: str) -> None:
    """Log a line of another process when it is ours."""
    if line.startswith(_MARK):
        level, _, message = line.removeprefix(_MARK).partition("|")
        _OURS.log(int(level), "%s", message)


class _Marked(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{_MARK}{record.levelno}|{' '.join(record.getMessage().split())}"


class _Terminal(logging.StreamHandler[IO[str]]):
    """Shows the last line of progress as a bar below the other lines."""

    bar: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            found = _PROGRESS.fullmatch(record.getMessage()) if record.name.startswith("stic_ray") else None
            if found:
                self._draw(found)
            elif record.levelno > logging.DEBUG:
                from tqdm import tqdm

                tqdm.write(self.format(record), file=self.stream)
        except Exception:
            self.handleError(record)

    def _draw(self, progress: re.Match[str]) -> None:
        from tqdm import tqdm

        what, done, total, unit, figures = progress[1], int(progress[2]), int(progress[3]), progress[4], progress[5]
        if self.bar is None or (self.bar.desc, self.bar.total) != (what, total):
            self.close()
            layout = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} {unit}{postfix}"
            self.bar = tqdm(
                desc=what, total=total, unit=unit or "steps", bar_format=layout, file=self.stream, disable=False
            )
        self.bar.n = done
        self.bar.set_postfix_str(figures)
        if done == total:
            self.close()

    def close(self) -> None:
        """Leave the bar as it is and go to the next line."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
