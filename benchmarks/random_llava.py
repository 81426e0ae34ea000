"""A LLaVA with random weights, for what costs the same whatever the weights are."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from stic_ray.core.config import ModelConfig
from stic_ray.engines.loading import load_processor
from stic_ray.toyworld import WEIGHTS

_PROCESSOR: Any = {
    "patch_size": 14,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
    "chat_template": (WEIGHTS / "chat_template.jinja").read_text(encoding="utf-8"),
}
SIDES_PX = {"small": 224, "7b": 672}
"""Sizes of model, and the side of the pictures that belong to each: 7b cuts them into tiles."""


def save_random_llava(size: str, folder: Path, *, on_gpu: bool) -> None:
    """Save a LLaVA with random weights and the toy world's tokenizer: 7b is LLaVA-1.6's, small has 256 image tokens."""
    tokenizer = load_processor(ModelConfig(path=str(WEIGHTS))).tokenizer
    torch.set_default_dtype(torch.bfloat16 if on_gpu else torch.float32)
    with torch.device("cuda" if on_gpu else "cpu"):
        model, processor = (_llava_next_7b if size == "7b" else _small_llava)(tokenizer)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _llava_next_7b(tokenizer: Any) -> tuple[Any, Any]:
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = MistralConfig(vocab_size=32064, sliding_window=None, max_position_embeddings=32768, **_ends(tokenizer))
    settings = LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=_image_token(tokenizer))
    images = LlavaNextImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    return LlavaNextForConditionalGeneration(settings), LlavaNextProcessor(images, tokenizer, **_PROCESSOR)


def _small_llava(tokenizer: Any) -> tuple[Any, Any]:
    shape: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
    }
    vision = CLIPVisionConfig(image_size=224, patch_size=14, projection_dim=256, **shape)
    text = LlamaConfig(vocab_size=len(tokenizer), **shape, **_ends(tokenizer))
    settings = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=_image_token(tokenizer), image_seq_length=256
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    return LlavaForConditionalGeneration(settings), LlavaProcessor(images, tokenizer, **_PROCESSOR)


def _image_token(tokenizer: Any) -> int:
    return tokenizer.convert_tokens_to_ids("<image>")


def _ends(tokenizer: Any) -> dict[str, Any]:
    return {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
