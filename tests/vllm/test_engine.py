"""The vllm engine says what the transformers engine says, to any number of threads.

Greedy answers are compared for equality: in float32 with the toy world's model they differ in no token. Sampled answers
are not, as vLLM draws with noise of its own; they are compared with themselves.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import EngineError, EngineLost
from stic_ray.engines.base import Answer, Request, Sampling
from stic_ray.engines.batching import BatchLimits
from stic_ray.engines.transformers_engine import TransformersEngine
from stic_ray.engines.vllm_engine import VllmEngine
from tests.engines.families import mixed_requests, scene
from tests.engines.test_adapters import make_adapter
from tests.vllm.conftest import ACTORS

GREEDY = Sampling(32)
SAMPLED = Sampling(24, temperature=1.0, top_p=0.95)
PICTURES = [Request("Describe the picture.", scene(number, 48, 48), seed=number) for number in range(24)]


def test_greedy_answers_are_those_of_the_transformers_engine(
    vllm_engine: VllmEngine, transformers_engine: TransformersEngine
) -> None:
    """Texts, token counts, finish reasons, tokens of the image: everything that an answer holds."""
    requests = [*PICTURES, *mixed_requests()]
    answers = vllm_engine.generate(requests, GREEDY)
    assert answers == transformers_engine.generate(requests, GREEDY)
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    assert {answer.num_image_tokens for answer in answers} == {0, 9}
    assert len({answer.text for answer in answers}) > 12, "the pictures are seen"


def test_the_counter_agrees_with_what_the_engine_adds(vllm_engine: VllmEngine) -> None:
    requests = [request for request in mixed_requests() if request.image is not None]
    added = vllm_engine.count_added_tokens([request.image for request in requests if request.image is not None])
    assert [answer.num_added_tokens for answer in vllm_engine.generate(requests, Sampling(1))] == added


def test_a_seed_decides_whatever_else_is_in_the_batch(vllm_engine: VllmEngine) -> None:
    together = vllm_engine.generate(PICTURES, SAMPLED)
    assert vllm_engine.generate(PICTURES[::-1], SAMPLED)[::-1] == together
    assert [vllm_engine.generate([request], SAMPLED)[0] for request in PICTURES[:4]] == together[:4]
    others = [Request(request.prompt, request.image, request.seed + 100) for request in PICTURES]
    assert vllm_engine.generate(others, SAMPLED) != together


def test_seeds_hold_when_prompts_do_not_fit_into_one_step(vllm_engine: VllmEngine) -> None:
    """vLLM would answer the first part of a prompt and take the draw back, which it cannot do on a CPU."""
    long = [Request("Where is it? " * 150, request.image, request.seed) for request in PICTURES[:12]]
    together = vllm_engine.generate(long, SAMPLED)
    assert vllm_engine.generate(long[-2:], SAMPLED) == together[-2:]


def in_threads(engine: VllmEngine, parts: Sequence[Sequence[Request]]) -> list[list[Answer] | Exception]:
    """What each part of the requests gives when all are asked at the same time."""
    results: list[list[Answer] | Exception] = [[] for _ in parts]
    ready = threading.Barrier(len(parts))

    def ask(place: int) -> None:
        ready.wait()
        try:
            results[place] = engine.generate(parts[place], SAMPLED)
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_share_the_engine(vllm_engine: VllmEngine) -> None:
    parts = [PICTURES[start::3] for start in range(3)]
    assert in_threads(vllm_engine, parts) == [vllm_engine.generate(part, SAMPLED) for part in parts]


def test_a_request_that_is_refused_fails_its_own_call_alone(vllm_engine: VllmEngine) -> None:
    too_long = Request("word " * 3000, None)
    good, bad, after = in_threads(vllm_engine, [PICTURES[:6], [*PICTURES[6:9], too_long], PICTURES[9:15]])
    assert isinstance(bad, EngineError) and "2048" in str(bad) and "\n" not in str(bad)
    assert good == vllm_engine.generate(PICTURES[:6], SAMPLED)
    assert after == vllm_engine.generate(PICTURES[9:15], SAMPLED)


def test_nothing_to_answer_is_no_work(vllm_engine: VllmEngine) -> None:
    assert vllm_engine.generate([], GREEDY) == []


def test_an_adapter_is_applied_and_a_dead_engine_is_told(tiny_llava: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tiny_llava, tmp_path / "adapter")
    base = ModelConfig(path=str(tiny_llava), engine="vllm")
    adapted = base.model_copy(update={"adapter": str(adapter)})
    engine = VllmEngine(adapted, ACTORS)
    answers = engine.generate(PICTURES, GREEDY)
    for model in (base, adapted):
        reference = TransformersEngine(model, limits=BatchLimits(16, None), on_gpu=False)
        assert (answers == reference.generate(PICTURES, GREEDY)) == (model is adapted)
    assert engine.name == str(adapter)

    waiting: list[Exception] = []

    def ask_for_long() -> None:
        try:
            engine.generate([Request("Hi", None)] * 64, Sampling(2000))
        except EngineLost as error:
            waiting.append(error)

    thread = threading.Thread(target=ask_for_long)
    thread.start()
    for process_id in engine.process_ids:
        psutil.Process(process_id).kill()
    thread.join()
    assert len(waiting) == 1, "who waits is told"
    with pytest.raises(EngineLost, match="died"):
        engine.generate(PICTURES, GREEDY)
    engine.close()
