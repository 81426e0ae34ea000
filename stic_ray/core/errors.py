"""The errors that a reader may meet.

SticError
├── UserError      something that the user can mend: one clear line, no traceback, exit status 1
│   ├── ConfigError    an unknown key, a value that is not allowed, settings that contradict each other
│   ├── SourceError    images, instruction data or a benchmark that is missing, empty or of another shape
│   ├── ModelError     a model directory that is no model, or one that this environment cannot load
│   └── RunError       a run directory that does not fit the command
├── StageError     a stage that could not finish; what it had finished stays, and a rerun goes on from there
├── EngineError    an engine that gave no answer; the images it was asked about are tried one by one
└── EngineLost     an engine that can never answer again; its process is ended, and another takes its place
"""

import difflib
from collections.abc import Iterable


class SticError(Exception):
    """Parent of every error that stic-ray raises on purpose."""


class UserError(SticError, ValueError):
    """A mistake of the user's, told in one line: the value, what is allowed, what to do."""


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


def nearest(value: str, allowed: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the allowed word closest to `value`, or an empty string."""
    matches = difflib.get_close_matches(value, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean '{matches[0]}'?" if matches else ""
