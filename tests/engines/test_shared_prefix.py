"""Two answers behind one prompt: the log-probabilities of separate sequences, for a part of the work."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stic_ray.core.config import ModelConfig
from stic_ray.engines import shared_prefix
from stic_ray.engines.base import AnsweredPrompt
from stic_ray.engines.loading import load_model, load_processor
from stic_ray.engines.rendering import Message, split_answers
from stic_ray.engines.sequences import SequenceBuilder, image_token_id
from stic_ray.engines.shared_prefix import CHOSEN, PADDING, PROMPT, REJECTED
from tests.engines.conftest import Checkpoints, Engines
from tests.engines.families import EMBEDDED, scene

PICTURES = [scene(1), scene(2, 120, 50), scene(3, 40, 100)]
"""Of three shapes, so that some families give them different numbers of tokens, and tiles."""
PROMPTS = ["Describe this picture.", "Hi", "How many shapes are there, and where is each of them?"]
ANSWERS = [
    ("There is a red circle at the top left.", "A dog."),
    ("No", "There are four blue squares and a green triangle at the centre of the picture."),
    ("One", "Two"),
]


def processor_and_model(folder: Path) -> tuple[Any, Any]:
    config = ModelConfig(path=str(folder))
    return load_processor(config), load_model(config, dtype=torch.float32).eval()


def texts(processor: Any) -> tuple[list[str], list[tuple[str, str]]]:
    split = [
        [[text for text, _ in split_answers(processor, asked(prompt, answer), with_image=True)] for answer in pair]
        for prompt, pair in zip(PROMPTS, ANSWERS, strict=True)
    ]
    return [chosen[0] for chosen, _ in split], [(chosen[1], rejected[1]) for chosen, rejected in split]


def asked(prompt: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def pairs_batch(processor: Any) -> dict[str, Tensor]:
    builder = SequenceBuilder(processor)
    built = [
        [builder.build(asked(prompt, answer), with_image=True) for answer in pair]
        for prompt, pair in zip(PROMPTS, ANSWERS, strict=True)
    ]
    return shared_prefix.make_batch(builder, PICTURES, [(chosen, rejected) for chosen, rejected in built])


def separate_logps(model: Any, processor: Any) -> Tensor:
    """One plain sequence at a time, without padding; shape (pairs, 2)."""
    prompts, answers = texts(processor)
    rows = []
    for picture, prompt, pair in zip(PICTURES, prompts, answers, strict=True):
        for answer in pair:
            num_asked = processor(images=[[picture]], text=[prompt], return_tensors="pt", add_special_tokens=False)
            num_asked = num_asked["input_ids"].shape[1]
            inputs = processor(
                images=[[picture]], text=[prompt + answer], return_tensors="pt", add_special_tokens=False
            )
            logps = model(**inputs).logits[0, :-1].log_softmax(-1)
            tokens = inputs["input_ids"][0, 1:]
            rows.append(logps.gather(1, tokens.unsqueeze(1))[num_asked - 1 :].sum())
    return torch.stack(rows).reshape(-1, 2)


def shared_logps(model: Any, batch: dict[str, Tensor]) -> Tensor:
    logps = model(**shared_prefix.model_inputs(batch, model.config)).logits[:, :-1].log_softmax(-1)
    of_tokens = logps.gather(2, batch["input_ids"][:, 1:].unsqueeze(2)).squeeze(2)
    return shared_prefix.sum_by_answer(of_tokens, batch)


@pytest.mark.parametrize("family", EMBEDDED)
def test_log_probabilities_are_those_of_separate_sequences(family: str, checkpoint: Checkpoints) -> None:
    processor, model = processor_and_model(checkpoint(family))
    assert shared_prefix.reason_against(model.config) is None
    batch = pairs_batch(processor)
    with torch.no_grad():
        expected, found = separate_logps(model, processor), shared_logps(model, batch)
    for each in (found, shared_prefix.score(model, batch)):
        # Sums go to -943 here, where neighbouring float32 numbers are 6e-5 apart.
        torch.testing.assert_close(each, expected, atol=1e-4, rtol=2e-7)
    assert (expected[:, 0] - expected[:, 1]).abs().min() > 0.1, "the answers differ, so mixing them up would show"


@pytest.mark.parametrize("family", EMBEDDED)
def test_rows_may_have_different_numbers_of_answers(family: str, checkpoint: Checkpoints) -> None:
    """One, three and two of them, the last row without a picture where the others have one."""
    processor, model = processor_and_model(checkpoint(family))
    builder = SequenceBuilder(processor)
    images = [*PICTURES[:2], None]
    texts = [[ANSWERS[0][0]], [*ANSWERS[1], "Perhaps."], [*ANSWERS[2]]]
    rows = [
        [builder.build(asked(prompt, answer), with_image=image is not None) for answer in answers]
        for prompt, image, answers in zip(PROMPTS, images, texts, strict=True)
    ]
    found = shared_prefix.score(model, shared_prefix.make_batch(builder, images, rows))
    assert found.shape == (3, 3)
    for row, image, logps in zip(rows, images, found, strict=True):
        alone = [
            shared_prefix.score(model, shared_prefix.make_batch(builder, [image], [[each]])).item() for each in row
        ]
        assert logps.tolist() == pytest.approx([*alone, *[0.0] * (3 - len(row))], rel=1e-6, abs=1e-4)


@pytest.mark.parametrize("family", EMBEDDED)
def test_gradients_are_those_of_separate_sequences(family: str, checkpoint: Checkpoints) -> None:
    processor, model = processor_and_model(checkpoint(family))
    batch = pairs_batch(processor)
    weight = model.get_output_embeddings().weight
    inner = next(p for name, p in model.named_parameters() if name.endswith("layers.0.self_attn.k_proj.weight"))
    found = torch.autograd.grad((shared_logps(model, batch) * torch.tensor([1.0, -2.0])).sum(), [weight, inner])
    losses = separate_logps(model, processor) * torch.tensor([1.0, -2.0])
    expected = torch.autograd.grad(losses.sum(), [weight, inner])
    for one, other in zip(found, expected, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", EMBEDDED)
def test_image_and_prompt_are_there_once(family: str, checkpoint: Checkpoints) -> None:
    processor, _ = processor_and_model(checkpoint(family))
    batch = pairs_batch(processor)
    prompts, _ = texts(processor)
    alone = processor(
        images=[[p] for p in PICTURES], text=prompts, padding=True, return_tensors="pt", add_special_tokens=False
    )
    token = image_token_id(processor)
    assert ((batch["input_ids"] == token).sum(1) == (alone["input_ids"] == token).sum(1)).all()
    assert torch.equal(batch["pixel_values"], alone["pixel_values"])
    assert ((batch["segments"] == PROMPT).sum(1) == alone["attention_mask"].sum(1) - 1).all()


def test_a_token_sees_the_prompt_and_its_own_answer() -> None:
    segments = torch.tensor([[PADDING, PROMPT, PROMPT, CHOSEN, CHOSEN, REJECTED, REJECTED, PADDING]])
    positions = torch.tensor([[0, 0, 1, 2, 3, 2, 3, 4]])
    seen = shared_prefix.attention_mask(segments, positions, window=None)[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0, 1, 0, 0],
        [0, 1, 1, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],
    ]
    near = shared_prefix.attention_mask(segments, positions, window=2)[0, 0].int().tolist()
    assert near[4] == [0, 0, 0, 1, 1, 0, 0, 0]
    assert near[5] == [0, 0, 1, 0, 0, 1, 0, 0]


def test_a_sliding_window_is_kept(checkpoint: Checkpoints) -> None:
    """The window is shorter than the pictures' tokens, so that most of them are out of sight."""
    processor, model = processor_and_model(checkpoint("llava_next"))
    batch = pairs_batch(processor)
    with torch.no_grad():
        whole = separate_logps(model, processor)
        model.config.get_text_config().sliding_window = 12
        expected = separate_logps(model, processor)
        assert (whole - expected).abs().max() > 1e-3
        assert (shared_logps(model, batch) - expected).abs().max() < 1e-4


