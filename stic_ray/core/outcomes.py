"""How a row ends: written, rejected or failed.

Rejected is a property of the data and final: the same bytes would be refused tomorrow. Failed is a property of the
surroundings (storage away, credentials expired, engine lost): the same command tries such a row again.
"""

from stic_ray.core.errors import SticError
from stic_ray.core.schemas import Reason


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
        return " ".join(str(self).split())
