"""Checkpoints of real model families, tiny and with random weights, laid out as on the Hugging Face Hub.

Their processors are written as JSON, not saved by their classes: so those that need torchvision can be
written without it, and the files look like those of released checkpoints.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HIDDEN_SIZE = 32
NUM_LAYERS = 2
NUM_HEADS = 4
TILE_SIDE_PX = 32
PATCH_SIDE_PX = 8
QWEN_PATCH_SIDE_PX = 14
QWEN_TOKEN_AREA_PX = (2 * QWEN_PATCH_SIDE_PX) ** 2  # patches are merged two by two
MAX_LENGTH_TOKENS = 2048

_SIZES = {"hidden_size": HIDDEN_SIZE, "intermediate_size": 2 * HIDDEN_SIZE, "num_hidden_layers": NUM_LAYERS}
_PATCHES = {"num_attention_heads": NUM_HEADS, "image_size": TILE_SIDE_PX, "patch_size": PATCH_SIDE_PX}
_CLIP_MEAN, _CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_TILINGS = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
_GRID = [[rows * TILE_SIDE_PX, columns * TILE_SIDE_PX] for rows, columns in _TILINGS]

# As in the released checkpoints, only Qwen's template accepts a content that is a string, and LLaVA's never
# writes the end of a sequence.
_PARTS = (
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + SUFFIX }}{% endfor %}"
)
LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}PARTS"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
).replace("PARTS", _PARTS.replace("SUFFIX", "' '"))
LLAVA_NEXT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}PARTS{{ ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
).replace("PARTS", _PARTS.replace("SUFFIX", "''"))
IDEFICS3_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% elif part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(family: str, directory: Path) -> Path:
    """Write the family's checkpoint into ``directory`` and return that path.

    Raises:
        ValueError: if the family is none of :data:`FAMILIES`.
    """
    if family not in _BUILDERS:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    directory.mkdir(parents=True, exist_ok=True)
    _BUILDERS[family](directory)
    return directory


def _build_clip(
    directory: Path, *, name: str, text_type: str, template: str, grid: Sequence[Sequence[int]] | None = None
) -> None:
    """LLaVA and LLaVA-NeXT: a CLIP tower, a projector, and a language model whose texts begin with <s>."""
    first, last = ["<unk>", "<s>", "</s>"], ["<image>", "<pad>"]
    tokenizer = _make_tokenizer(first, last, eos="</s>", pad="<pad>", bos="<s>")
    config = getattr(transformers, f"{name}Config")(
        vision_config={"model_type": "clip_vision_model", **_SIZES, **_PATCHES, "projection_dim": HIDDEN_SIZE},
        text_config={"model_type": text_type, **_text_settings(tokenizer)},
        image_token_index=tokenizer.get_vocab()["<image>"],
        image_seq_length=(TILE_SIDE_PX // PATCH_SIDE_PX) ** 2,
        **({"image_grid_pinpoints": grid} if grid else {}),
    )
    preprocessor = {
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
        "resample": 3,
        "size": {"shortest_edge": TILE_SIDE_PX},
        "crop_size": {"height": TILE_SIDE_PX, "width": TILE_SIDE_PX},
        "image_processor_type": "CLIPImageProcessor" if name == "Llava" else f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        **({"image_grid_pinpoints": grid, "do_pad": True} if grid else {}),
    }
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": PATCH_SIDE_PX,
        "processor_class": f"{name}Processor",
        "vision_feature_select_strategy": "default",
    }
    files = {"preprocessor_config": preprocessor, "processor_config": processor}
    files["chat_template"] = {"chat_template": template}
    _write(directory, name, config, tokenizer, files)


def _build_tiled(directory: Path, *, name: str, more_preprocessing: Mapping[str, Any]) -> None:
    """Idefics3 and SmolVLM: pictures are cut into up to 2 x 2 tiles of four tokens, and shown whole."""
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *places]
    first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _make_tokenizer(first, marks, eos="<end_of_utterance>", pad="<|im_end|>")
    config = getattr(transformers, f"{name}Config")(
        vision_config={**_SIZES, **_PATCHES},
        text_config={"model_type": "llama", **_text_settings(tokenizer)},
        image_token_id=tokenizer.get_vocab()["<image>"],
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
    )
    preprocessor = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": 1,
        "do_image_splitting": True,
        "do_pad": True,
        "size": {"longest_edge": 2 * TILE_SIDE_PX},
        "max_image_size": {"longest_edge": TILE_SIDE_PX},
        "image_processor_type": f"{name}ImageProcessor",
        "processor_class": f"{name}Processor",
        **more_preprocessing,
    }
    num_tokens = (TILE_SIDE_PX // PATCH_SIDE_PX // 2) ** 2
    processor = {"image_seq_len": num_tokens, "processor_class": f"{name}Processor"}
    files = {"preprocessor_config": preprocessor, "processor_config": processor}
    files["chat_template"] = {"chat_template": IDEFICS3_TEMPLATE}
    _write(directory, name, config, tokenizer, files)


def _build_qwen(directory: Path, *, name: str, vision: Mapping[str, Any]) -> None:
    """Qwen2-VL and Qwen2.5-VL: 4 to 16 tokens per picture, as many as its size asks for."""
    vision_marks = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *vision_marks]
    tokenizer = _make_tokenizer([], marks, eos="<|im_end|>", pad="<|endoftext|>")
    vocabulary = tokenizer.get_vocab()
    rotary = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}
    config = getattr(transformers, f"{name}Config")(
        vision_config={"depth": NUM_LAYERS, "num_heads": 2, "patch_size": QWEN_PATCH_SIDE_PX, **vision},
        text_config={**_text_settings(tokenizer), "rope_parameters": rotary},
        image_token_id=vocabulary["<|image_pad|>"],
        video_token_id=vocabulary["<|video_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"],
    )
    preprocessor = {
        "image_mean": _CLIP_MEAN,
        "image_std": _CLIP_STD,
        "min_pixels": 4 * QWEN_TOKEN_AREA_PX,
        "max_pixels": 16 * QWEN_TOKEN_AREA_PX,
        "patch_size": QWEN_PATCH_SIDE_PX,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": f"{name}Processor",
    }
    files = {"preprocessor_config": preprocessor, "chat_template": {"chat_template": QWEN_TEMPLATE}}
    _write(directory, name, config, tokenizer, files)


def _make_tokenizer(
    first: list[str], last: list[str], *, eos: str, pad: str, bos: str | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level, with special tokens at both ends of the vocabulary; ``bos`` begins every text."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=first, show_progress=False)
    core.train_from_iterator(["Describe the image in detail, step by step. What is in it?"] * 4, trainer)
    core.add_special_tokens(last)
    if bos is not None:
        bos_token = (bos, core.token_to_id(bos))
        core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[bos_token])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, pad_token=pad)


def _text_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    sizes = {**_SIZES, "num_attention_heads": NUM_HEADS, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    return {**sizes, "max_position_embeddings": MAX_LENGTH_TOKENS, **_special_token_ids(tokenizer)}


def _special_token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _write(
    directory: Path,
    name: str,
    config: transformers.PreTrainedConfig,
    tokenizer: PreTrainedTokenizerFast,
    json_files: Mapping[str, Mapping[str, Any]],
) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        _spread_weights(model)
    model.generation_config = transformers.GenerationConfig(**_special_token_ids(tokenizer))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    for stem, content in json_files.items():
        (directory / f"{stem}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def _spread_weights(model: transformers.PreTrainedModel) -> None:
    """Weights large enough for answers to depend on what is asked and shown."""
    for name, weight in model.named_parameters():
        if weight.ndim >= 2:
            gain = 4.0 if "lm_head" in name else 2.0
            weight.normal_(std=1.0 if "embed_tokens" in name else gain / math.sqrt(weight[0].numel()))


_QWEN2_VISION = {"embed_dim": HIDDEN_SIZE, "hidden_size": HIDDEN_SIZE, "mlp_ratio": 2}
_QWEN2_5_SIZES = {
    "hidden_size": HIDDEN_SIZE,
    "out_hidden_size": HIDDEN_SIZE,
    "intermediate_size": 2 * HIDDEN_SIZE,
}
_QWEN2_5_VISION = {**_QWEN2_5_SIZES, "fullatt_block_indexes": [NUM_LAYERS - 1]}
_SMOLVLM_VIDEO = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": TILE_SIDE_PX}}
_BUILDERS: dict[str, Callable[[Path], None]] = {
    "llava": partial(_build_clip, name="Llava", text_type="llama", template=LLAVA_TEMPLATE),
    "llava_next": partial(_build_clip, name="LlavaNext", text_type="mistral", template=LLAVA_NEXT_TEMPLATE, grid=_GRID),
    "idefics3": partial(_build_tiled, name="Idefics3", more_preprocessing={}),
    "qwen2_vl": partial(_build_qwen, name="Qwen2VL", vision=_QWEN2_VISION),
    "qwen2_5_vl": partial(_build_qwen, name="Qwen2_5_VL", vision=_QWEN2_5_VISION),
    "smolvlm": partial(_build_tiled, name="SmolVLM", more_preprocessing={"video_sampling": _SMOLVLM_VIDEO}),
}
FAMILIES: tuple[str, ...] = tuple(_BUILDERS)
