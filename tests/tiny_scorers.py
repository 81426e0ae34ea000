"""Checkpoints that compare pictures with texts, or texts with one another: tiny, with random weights."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from tests.tiny_models import _make_tokenizer, _special_token_ids, _spread_weights

MAX_TEXT_TOKENS = 24
_SIDE_PX = 32
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def build_scorer(kind: str, directory: Path) -> Path:
    """Write a checkpoint of kind `clip`, `siglip` or `bert` into `directory` and return that path."""
    directory.mkdir(parents=True, exist_ok=True)
    # CLIP reads a text at its end mark; as id 2 it would be another, which early checkpoints have by mistake.
    tokenizer = _make_tokenizer(["<unk>", "<pad>", "<s>"], ["</s>"], eos="</s>", pad="<pad>", bos="<s>")
    marks = [(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=marks)
    tokens = {**_SIZES, "vocab_size": len(tokenizer), **_special_token_ids(tokenizer)}
    tokens["max_position_embeddings"] = MAX_TEXT_TOKENS
    vision = {**_SIZES, "image_size": _SIDE_PX, "patch_size": 8}
    model: Any
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if kind == "clip":
            model = CLIPModel(CLIPConfig(text_config=tokens, vision_config=vision, projection_dim=16))
        elif kind == "siglip":
            model = SiglipModel(SiglipConfig(text_config={**tokens, "projection_size": 32}, vision_config=vision))
        else:
            model = BertModel(BertConfig(**tokens))
        _spread_weights(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if kind != "bert":
        name = {"clip": "CLIP", "siglip": "Siglip"}[kind]
        side = {"height": _SIDE_PX, "width": _SIDE_PX}
        size = {"size": {"shortest_edge": _SIDE_PX}, "crop_size": side} if kind == "clip" else {"size": side}
        settings = {"image_processor_type": f"{name}ImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        (directory / "preprocessor_config.json").write_text(json.dumps({**settings, **size}))
    return directory
