"""Several answers to one question, which is read once: what separate requests say."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from stic_ray.core.config import ModelConfig
from stic_ray.engines.base import Answer, Request, Sampling
from stic_ray.engines.batching import BatchLimits
from stic_ray.engines.shared_prefill import questions_of
from stic_ray.engines.transformers_engine import TransformersEngine
from tests.engines.conftest import Checkpoints, Engines
from tests.engines.families import EMBEDDED, scene
from tests.engines.test_adapters import make_adapter

GREEDY = Sampling(max_new_tokens=12)
SAMPLED = Sampling(max_new_tokens=12, temperature=0.8, top_p=0.95)


def several_answers() -> list[Request]:
    """Of questions with three, two and one answers, of many lengths, and of one without a picture."""
    pictures = scene(1), scene(2, 120, 50), scene(3, 40, 100)
    asked = [
        ("Describe this picture.", pictures[0], 3),
        ("How many shapes are there, and where is each of them?", pictures[0], 2),
        ("Hi", pictures[1], 2),
        ("Describe this picture.", pictures[2], 1),
        ("What is red?", None, 2),
    ]
    requests = [
        Request(prompt, picture, seed=10 * place + number, image_id=str(place))
        for place, (prompt, picture, num_answers) in enumerate(asked)
        for number in range(num_answers)
    ]
    return random.Random(0).sample(requests, len(requests))


@contextmanager
def prompts_read(engine: TransformersEngine) -> Iterator[list[int]]:
    """The number of sequences of each batch that holds pixels, as it goes through the model."""
    seen: list[int] = []

    def look(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        if inputs.get("pixel_values") is not None:
            seen.append(len(inputs["input_ids"]))

    hook = engine.model.register_forward_pre_hook(look, with_kwargs=True)
    yield seen
    hook.remove()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", EMBEDDED)
def test_answers_are_those_of_separate_requests(
    family: str, sampling: Sampling, loaded: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, requests = loaded(family), several_answers()
    alone = [engine.generate([request], sampling)[0] for request in requests]
    for batch_size in (3, 16):
        monkeypatch.setattr(engine.batches, "limits", BatchLimits(batch_size, None))
        assert engine.generate(requests, sampling) == alone
    with prompts_read(engine) as read:
        assert engine.generate(requests, sampling) == alone
    assert read == [4], "eight answers, and the picture of each of the four questions is read once"


def test_a_sliding_window_is_kept(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window is shorter than the pictures' tokens."""
    model = ModelConfig(path=str(checkpoint("llava_next")))
    engine = TransformersEngine(model, limits=BatchLimits(16, None), on_gpu=False)
    requests = several_answers()
    whole = engine.generate(requests, GREEDY)
    engine.model.config.get_text_config().sliding_window = 12
    alone = [engine.generate([request], GREEDY)[0] for request in requests]
    assert alone != whole and engine.generate(requests, GREEDY) == alone


def test_an_adapter_answers_as_alone(checkpoint: Checkpoints, tmp_path: Path) -> None:
    adapter = make_adapter(checkpoint("toyworld"), tmp_path / "adapter")
    model = ModelConfig(path=str(checkpoint("toyworld")), adapter=str(adapter))
    engine = TransformersEngine(model, limits=BatchLimits(16, None), on_gpu=False)
    requests = several_answers()
    assert engine.generate(requests, SAMPLED) == [engine.generate([each], SAMPLED)[0] for each in requests]


def test_other_families_read_each_request(
    checkpoint: Checkpoints, loaded: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, requests = loaded("llava"), several_answers()
    expected: list[Answer] = engine.generate(requests, SAMPLED)
    monkeypatch.setattr(engine.batches, "limits", BatchLimits(16, None))
    monkeypatch.setattr("stic_ray.engines.transformers_engine.is_tested_family", lambda config: False)
    pictures: list[int] = []
    generate = engine.model.generate

    def look_and_generate(**inputs: Any) -> Any:
        pictures.append(len(inputs.get("pixel_values", ())))
        return generate(**inputs)

    monkeypatch.setattr(engine.model, "generate", look_and_generate)
    assert engine.generate(requests, SAMPLED) == expected
    assert pictures == [8, 0]


def test_questions_are_told_apart_by_prompt_and_picture() -> None:
    one, same_pixels = scene(1), scene(1)
    asked = [("a", one), ("a", one), ("b", one), ("a", same_pixels), ("a", None), ("b", one), ("a", None)]
    assert questions_of([Request(*each) for each in asked]) == [0, 0, 1, 2, 3, 1, 3]
