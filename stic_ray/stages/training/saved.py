"""Checks on what training saved: it must differ from its start, and an adapter from zero."""

from pathlib import Path
from typing import Any

import torch

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import StageError
from stic_ray.engines.adapters import is_adapter, read_adapter
from stic_ray.engines.loading import load_model


def check_changed(saved: Path, model: ModelConfig, start: Path | None) -> dict[str, Any]:
    """Return how many tensors training changed. Raises StageError when that is none, or the adapter is all zero.

    `start` is the checkpoint that training began with, None for the base model and a new adapter, whose B
    matrices start at zero. (LoRA under ZeRO-3 has saved empty adapters: github.com/huggingface/trl/issues/4416.)
    """
    if is_adapter(saved):
        before = read_adapter(start) if start is not None else {}
        after = read_adapter(saved)
        num_nonzero = sum(bool(t.any()) for name, t in after.items() if ".lora_B." in name)
        num_changed = sum(name not in before or not torch.equal(t, before[name]) for name, t in after.items())
        if not num_nonzero or not num_changed:
            raise StageError(f"training left an adapter that changes nothing: {num_nonzero} matrices are not zero")
        return {"num_tensors": len(after), "num_changed_tensors": num_changed, "num_nonzero_lora_b": num_nonzero}
    origin = model if start is None else model.model_copy(update={"path": str(start), "revision": None})
    reached = model.model_copy(update={"path": str(saved), "revision": None})
    dtype = torch.bfloat16 if model.dtype == "bfloat16" else torch.float32
    before = load_model(origin, dtype=dtype).state_dict()
    after = load_model(reached, dtype=dtype).state_dict()
    if before.keys() != after.keys():
        raise StageError(
            f"the saved model has other tensors than its start: {sorted(before.keys() ^ after.keys())[:4]}"
        )
    num_changed = sum(not torch.equal(tensor, before[name]) for name, tensor in after.items())
    if not num_changed:
        raise StageError("training left the model as it was: not one tensor changed")
    return {"num_tensors": len(after), "num_changed_tensors": num_changed}
