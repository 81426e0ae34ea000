"""The errors that a reader may meet.

SticError
├── UserError      something that the user can mend: one clear line, no traceback, exit status 1
│   ├── ConfigError    an unknown key, a value that is not allowed, settings that contradict each other
│   ├── SourceError    images, instruction data or a benchmark that is missing, empty or of another shape
│   ├── ModelError     a model directory that is no model, or one that this environment cannot load
│   └── RunError       a run directory that does not fit the command
├── StageError     a stage that could not finish; what it had finished stays, and a rerun goes on from there
├── EngineError    an engine that gave no answer; the images it was asked about are tried one by one
├── EngineLost     an engine that can never answer again; its process is ended, and another takes its place
├── Rejected       a row that cannot be used: a property of the data, and final
└── Failed         a row that could not be done now, as while a storage is away: the same command tries it again
"""

import builtins
import difflib
from collections.abc import Iterable

from stic_ray.core.schemas import Reason

_MAX_CHARACTERS = 500
"""Longer messages of errors are cut: compilers, parsers and clouds write pages."""


class SticError(Exception):
    """Parent of every error that stic-ray raises on purpose."""


class UserError(SticError, ValueError):
    """A mistake of the user's, in one line: the value, what is allowed, what to do."""


class ConfigError(UserError):
    """The configuration is wrong."""


class SourceError(UserError):
    """Input data is missing, empty or not of the documented shape."""


class ModelError(UserError):
    """A model cannot be loaded, or lacks something that a vision-language model needs."""


class RunError(UserError):
    """The run directory does not fit what was asked."""


class StageError(SticError, RuntimeError):
    """A stage stopped before its end."""


class EngineError(SticError, RuntimeError):
    """An engine raised an error instead of answering; another request may well be answered."""


class EngineLost(SticError, RuntimeError):
    """An engine is beyond repair in this process, as after a CUDA error."""


class Rejected(SticError):
    """A row that cannot be used, for a reason that lies in the row itself."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message

    def __reduce__(self) -> tuple[type, tuple[Reason, str]]:
        return type(self), (self.reason, self.message)


class Failed(SticError):
    """A row that could not be done now, for a reason that lies outside of it; a rerun tries it again."""

    @property
    def message(self) -> str:
        """What went wrong, in one line."""
        return one_line(self)


def one_line(error: BaseException | str) -> str:
    """Return the message of an error in one line of limited length; the name of its type where it has none."""
    return " ".join(str(error).split())[:_MAX_CHARACTERS] or type_name(error)


def type_and_message(error: BaseException) -> str:
    """Return an error in one line: "ValueError: its message"."""
    return f"{type_name(error)}: {one_line(error)}"


def type_name(error: BaseException | str) -> str:
    """Return the name of an error's type as tracebacks have it: "ValueError", "struct.error"; ours without modules."""
    kind = type(error)
    is_plain = kind.__module__ == builtins.__name__ or kind.__module__ == __name__
    return kind.__qualname__ if is_plain else f"{kind.__module__}.{kind.__qualname__}"


def nearest(value: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the allowed word closest to `value`, or an empty string."""
    matches = difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""
