"""What Ray hands over of an error in a task or actor, told as the error that it was."""

import builtins
import re

from stic_ray.core import errors
from stic_ray.core.errors import StageError, UserError


def explain(stage: str, error: BaseException) -> Exception:
    """Return the error that a task or actor raised as the user's own, or as a StageError with stage and cause.

    Ray hands the remote traceback over as text, with each exception of the chain on an unindented line.
    """
    lines = str(error).splitlines()
    raised = [match for line in lines if (match := re.match(r"([\w.]+(?:Error|Exception)): (.+)", line))]
    ours = [match for match in raised if match[1].startswith("stic_ray.")]
    theirs = [match for match in raised if not match[1].startswith("ray.")]
    told = (ours or theirs)[-1:]  # raised from those before it, and says more
    if not told:
        last = next((line.strip() for line in reversed(lines) if line.strip()), type(error).__name__)
        return StageError(f"{stage} stopped: {last}")
    where, message = told[0][1], told[0][2].strip()
    name = where.rsplit(".", 1)[-1]
    kind = getattr(errors if where.startswith("stic_ray.") else builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, UserError):
        return kind(message)
    if isinstance(kind, type) and issubclass(kind, OSError):
        return StageError(f"{stage} could not read or write: {message}. Mend this and run the same command again.")
    return StageError(f"{stage} stopped: {message if kind is StageError else f'{name}: {message}'}")
