"""What generation and training take, from sizes and speeds alone: plain numbers in, seconds and bytes out.

Reading a prompt is bound by arithmetic: 2 operations per parameter and token. Writing an answer is bound by memory:
every step reads the weights once for the whole batch, and each request's cached tokens. Training is bound by
arithmetic: 2 operations per parameter and token forward, 2 for the gradients of activations, 2 for those of weights.
"""

from dataclasses import dataclass

from stic_ray.core.workload import BYTES_PER_WEIGHT, ModelSize


@dataclass(frozen=True)
class Speed:
    """What one process reaches."""

    flops: float
    """Operations per second."""
    bandwidth: float
    """Bytes per second between chip and memory."""
    step_floor_s: float = 0.0
    """Seconds that a step of generation takes at least, whatever the device: the engine's own work."""


def cache_bytes_per_token(num_layers: int, num_key_value_heads: int, head_dim: int) -> int:
    """Return the bytes that keys and values of one token take; Mistral-7B: 32 layers x 8 x 128 x 2 x 2 = 131,072."""
    return num_layers * num_key_value_heads * head_dim * 2 * BYTES_PER_WEIGHT


def generation_s(
    model: ModelSize, speed: Speed, *, num_prompt_tokens: float, num_answer_tokens: float, batch_size: float
) -> float:
    """Return the seconds of one process per request, when it has `batch_size` requests at a time.

    `num_prompt_tokens` are those that are computed, image included: a shared prefix counts once.
    """
    reading_s = 2 * model.num_parameters * num_prompt_tokens / speed.flops
    context_tokens = num_prompt_tokens + num_answer_tokens / 2
    step_bytes = model.weight_bytes + batch_size * context_tokens * model.cache_bytes_per_token
    step_s = max(step_bytes / speed.bandwidth, speed.step_floor_s)
    return reading_s + num_answer_tokens * step_s / batch_size
