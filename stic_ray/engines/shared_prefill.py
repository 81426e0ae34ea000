"""Several answers to one question about one picture: both are read once, and every answer goes on from there."""

from collections.abc import Sequence
from typing import Any

import torch

from stic_ray.engines.base import Request
from stic_ray.engines.sequences import Batch


def questions_of(requests: Sequence[Request]) -> list[int]:
    """Return for each request which question it asks, counted from 0: requests of one prompt and picture share one."""
    numbers: dict[tuple[str, int], int] = {}
    return [numbers.setdefault((each.prompt, id(each.image)), len(numbers)) for each in requests]


@torch.inference_mode()
def read_once(model: Any, inputs: Batch, questions: Sequence[int]) -> dict[str, Any]:
    """Read Q questions, padded on the left, and return what `generate` takes to go on from them.

    `questions` names the question of each of R answers. The ids and the mask come back as (R, T), with the keys and
    values of all tokens but the last, which `generate` reads itself.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # as `generate` counts them
    by_position = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    but_last = {name: value[:, :-1] for name, value in by_position.items()}
    outputs = model(**{**inputs, **but_last}, use_cache=True, logits_to_keep=1)
    rows = torch.tensor(questions, device=ids.device)
    cache = outputs.past_key_values
    cache.batch_select_indices(rows)
    return {"input_ids": ids[rows], "attention_mask": mask[rows], "past_key_values": cache}