def test_other_families_and_attentions_are_refused(checkpoint: Checkpoints) -> None:
    _, model = processor_and_model(checkpoint("llava"))
    model.config.get_text_config()._attn_implementation = "eager"
    assert "eager" in (shared_prefix.reason_against(model.config) or "")
    model.config.get_text_config()._attn_implementation = "sdpa"
    model.config.model_type = "llava_other"
    assert "llava_other with llama is not among" in (shared_prefix.reason_against(model.config) or "")


@pytest.mark.parametrize("family", EMBEDDED)
def test_an_answer_that_was_cut_off_is_scored_without_an_end(family: str, loaded: Engines) -> None:
    """What is stored beside a pair is what its training will score."""
    engine = loaded(family)
    whole = AnsweredPrompt(PROMPTS[0], PICTURES[0], ANSWERS[0])
    cut = replace(whole, cut_off=(True, False))
    (chosen, rejected), (shorter, same) = engine.score_answers([whole, cut])
    assert same == pytest.approx(rejected, rel=1e-5)
    sequence = engine.builder.build(asked(PROMPTS[0], ANSWERS[0][0]), with_image=True)
    batch = engine.builder.batch([sequence], [PICTURES[0]])
    learnt = batch.pop("is_answer")[0, 1:]
    with torch.no_grad():
        logps = engine.model(**batch).logits[0, :-1].log_softmax(-1)
    last = logps.gather(1, batch["input_ids"][0, 1:, None]).squeeze(1)[learnt][-1].item()
    assert chosen - shorter == pytest.approx(last, abs=1e-3)
