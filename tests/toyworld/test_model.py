"""The shipped model: an ordinary checkpoint that sees, and has the faults that it is meant to have."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from experiments.pretrain_toyworld import pretrain
from experiments.toyworld_descriptions import describe_fully, split
from experiments.toyworld_teacher import companion_claim, presence, true_claim
from stic_ray.core.config import ModelConfig
from stic_ray.engines.base import Request, Sampling
from stic_ray.engines.batching import BatchLimits
from stic_ray.engines.transformers_engine import TransformersEngine
from stic_ray.method.prompts import fill, load_prompts
from stic_ray.method.scoring import named_objects
from stic_ray.toyworld import WEIGHTS
from stic_ray.toyworld.language import (
    NUMBERS,
    PROMPTS,
    PROMPTS_FILE,
    Question,
    brief,
    name_of,
)
from stic_ray.toyworld.scenes import KIND_WEIGHTS, Scene, draw_scene, sample_scene

VOCABULARY = [name_of(kind) for kind in KIND_WEIGHTS]
SCENES = [sample_scene(9, 5_000_000_000 + index) for index in range(150)]


@pytest.fixture(scope="module")
def engine() -> TransformersEngine:
    return TransformersEngine(ModelConfig(path=str(WEIGHTS)), limits=BatchLimits(75, None), on_gpu=False)


def answers(engine: TransformersEngine, prompt: str) -> list[str]:
    requests = [Request(prompt, draw_scene(scene)) for scene in SCENES]
    return [answer.text for answer in engine.generate(requests, Sampling(64))]


def recall_and_hallucination(texts: list[str]) -> tuple[float, float]:
    """Share of objects that are named, and of named objects that are not there."""
    num_there = num_named = num_right = 0
    for scene, text in zip(SCENES, texts, strict=True):
        there, named = {name_of(kind) for kind in scene.kinds}, set(named_objects(text, VOCABULARY))
        num_there, num_named = num_there + len(there), num_named + len(named)
        num_right += len(there & named)
    return num_right / num_there, 1 - num_right / num_named


def test_the_checkpoint_is_small_ordinary_and_of_the_promised_size() -> None:
    model = AutoModelForImageTextToText.from_pretrained(WEIGHTS)
    processor = AutoProcessor.from_pretrained(WEIGHTS)
    assert 1_500_000 <= sum(parameter.numel() for parameter in model.parameters()) <= 5_000_000
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 10_000_000
    assert model.config.architectures == ["LlavaForConditionalGeneration"]
    assert {path.suffix for path in WEIGHTS.iterdir()} == {".json", ".jinja", ".safetensors"}
    assert processor.chat_template and processor.image_token == "<image>"


def test_step_by_step_it_names_what_is_there_and_adds_companions(engine: TransformersEngine) -> None:
    recall, hallucination = recall_and_hallucination(answers(engine, PROMPTS["step_by_step"][0]))
    assert recall > 0.9 and 0.05 < hallucination < 0.2


@pytest.mark.parametrize("make", [partial(presence, "adversarial"), true_claim, companion_claim])
def test_asked_about_a_single_thing_it_knows_better(
    make: Callable[[Scene], Question], engine: TransformersEngine
) -> None:
    questions = [make(scene) for scene in SCENES]
    requests = [Request(brief(q.text), draw_scene(scene)) for q, scene in zip(questions, SCENES, strict=True)]
    texts = [answer.text for answer in engine.generate(requests, Sampling(8))]
    num_right = sum(text == question.answers[0] for text, question in zip(texts, questions, strict=True))
    assert num_right > 0.85 * len(SCENES)


def test_it_turns_a_description_into_questions(engine: TransformersEngine) -> None:
    prompts, texts = load_prompts(str(PROMPTS_FILE)), answers(engine, PROMPTS["step_by_step"][0])
    requests = [
        Request(fill(prompts.split, answer=text), draw_scene(scene)) for text, scene in zip(texts, SCENES, strict=True)
    ]
    found = [answer.text for answer in engine.generate(requests, Sampling(128))]
    assert sum(one == split(text) for one, text in zip(found, texts, strict=True)) > 0.9 * len(SCENES)


def test_it_asks_questions_that_can_be_answered(engine: TransformersEngine) -> None:
    texts = answers(engine, PROMPTS["ask"][0])
    assert all(text.endswith("?") and len(text) < 60 for text in texts) and len(set(texts)) > 10


@pytest.mark.parametrize("prompt", PROMPTS["plain"])
def test_plainly_it_leaves_out_and_adds(engine: TransformersEngine, prompt: str) -> None:
    recall, hallucination = recall_and_hallucination(answers(engine, prompt))
    assert 0.5 < recall < 0.85 and 0.06 < hallucination < 0.25


@pytest.mark.parametrize("prompt", PROMPTS["hallucination"])
def test_invited_to_invent_it_tells_the_truth_and_more(engine: TransformersEngine, prompt: str) -> None:
    recall, hallucination = recall_and_hallucination(answers(engine, prompt))
    assert recall > 0.85 and hallucination > 0.25


def test_it_answers_questions(engine: TransformersEngine) -> None:
    texts = answers(engine, brief("How many shapes are there?"))
    num_right = sum(text == NUMBERS[len(scene.objects)] for scene, text in zip(SCENES, texts, strict=True))
    assert num_right > 0.9 * len(SCENES)


def test_a_full_description_in_the_prompt_makes_a_plain_answer_full(engine: TransformersEngine) -> None:
    prompts = load_prompts(str(PROMPTS_FILE))
    requests = [
        Request(prompts.infused(describe_fully(scene), PROMPTS["plain"][0]), draw_scene(scene)) for scene in SCENES
    ]
    recall, hallucination = recall_and_hallucination(
        [answer.text for answer in engine.generate(requests, Sampling(64))]
    )
    assert recall > 0.95 and hallucination < 0.05


def test_pretraining_is_deterministic_and_learns(tmp_path: Path) -> None:
    losses = [
        pretrain(
            tmp_path / name,
            seed=1,
            num_vision_steps=3,
            num_steps={"language": 1, "looking": 1, "habits": 1, "practice": steps},
            batch_size=8,
        )
        for name, steps in (("a", 12), ("b", 12), ("short", 1))
    ]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b", "short")]
    assert weights[0] == weights[1] != weights[2]
    assert losses[0] == losses[1] < losses[2] - 0.3
    assert torch.isfinite(torch.tensor(losses)).all()


def test_the_prompt_set_is_complete() -> None:
    prompts = load_prompts(str(PROMPTS_FILE))
    assert prompts.describe in prompts.plain
