"""A scripted engine: no weights, real everything else. Tests and benchmarks of the data plane share it."""

import hashlib
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from stic_ray.core.errors import EngineLost, ModelError, one_line
from stic_ray.core.overrides import read_text
from stic_ray.core.randomness import random_for
from stic_ray.core.rundir import digest
from stic_ray.engines.base import Answer, AnsweredPrompt, Request, Sampling
from stic_ray.engines.batching import BatchLimits, FittingBatches
from stic_ray.method.prompts import fill


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rule(_Part):
    """Answers a prompt that holds the text `prompt`."""

    prompt: str
    answer: str


class Fault(_Part):
    """Happens, for real, when a request's prompt holds the text `prompt` and its picture has the size `size`."""

    prompt: str = ""
    size: str | None = None
    """Width and height in pixels, as "31x33"; any picture when unset."""
    happens: Literal["kill", "hang", "raise", "lose"]
    """The process is killed, the call never returns, it raises an error, or the engine is lost (EngineLost)."""


class Script(_Part):
    """What the fake says: the answer of the first rule that fits, else `default`.

    {colour} and {size} in an answer become the picture's mean colour and size, {seed} the request's seed.
    """

    rules: tuple[Rule, ...] = ()
    default: str = "A picture of {size} in {colour}."
    seconds_per_batch: float = 0.0
    """Time that a batch takes, as a GPU would, without using the CPU."""
    faults: tuple[Fault, ...] = ()
    dies_while_loading: bool = False
    max_requests: int | None = None
    """More requests in one batch do not fit into memory."""
    journal: str | None = None
    """File that gets a line for every batch that was answered: the number of its requests."""
    num_image_tokens: int = 16


def read_script(path: str) -> Script:
    """Read a script. Raises ModelError when it is missing or wrong."""
    try:
        return Script.model_validate(yaml.safe_load(read_text(Path(path))) or {})
    except OSError as error:
        raise ModelError(f"The fake engine needs a YAML script at model.path='{path}': {error.strerror}.") from error
    except (yaml.YAMLError, ValidationError) as error:
        raise ModelError(f"The script '{path}' is wrong: {one_line(error)}") from error


class FakeEngine:
    """Follows a script; a token is a word. Answers one call at a time, as a GPU does."""

    def __init__(self, path: str, batch_size: int) -> None:
        """Read the script at `path`. Raises ModelError when it is missing or wrong."""
        self.script = read_script(path)
        if self.script.dies_while_loading:
            os.kill(os.getpid(), signal.SIGKILL)
        self.batches = FittingBatches(BatchLimits(batch_size, None))
        self._one_call = threading.Lock()
        self.name = path
        self.revision = digest(self.script.model_dump(include={"rules", "default", "num_image_tokens"}))

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        """Answer every request by the script."""

        def answer(batch: list[int]) -> list[Answer]:
            return self._answer_batch([requests[row] for row in batch], sampling)

        with self._one_call:
            for fault in self.script.faults:
                if any(fault.prompt in r.prompt and fault.size in (None, _size(r.image)) for r in requests):
                    _happen(fault)
            lengths = [self.script.num_image_tokens + sampling.max_new_tokens] * len(requests)
            groups = [request.image_id for request in requests]
            answers = self.batches.run(range(len(requests)), lengths, groups, answer)
            return [answers[row] for row in range(len(requests))]

    def score_answers(self, asked: Sequence[AnsweredPrompt]) -> list[list[float]]:
        """Return what depends on prompt, picture and answer alone: minus 1 to minus 2 for each word and the end."""
        return [
            [
                -(len(answer.split()) + (not cut_off)) * (1 + _fraction(each.prompt, each.image, answer))
                for answer, cut_off in zip(each.answers, each.cut_off or [False] * len(each.answers), strict=True)
            ]
            for each in asked
        ]

    def score_tokens(self, conversations: Sequence[Sequence[dict[str, str]]]) -> list[list[float]]:
        """Return what depends on the text alone: minus 1 to minus 2 for each word of an answer and for its end."""
        return [
            [
                -1 - _fraction(messages[0]["content"], None, f"{word} {place}")
                for place, word in enumerate(
                    word for each in messages if each["role"] == "assistant" for word in (*each["content"].split(), "")
                )
            ]
            for messages in conversations
        ]

    def count_text_tokens(self, messages: Sequence[dict[str, str]], *, with_image: bool) -> int:
        """Count words."""
        return sum(len(message["content"].split()) for message in messages)

    def count_added_tokens(self, images: Sequence[Image.Image]) -> list[int]:
        """Return the script's number for each image."""
        return [self.script.num_image_tokens for _ in images]

    def _answer_batch(self, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
        if self.script.max_requests is not None and len(requests) > self.script.max_requests:
            raise MemoryError(f"{len(requests)} requests do not fit")
        time.sleep(self.script.seconds_per_batch)
        if self.script.journal:
            with open(self.script.journal, "a", encoding="ascii") as journal:
                journal.write(f"{len(requests)}\n")
        return [self._answer(request, sampling) for request in requests]

    def _answer(self, request: Request, sampling: Sampling) -> Answer:
        fitting = (rule.answer for rule in self.script.rules if rule.prompt in request.prompt)
        template = next(fitting, self.script.default)
        colour = _mean_colour(request.image) if "{colour}" in template else ""
        words = fill(template, colour=colour, size=_size(request.image), seed=str(request.seed)).split()
        kept = words[: sampling.max_new_tokens]
        num_image_tokens = self.script.num_image_tokens if request.image else 0
        reason = "stop" if kept == words else "length"
        return Answer(" ".join(kept), len(kept), reason, num_image_tokens, num_added_tokens=num_image_tokens)


def _happen(fault: Fault) -> None:
    match fault.happens:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            threading.Event().wait()
        case "raise":
            raise RuntimeError(f"the script raises at {fault.size or fault.prompt}")
        case "lose":
            raise EngineLost(f"the script loses its engine at {fault.size or fault.prompt}")


def _fraction(prompt: str, image: Image.Image | None, answer: str) -> float:
    picture = "" if image is None else hashlib.sha256(image.tobytes()).hexdigest()
    return random_for(0, picture, f"{prompt}\n{answer}").random()


def _size(image: Image.Image | None) -> str:
    return f"{image.width}x{image.height}" if image else "no size"


def _mean_colour(image: Image.Image | None) -> str:
    if image is None:
        return "no colour"
    red, green, blue = np.asarray(image, dtype=np.float64).reshape(-1, 3).mean(0)
    return f"#{round(red):02x}{round(green):02x}{round(blue):02x}"
