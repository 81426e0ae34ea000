"""A Hub that is busy or out of reach is no mistake of the user's; a name that it does not know is."""

import pytest
from httpx2 import Request, Response
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import Failed, ModelError
from stic_ray.engines.hub import explained


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


MODEL = ModelConfig(path="owner/name")


def answer(status: int) -> HfHubHTTPError:
    return HfHubHTTPError(
        f"status {status}", response=Response(status, request=Request("GET", "http://hub/owner/name"))
    )


def raise_as_transformers_does(cause: Exception) -> None:
    """An OSError of transformers, of huggingface_hub's error of a missing file, of the cause."""
    try:
        try:
            raise cause
        except Exception as error:
            raise LocalEntryNotFoundError("cannot find the requested files in the disk cache") from error
    except LocalEntryNotFoundError as error:
        raise OSError("We couldn't connect to the Hub") from error


@pytest.mark.parametrize(
    "cause", [answer(429), answer(500), answer(503), ConnectionError("refused"), TimeoutError()], ids=repr
)
def test_a_hub_that_is_away_is_asked_again_by_the_same_command(cause: Exception) -> None:
    with pytest.raises(Failed, match="owner/name") as caught, explained(MODEL):
        raise_as_transformers_does(cause)
    assert "\n" not in caught.value.message and "OSError" in caught.value.message


@pytest.mark.parametrize("cause", [answer(401), answer(404), OfflineModeIsEnabled("offline")], ids=repr)
def test_what_the_hub_does_not_give_is_the_users_to_mend(cause: Exception) -> None:
    with pytest.raises(ModelError, match="owner/name"), explained(MODEL):
        raise_as_transformers_does(cause)


def test_errors_of_any_type_are_one_line_with_the_type() -> None:
    """tokenizers raise Exception itself."""
    with pytest.raises(ModelError, match="Exception: data did not match any variant") as caught, explained(MODEL):
        raise Exception("data did not\nmatch any variant")
    assert "\n" not in str(caught.value)
