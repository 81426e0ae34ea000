"""Log-probabilities of given answers: those of plain forward passes, for any family and with or without a picture."""

from typing import Any

import pytest
import torch

from stic_ray.engines.base import AnsweredPrompt
from stic_ray.engines.transformers_engine import TransformersEngine
from tests.engines.conftest import Engines
from tests.engines.families import EMBEDDED, scene

ASKED = [
    AnsweredPrompt("Describe this picture.", scene(1), ("There is a red circle at the top left.", "A dog.", "")),
    AnsweredPrompt("Hi", None, ("Hello! How are you?",)),
    AnsweredPrompt("What is it, and where?", scene(2, 120, 50), ("Squares", "Four blue squares"), (False, True)),
    AnsweredPrompt("Nothing was said.", scene(3, 40, 100), ()),
    AnsweredPrompt("What is 1 + 1?", None, ("Two.", "It is three, I think.")),
]


def plain_logps(engine: TransformersEngine, asked: AnsweredPrompt) -> list[float]:
    """One sequence at a time, without padding."""
    found = []
    for answer, cut_off in zip(asked.answers, asked.cut_off or [False] * len(asked.answers), strict=True):
        messages = [{"role": "user", "content": asked.prompt}, {"role": "assistant", "content": answer}]
        sequence = engine.builder.build(messages, with_image=asked.image is not None, cut_off=cut_off)
        batch: Any = engine.builder.batch([sequence], [asked.image])
        learnt = batch.pop("is_answer")[0, 1:]
        with torch.no_grad():
            logps = engine.model(**batch).logits[0, :-1].log_softmax(-1)
        found.append(logps.gather(1, batch["input_ids"][0, 1:, None])[:, 0][learnt].sum().item())
    return found


TALK = [
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A red circle."},
    {"role": "user", "content": "And where?"},
    {"role": "assistant", "content": "At the top left, I think."},
]


@pytest.mark.parametrize("family", EMBEDDED)
def test_each_token_of_a_conversation_is_as_likely_as_in_a_plain_forward_pass(family: str, loaded: Engines) -> None:
    """No image is shown; of several turns, those of the assistant count."""
    engine = loaded(family)
    short, long = engine.score_tokens([TALK[:2], TALK])
    sequence = engine.builder.build(TALK, with_image=False)
    batch: Any = engine.builder.batch([sequence], [None])
    learnt = batch.pop("is_answer")[0, 1:]
    with torch.no_grad():
        logps = engine.model(**batch).logits[0, :-1].log_softmax(-1)
    expected = logps.gather(1, batch["input_ids"][0, 1:, None])[:, 0][learnt].tolist()
    assert long == pytest.approx(expected, rel=1e-5, abs=1e-4) and len(long) == sum(sequence.is_answer)
    assert short == pytest.approx(long[: len(short)], rel=1e-5, abs=1e-4)
    asked = AnsweredPrompt(TALK[0]["content"], None, (TALK[1]["content"],))
    assert sum(short) == pytest.approx(engine.score_answers([asked])[0][0], rel=1e-5, abs=1e-4)
    assert engine.score_tokens([]) == []


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("family", EMBEDDED)
def test_answers_are_as_likely_as_in_a_plain_forward_pass(
    family: str, shared: bool, loaded: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = loaded(family)
    if not shared:
        monkeypatch.setattr("stic_ray.engines.transformers_engine.reason_against", lambda config: "not here")
    found = engine.score_answers(ASKED)
    expected = [plain_logps(engine, asked) for asked in ASKED]
    for own, plain in zip(found, expected, strict=True):
        assert own == pytest.approx(plain, rel=1e-6, abs=1e-4)
    assert engine.score_answers([ASKED[1]])[0] == pytest.approx(found[1], rel=1e-6, abs=1e-4)
    assert engine.score_answers([]) == []
