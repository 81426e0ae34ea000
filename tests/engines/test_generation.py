"""Generation with transformers: batches change nothing, seeds decide, counts are right."""

import json
import logging
import random
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import EngineError
from stic_ray.core.randomness import seed_for
from stic_ray.engines.base import Answer, Request, Sampling
from stic_ray.engines.batching import BatchLimits
from stic_ray.engines.rendering import split_answers
from stic_ray.engines.sequences import ProcessorCounter, image_token_id
from stic_ray.engines.transformers_engine import SeededNoise, TransformersEngine
from stic_ray.toyworld.language import PROMPTS
from tests.engines.conftest import Checkpoints, Engines
from tests.engines.families import EMBEDDED, IMAGE_TOKENS, WITH_BOS, mixed_requests, scene
from tests.engines.test_adapters import make_adapter

GREEDY = Sampling(max_new_tokens=12)
SAMPLED = Sampling(max_new_tokens=12, temperature=0.8, top_p=0.95)


def one_at_a_time(engine: TransformersEngine, requests: Sequence[Request], sampling: Sampling) -> list[Answer]:
    return [engine.generate([request], sampling)[0] for request in requests]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", EMBEDDED)
def test_a_batch_says_what_each_request_says_alone(
    family: str, sampling: Sampling, loaded: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, requests = loaded(family), mixed_requests()
    alone = one_at_a_time(engine, requests, sampling)
    assert len({answer.text for answer in alone}) > 3, "the requests have different answers"
    for batch_size in (2, 3, 8):
        monkeypatch.setattr(engine.batches, "limits", BatchLimits(batch_size, None))
        assert engine.generate(requests, sampling) == alone
        order = random.Random(batch_size).sample(range(len(requests)), len(requests))
        shuffled = engine.generate([requests[place] for place in order], sampling)
        assert shuffled == [alone[place] for place in order]


@pytest.mark.parametrize("family", EMBEDDED)
def test_the_seed_decides_what_is_said(family: str, loaded: Engines) -> None:
    engine = loaded(family)
    prompt = PROMPTS["step_by_step"][0]  # asks the toy world's model for sizes, of which it is never sure
    requests = [Request(prompt, scene(1), seed=seed) for seed in (1, 2, 3, 4, 1)]
    texts = [answer.text for answer in engine.generate(requests, SAMPLED)]
    assert texts[0] == texts[4]
    assert len(set(texts)) >= 3
    torch.manual_seed(5)
    assert [answer.text for answer in engine.generate(requests, SAMPLED)] == texts
    assert len({answer.text for answer in engine.generate(requests, GREEDY)}) == 1


@pytest.mark.parametrize("family", EMBEDDED)
def test_the_picture_and_the_prompt_decide_what_is_said(family: str, loaded: Engines) -> None:
    engine = loaded(family)
    by_picture = [Request("Describe this picture.", scene(index)) for index in range(4)]
    by_prompt = [Request(prompt, scene(1)) for prompt in ("Describe this picture.", "How many shapes are there?", "Hi")]
    for requests in (by_picture, by_prompt):
        assert len({answer.text for answer in engine.generate(requests, GREEDY)}) > 1


ODD_GENERATION = {
    "repetition_penalty": 3.0,
    "no_repeat_ngram_size": 2,
    "num_beams": 2,
    "length_penalty": 0.1,
    "suppress_tokens": list(range(40, 120)),
    "bad_words_ids": [[60], [61]],
    "min_new_tokens": 40,
    "forced_eos_token_id": 3,
    "temperature": 0.1,
    "top_k": 1,
    "do_sample": True,
    "guidance_scale": 2.0,
}


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("with_adapter", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_are_drawn_from_the_model_alone(
    where: str, with_adapter: bool, sampling: Sampling, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    """What a checkpoint asks of `generate` (Qwen2.5-VL: a repetition penalty) is not asked of vLLM either."""
    odd = Path(shutil.copytree(checkpoint("toyworld"), tmp_path / "odd"))
    content = json.loads((odd / where).read_text(encoding="utf-8"))
    (odd / where).write_text(json.dumps(content | ODD_GENERATION), encoding="utf-8")
    adapter = str(make_adapter(checkpoint("toyworld"), tmp_path / "adapter")) if with_adapter else None
    said, expected = (
        TransformersEngine(
            ModelConfig(path=str(path), adapter=adapter), limits=BatchLimits(8, None), on_gpu=False
        ).generate(mixed_requests(), sampling)
        for path in (odd, checkpoint("toyworld"))
    )
    assert said == expected


@pytest.mark.parametrize("family", EMBEDDED)
def test_one_token_to_choose_from_is_greedy(family: str, loaded: Engines) -> None:
    narrow = Sampling(max_new_tokens=12, temperature=0.8, top_p=1e-6)
    requests = mixed_requests()
    assert loaded(family).generate(requests, narrow) == loaded(family).generate(requests, GREEDY)


def test_an_answer_ends_by_itself_or_at_the_limit(loaded: Engines) -> None:
    engine, limit = loaded("toyworld"), 16
    requests = [Request("Describe this picture.", scene(index), seed=index) for index in range(16)]
    short = engine.generate(requests, Sampling(limit, temperature=0.8))
    long = engine.generate(requests, Sampling(2 * limit, temperature=0.8))
    assert {answer.finish_reason for answer in short} == {"stop", "length"}, "the sample has both"
    for answer, longer in zip(short, long, strict=True):
        if answer.finish_reason == "stop":
            assert answer == longer
            assert answer.num_tokens <= limit
        else:
            assert answer.num_tokens == limit
            assert longer.text.startswith(answer.text)
            assert longer.num_tokens > limit or longer.finish_reason == "stop"


def test_no_special_token_is_part_of_an_answer(loaded: Engines) -> None:
    for family in EMBEDDED:
        engine = loaded(family)
        for answer in engine.generate(mixed_requests(), SAMPLED):
            assert not any(token in answer.text for token in engine.processor.tokenizer.all_special_tokens)
            assert answer.text == answer.text.strip()


@pytest.mark.parametrize("family", EMBEDDED)
def test_image_tokens_are_counted(family: str, loaded: Engines) -> None:
    requests = [Request("Describe this picture.", scene(1)), Request("Hi", scene(2)), Request("Hi", None)]
    answers = loaded(family).generate(requests, Sampling(1))
    assert [answer.num_image_tokens for answer in answers] == [IMAGE_TOKENS[family], IMAGE_TOKENS[family], 0]
    assert answers[2].num_added_tokens == 0


@pytest.mark.parametrize("picture", [scene(1), scene(2, 120, 50), scene(3, 40, 100)], ids=lambda image: str(image.size))
@pytest.mark.parametrize("family", EMBEDDED)
def test_text_and_added_tokens_are_the_whole_sequence(family: str, picture: Any, loaded: Engines) -> None:
    """What `max_length_tokens` is compared with is the length that training will see."""
    engine = loaded(family)
    answer = engine.generate([Request("Describe this picture.", picture)], Sampling(1))[0]
    conversation = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A red square."}]
    pieces = split_answers(engine.processor, conversation, with_image=True)
    text = "".join(text for text, _ in pieces)
    inputs = engine.processor(images=[[picture]], text=[text], return_tensors="pt", add_special_tokens=False)
    expected = inputs["input_ids"].shape[1]
    assert engine.count_text_tokens(conversation, with_image=True) + answer.num_added_tokens == expected
    others = [scene(4), picture, scene(5, 90, 60)]
    counter = ProcessorCounter(ModelConfig(path=engine.name))
    assert counter.count_added_tokens(others)[1] == answer.num_added_tokens, "counted without weights, in a batch"
    assert (inputs["input_ids"] == image_token_id(engine.processor)).sum() == answer.num_image_tokens


def prompts_seen(engine: TransformersEngine, requests: Sequence[Request], patch: pytest.MonkeyPatch) -> list[list[int]]:
    """The token ids of each prompt as the model gets them, without padding."""
    seen: list[list[int]] = []
    generate = engine.model.generate

    def look_and_generate(**inputs: Any) -> Any:
        for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True):
            assert mask[-1], "padding is on the left"
            seen.append(ids[mask].tolist())
        return generate(**inputs)

    with patch.context() as context:
        context.setattr(engine.model, "generate", look_and_generate)
        engine.generate(requests, Sampling(1))
    return seen


@pytest.mark.parametrize("family", EMBEDDED)
def test_a_prompt_begins_with_bos_exactly_once_where_there_is_one(
    family: str, loaded: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = loaded(family)
    bos = engine.processor.tokenizer.bos_token_id
    assert (bos is not None) == (family in WITH_BOS)
    prompts = prompts_seen(engine, mixed_requests(), monkeypatch)
    assert len(prompts) == len(mixed_requests())
    if family in WITH_BOS:
        assert [(prompt[0], prompt.count(bos)) for prompt in prompts] == [(bos, 1)] * len(prompts)


def test_a_template_that_writes_bos_itself_gets_no_second_one(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "{{ part.text if part.type == 'text' else '<image>' }}"
    parts = f"{{% for part in message.content %}}{text}{{% endfor %}}"
    template = f"{{{{ bos_token }}}}{{% for message in messages %}}Q: {parts} A:{{% endfor %}}"
    model = ModelConfig(path=str(checkpoint("llava")), chat_template=template)
    engine = TransformersEngine(model, limits=BatchLimits(4, None), on_gpu=False)
    bos = engine.processor.tokenizer.bos_token_id
    prompts = prompts_seen(engine, [Request("What?", scene(1)), Request("What?", None)], monkeypatch)
    assert [(prompt[0], prompt.count(bos)) for prompt in prompts] == [(bos, 1)] * 2


@pytest.mark.parametrize("family", EMBEDDED)
def test_a_question_that_spells_the_placeholder_is_answered(family: str, loaded: Engines) -> None:
    """Benchmarks in LLaVA's format write "<image>" into the question; there is still one picture."""
    for image in (scene(1), None):
        answer = loaded(family).generate([Request("<image>\nWhat is it?", image)], Sampling(4))[0]
        assert answer.num_image_tokens == (IMAGE_TOKENS[family] if image else 0)


@pytest.fixture
def own_engine(checkpoint: Checkpoints) -> TransformersEngine:
    return TransformersEngine(ModelConfig(path=str(checkpoint("toyworld"))), limits=BatchLimits(8, None), on_gpu=False)


def fit_at_most(engine: TransformersEngine, num_rows: int, patch: pytest.MonkeyPatch) -> list[int]:
    """Let the model run out of memory above so many rows; returns the sizes of the batches that it is given."""
    sizes: list[int] = []
    generate = engine.model.generate

    def generate_if_it_fits(**inputs: Any) -> Any:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > num_rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return generate(**inputs)

    patch.setattr(engine.model, "generate", generate_if_it_fits)
    return sizes


@pytest.mark.parametrize(("fitting", "tried"), [(8, [5, 2]), (3, [5, 2, 2, 1, 2]), (1, [5, 2, 1, 1, 1, 1, 1, 1, 1])])
def test_a_batch_that_does_not_fit_is_halved_and_the_size_kept(
    fitting: int,
    tried: list[int],
    own_engine: TransformersEngine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    requests = mixed_requests()
    expected = own_engine.generate(requests, SAMPLED)
    sizes = fit_at_most(own_engine, fitting, monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert own_engine.generate(requests, SAMPLED) == expected
    assert sizes == tried
    assert len(caplog.records) == sum(size > fitting for size in tried), "each halving is logged"
    sizes.clear()
    assert own_engine.generate(requests, SAMPLED) == expected
    assert max(sizes) <= max(fitting, 1), "the smaller size is kept"


def test_a_single_request_that_does_not_fit_is_an_error(
    own_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its own kind: whoever calls must not take it for a call that was too large."""
    fit_at_most(own_engine, 0, monkeypatch)
    with pytest.raises(EngineError, match="out of memory with a single request of about [0-9]+ tokens: CUDA"):
        own_engine.generate(mixed_requests(), GREEDY)


def test_tokens_bound_a_batch(own_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the five requests with a picture takes between 20 and 60 tokens, with room for 12 to say."""
    requests = mixed_requests()
    expected = own_engine.generate(requests, SAMPLED)
    sizes = fit_at_most(own_engine, 8, monkeypatch)
    monkeypatch.setattr(own_engine.batches, "limits", BatchLimits(8, 80))
    assert own_engine.generate(requests, SAMPLED) == expected
    assert max(sizes) == 2
    assert len(sizes) > len(requests) / 2


def test_the_requests_of_one_image_share_a_batch(
    own_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ("Hi", "How many shapes are there, and where is each of them?")
    requests = [Request(prompt, scene(i), seed=i, image_id=f"image {i}") for prompt in prompts for i in range(4)]
    batches: list[set[str]] = []
    generate_batch = own_engine._generate_batch

    def observe(asked: Sequence[Request], *arguments: Any) -> list[Answer]:
        batches.append({request.image_id for request in asked})
        return generate_batch(asked, *arguments)

    monkeypatch.setattr(own_engine.batches, "limits", BatchLimits(4, None))
    monkeypatch.setattr(own_engine, "_generate_batch", observe)
    own_engine.generate(requests, GREEDY)
    assert [len(images) for images in batches] == [2, 2]
    assert not batches[0] & batches[1]


def test_threads_share_an_engine(own_engine: TransformersEngine) -> None:
    """Counting tokens and padding them go on at the same time, which a tokenizer refuses where it is not guarded."""
    requests = mixed_requests()
    expected = own_engine.generate(requests, SAMPLED)
    with ThreadPoolExecutor(4) as pool:
        counting = [pool.submit(own_engine.count_added_tokens, [scene(1)] * 3) for _ in range(60)]
        for answers in pool.map(lambda _: own_engine.generate(requests, SAMPLED), range(8)):
            assert answers == expected
    assert {tuple(each.result()) for each in counting} == {tuple(own_engine.count_added_tokens([scene(1)] * 3))}


@pytest.mark.parametrize("family", EMBEDDED)
def test_what_an_image_adds_is_known_from_its_size(family: str, loaded: Engines) -> None:
    """It plans batches, so a token more or less for a placeholder does no harm."""
    engine = loaded(family)
    for picture in (scene(1), scene(2, 120, 50), scene(3, 40, 100)):
        assert abs(engine.guess_added_tokens(picture) - engine.count_added_tokens([picture])[0]) <= 1
    assert engine.guess_added_tokens(None) == 0


def test_nothing_to_answer_is_no_work(loaded: Engines) -> None:
    assert loaded("toyworld").generate([], GREEDY) == []


SCORES = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -torch.inf])


def draws(seeds: Sequence[int], num_steps: int = 1) -> torch.Tensor:
    """Tokens of shape (rows, steps), drawn from SCORES with one seed per row."""
    noise = SeededNoise(seeds, torch.device("cpu"))
    ids: Any = torch.zeros(len(seeds), 1, dtype=torch.long)
    scores: Any = SCORES.expand(len(seeds), -1).clone()
    return torch.stack([noise(ids, scores).argmax(-1) for _ in range(num_steps)], dim=1)


@pytest.mark.parametrize(
    "seeds",
    [range(6000), [seed_for(0, str(number), "chosen") for number in range(6000)]],
    ids=["neighbouring", "by image"],
)
def test_tokens_are_drawn_with_their_probabilities(seeds: Sequence[int]) -> None:
    expected = SCORES.double().softmax(0) * len(seeds)
    for column in draws(seeds, num_steps=3).T:
        counts = torch.bincount(column, minlength=len(SCORES))
        assert counts[-1] == 0, "a token that was ruled out is never drawn"
        assert stats.chisquare(counts[:-1], expected[:-1]).pvalue > 0.001


def test_the_tokens_of_one_answer_are_drawn_independently() -> None:
    first, second = draws(range(6000), num_steps=2).clamp(max=3).T
    table = torch.bincount(first * 4 + second, minlength=16).reshape(4, 4)
    assert stats.chi2_contingency(table.numpy()).pvalue > 0.001


def test_draws_of_one_seed_do_not_depend_on_the_other_rows() -> None:
    assert draws([5, 6, 7], 20)[1].equal(draws([6], 20)[0])
    assert not draws([5], 20).equal(draws([6], 20))
