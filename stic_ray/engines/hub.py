"""Where a model comes from: its revision on the Hub, and what goes wrong while it is read, in one line."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import Failed, ModelError, SticError, type_and_message


def hub_arguments(model: ModelConfig) -> dict[str, Any]:
    """Return which revision transformers loads, and whether it may run the code beside it.

    Raises ModelError for remote code of a hub id without a revision: it would be whatever is there when a process
    starts.
    """
    if model.trust_remote_code and model.revision is None and not Path(model.path).is_dir():
        raise ModelError(
            f"model.trust_remote_code=true would run whatever code '{model.path}' holds at each start; name the "
            "commit that you have read with model.revision."
        )
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


@contextmanager
def explained(model: ModelConfig, what: str | None = None) -> Iterator[None]:
    """Turn what transformers, tokenizers and PEFT raise while loading `what` into one line with the error's type.

    Raises Failed for a Hub that is away, after the retries of huggingface_hub, and ModelError otherwise.
    """
    try:
        with warnings.catch_warnings():
            yield
    except (SticError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # tokenizers raise Exception itself
        reason = type_and_message(error)
        if "torchvision" in reason.lower():
            raise ModelError(
                f"model.path='{model.path}' needs torchvision: install the extra stic-ray[torchvision]."
            ) from error
        where = "" if Path(model.path).is_dir() else " is no directory here, and as a hub id"
        what = what or f"model.path='{model.path}'{where}"
        if _is_hub_away(error):
            raise Failed(f"{what} cannot be loaded now, the Hub does not answer: {reason}") from error
        raise ModelError(f"{what} cannot be loaded: {reason}") from error


def _is_hub_away(error: BaseException) -> bool:
    """Return whether an error of loading goes back to a Hub that was busy or out of reach."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    statuses = [each.response.status_code for each in chain if isinstance(each, HfHubHTTPError)]
    if statuses:
        return statuses[0] == HTTPStatus.TOO_MANY_REQUESTS or statuses[0] >= HTTPStatus.INTERNAL_SERVER_ERROR
    if constants.is_offline_mode() or any(isinstance(each, OfflineModeIsEnabled) for each in chain):
        return False
    return any(isinstance(each, LocalEntryNotFoundError | ConnectionError | TimeoutError) for each in chain)
