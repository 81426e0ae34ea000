import pickle
import struct

from stic_ray.core.errors import Rejected, StageError, one_line, type_and_message
from stic_ray.core.schemas import Reason


def test_an_error_is_one_line_of_limited_length() -> None:
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError("x" * 10_000)) == "x" * 500
    assert one_line(TimeoutError()) == "TimeoutError"


def test_types_are_named_as_tracebacks_name_them_and_ours_without_a_module() -> None:
    assert type_and_message(struct.error("bad\nsize")) == "struct.error: bad size"
    assert type_and_message(ValueError("no")) == "ValueError: no"
    assert type_and_message(StageError("stopped")) == "StageError: stopped"


def test_a_rejection_travels_between_processes() -> None:
    again = pickle.loads(pickle.dumps(Rejected(Reason.TOO_SMALL, "1 x 1")))
    assert (again.reason, again.message, str(again)) == (Reason.TOO_SMALL, "1 x 1", "too_small: 1 x 1")
