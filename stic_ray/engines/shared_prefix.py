"""All answers to a prompt in one sequence, so that the image and the prompt are encoded once.

    prompt but its last token | last token, chosen answer | last token, rejected answer | ... | padding

Each answer begins with its own copy of the prompt's last token, which predicts the answer's first one. Positions go on
from the prompt for all, and a token sees the prompt and its own answer only, so log-probabilities are those of
separate sequences (tests/engines/test_shared_prefix.py).
"""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig

from stic_ray.engines.sequences import Batch, SequenceBuilder, TokenSequence

PADDING, PROMPT, CHOSEN, REJECTED = range(4)
"""What a position belongs to; further answers count on from REJECTED."""
FAMILIES = ("llava", "llava_next", "idefics3")
"""Model types that are tested to give the log-probabilities of separate sequences."""
_TEXT_MODELS = ("llama", "mistral")
"""Their language models: one position per token, and one causal mask for all layers."""


def is_tested_family(config: PreTrainedConfig) -> bool:
    """Return whether the model of `config` is of a family that is tested to share what is in front of answers."""
    return config.model_type in FAMILIES and config.get_text_config().model_type in _TEXT_MODELS


def reason_against(config: PreTrainedConfig) -> str | None:
    """Return why the model of `config` cannot share prefixes, or None when it can."""
    text = config.get_text_config()
    if not is_tested_family(config):
        return f"{config.model_type} with {text.model_type} is not among the tested families {', '.join(FAMILIES)}"
    if text._attn_implementation != "sdpa":
        return f"its attention is {text._attn_implementation}, which takes no mask of our own; sdpa does"
    return None


def make_batch(
    builder: SequenceBuilder,
    images: Sequence[Image.Image | None],
    rows: Sequence[Sequence[TokenSequence]],
) -> Batch:
    """Return the inputs of B rows: the processor's for the images, and four tensors of shape (B, T).

    `input_ids`, `position_ids`, `segments` (PADDING, PROMPT, and CHOSEN plus the number of the answer), and
    `is_answer`, true where a token is predicted that belongs to an answer. `rows` are the sequences of each row's
    answers, one or more, alike up to their answers.
    """
    asked = [TokenSequence(first.ids[: first.num_asked], [False] * first.num_asked) for first, *_ in rows]
    inputs = builder.batch(asked, images, pad_left=True)
    prompt_ids, prompt_mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    inputs.pop("is_answer")
    last_ids, lengths = prompt_ids[:, -1].tolist(), prompt_mask.sum(1)
    parts = [(prompt_ids[:, :-1], prompt_mask[:, :-1] * PROMPT, (prompt_mask.cumsum(1) - 1).clamp(min=0)[:, :-1])]
    begins, num_columns = [], prompt_ids.shape[1] - 1
    for number in range(max(map(len, rows))):
        answers = [row[number] if number < len(row) else None for row in rows]
        ids = [
            torch.tensor([] if answer is None else [last, *answer.ids[answer.num_asked :]], dtype=torch.long)
            for last, answer in zip(last_ids, answers, strict=True)
        ]
        filled = pad_sequence([torch.full_like(each, CHOSEN + number) for each in ids], batch_first=True)
        padded = pad_sequence(ids, batch_first=True, padding_value=builder.tokenizer.pad_token_id)
        positions = lengths.unsqueeze(1) - 1 + torch.arange(padded.shape[1])
        parts.append((padded, filled, positions))
        begins.append(num_columns)
        num_columns += padded.shape[1]
    input_ids, segments, position_ids = (torch.cat(columns, dim=1) for columns in zip(*parts, strict=True))
    is_answer = segments >= CHOSEN
    is_answer[:, begins] = False
    return {
        **inputs,
        "input_ids": input_ids,
        "position_ids": position_ids,
        "segments": segments,
        "is_answer": is_answer,
    }


def attention_mask(segments: Tensor, positions: Tensor, window: int | None) -> Tensor:
    """Return what each position may see, shape (B, 1, T, T): what is before it in the prompt and in its own answer.

    `window` is the sliding window of the language model, in positions. Padding sees itself: a row that sees nothing
    would be a softmax over nothing.
    """
    length = segments.shape[1]
    query, key = segments.unsqueeze(2), segments.unsqueeze(1)
    seen = (key == PROMPT) | (key == query)
    seen &= torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen &= (key != PADDING) & (query != PADDING)
    if window is not None:
        seen &= positions.unsqueeze(1) > positions.unsqueeze(2) - window
    seen |= torch.eye(length, dtype=torch.bool, device=segments.device)
    return seen.unsqueeze(1)


def model_inputs(batch: Batch, config: PreTrainedConfig) -> dict[str, Tensor]:
    """Return what the forward of the model of `config` takes: the batch with its attention mask."""
    window = getattr(config.get_text_config(), "sliding_window", None)
    seen = attention_mask(batch["segments"], batch["position_ids"], window)
    rest = {name: value for name, value in batch.items() if name not in ("segments", "is_answer")}
    return {**rest, "attention_mask": seen}


def sum_by_answer(logps: Tensor, batch: Batch) -> Tensor:
    """Return the log-probabilities of each row's answers, shape (B, K); 0 where a row has fewer than K.

    `logps` of shape (B, N) are those of the last N tokens.
    """
    columns = slice(-logps.shape[1], None)
    segments, is_answer = batch["segments"][:, columns], batch["is_answer"][:, columns]
    numbers = range(CHOSEN, int(batch["segments"].max()) + 1)
    return torch.stack([(logps * (is_answer & (segments == number))).sum(1) for number in numbers], dim=1)


@torch.inference_mode()
def score(model: Any, batch: Batch) -> Tensor:
    """Return the log-probabilities of each row's answers under a model, in float32, shape (B, K)."""
    num_asked = int((batch["segments"] < CHOSEN).all(0).cumprod(0).sum())
    num_kept = batch["segments"].shape[1] - num_asked  # the others' logits are not needed
    outputs = model(**model_inputs(batch, model.config), use_cache=False, logits_to_keep=num_kept)
    logps = outputs.logits[:, :-1].float().log_softmax(-1)
    tokens = batch["input_ids"][:, num_asked + 1 :]
    return sum_by_answer(logps.gather(2, tokens.unsqueeze(2)).squeeze(2), batch)
