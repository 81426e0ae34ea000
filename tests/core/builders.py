"""Rows and files that hold what a schema asks for, for tests to spoil in one place."""

import io
from typing import Any

from PIL import Image

from stic_ray.method.preferences import NO_CANDIDATES


def png(colour: str = "red", size: tuple[int, int] = (12, 10)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def pair(**changes: Any) -> dict[str, Any]:
    """A complete row of the table `pairs`."""
    row = {
        "image_id": "0123456789abcdef0123456789abcdef",
        "position": 0,
        "image": {"bytes": png(), "path": "/images/a.png"},
        "prompt": [{"role": "user", "content": "Describe this picture."}],
        "chosen": [{"role": "assistant", "content": "A red field."}],
        "rejected": [{"role": "assistant", "content": "A red field with a horse."}],
        "chosen_prompt": "Look closely, then describe.",
        "rejected_prompt": "Make something up.",
        "negative": "hallucination_prompt",
        "corruption": None,
        "pixel_change": None,
        **NO_CANDIDATES,
        "num_image_tokens": 16,
        "num_chosen_tokens": 4,
        "num_rejected_tokens": 7,
        "num_sequence_tokens": 40,
        "reference_chosen_logp": None,
        "reference_rejected_logp": None,
        "chosen_finish_reason": "stop",
        "rejected_finish_reason": "stop",
        "model": "/models/tiny",
        "model_revision": "abc",
        "seed": 0,
    }
    return {**row, **changes}


def infused(**changes: Any) -> dict[str, Any]:
    """A complete row of the table of infused instruction data."""
    row = {
        "id": "row-1",
        "image": {"bytes": png("blue"), "path": "/images/b.png"},
        "messages": [{"role": "user", "content": "What colour?"}, {"role": "assistant", "content": "Blue."}],
        "description": "A blue field.",
        "description_prompt": "Describe this image in detail.",
        "finish_reason": "stop",
        "num_sequence_tokens": 50,
        "text_logps": [-0.5, -1.25],
        "model": "/models/tiny",
    }
    return {**row, **changes}


def rejected(reason: str, image_id: str = "a") -> dict[str, Any]:
    return {"image_id": image_id, "path": f"/images/{image_id}.png", "reason": reason, "message": "because"}
