"""The arithmetic of estimates: values worked out by hand, and figures that others published."""

import pytest

from stic_ray.core.devices import find_device
from stic_ray.core.workload import ModelSize, pair_tokens, training_flops
from stic_ray.estimate.known import cache_bytes_per_token
from stic_ray.estimate.rates import Speed, generation_s

SEVEN_B = ModelSize(num_parameters=7e9, num_image_tokens=600, cache_bytes_per_token=100_000)


def speed_of(name: str, step_floor_s: float = 0.0) -> Speed:
    """A device at the shares of its peaks that `estimate.*` has as defaults."""
    device = find_device(name)
    assert device is not None
    return Speed(0.4 * device.peak_flops, 0.6 * device.memory_bandwidth_gb_s * 1e9, step_floor_s)


def test_mistral_caches_128_kib_a_token() -> None:
    assert cache_bytes_per_token(32, 8, 128) == 128 * 1024


def test_a_request_reads_by_arithmetic_and_writes_by_memory() -> None:
    speed = Speed(flops=1e14, bandwidth=1e12)
    # 2 x 7e9 x 1000 / 1e14 to read; 14e9 bytes of weights and 10 x 1050 tokens of 1e5 bytes a step, for ten requests
    expected = 0.14 + 100 * (14e9 + 10 * 1050 * 1e5) / 1e12 / 10
    found = generation_s(SEVEN_B, speed, num_prompt_tokens=1000, num_answer_tokens=100, batch_size=10)
    assert found == pytest.approx(expected)
    assert expected == pytest.approx(0.2905)


def test_a_step_takes_no_less_than_the_engine_needs() -> None:
    slow = Speed(flops=1e14, bandwidth=1e12, step_floor_s=0.025)
    found = generation_s(SEVEN_B, slow, num_prompt_tokens=0, num_answer_tokens=100, batch_size=10)
    assert found == pytest.approx(100 * 0.025 / 10)


@pytest.mark.parametrize(
    ("full", "checkpointing", "reference_pass", "per_token"),
    [(True, False, False, 6), (True, True, False, 8), (False, False, False, 4), (False, True, True, 8)],
)
def test_training_is_6_operations_a_parameter_and_token_and_what_differs(
    full: bool, checkpointing: bool, reference_pass: bool, per_token: int
) -> None:
    flops = training_flops(7e9, 1000, full=full, checkpointing=checkpointing, reference_pass=reference_pass)
    assert flops == pytest.approx(per_token * 7e9 * 1000)


def test_a_shared_prefix_is_trained_on_once() -> None:
    assert pair_tokens(600, 150, shared_prefix=False) == 1500
    assert pair_tokens(600, 150, shared_prefix=True) == 900


def test_the_models_agree_with_what_was_published_to_a_factor_of_three() -> None:
    """VILA² labels 10.6 images/s on an H100 with an 8B model of 196 image tokens and 100 to 130 words an answer."""
    vila = ModelSize(8e9, 196, 131_072)
    one_s = generation_s(vila, speed_of("H100"), num_prompt_tokens=256, num_answer_tokens=160, batch_size=32)
    assert 10.6 / 3 < 1 / one_s < 10.6 * 3


def test_stic_took_about_six_hours_on_four_a6000() -> None:
    """6,099 pairs and 5,000 descriptions one request at a time, then both trainings on one 576-token view (LoRA)."""
    model, speed = ModelSize(7.25e9, 2340, 131_072), speed_of("RTX A6000", step_floor_s=0.025)
    answer_s = generation_s(model, speed, num_prompt_tokens=2400, num_answer_tokens=175, batch_size=1)
    dpo = training_flops(
        7.25e9, 6099 * pair_tokens(640, 175, shared_prefix=False), full=False, checkpointing=True, reference_pass=True
    )
    sft = training_flops(7.25e9, 5000 * 850, full=False, checkpointing=True, reference_pass=False)
    hours = ((2 * 6099 + 5000) * answer_s + (dpo + sft) / speed.flops) / 4 / 3600
    assert 3 < hours < 12
