"""The toy world's model without training: a LLaVA of 1.7 million parameters in the ordinary Hugging Face layout."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from stic_ray.toyworld.scenes import GRID_SIDE, PICTURE_SIDE_PX

PATCH_SIDE_PX = 16  # a cell of the grid: few image tokens make every stage fast
NUM_IMAGE_TOKENS = GRID_SIDE * GRID_SIDE
HIDDEN_SIZE = 128
NUM_LAYERS = 4  # of the vision tower and of the language model, each
NUM_HEADS = 4  # of 32 dimensions, the smallest that common attention kernels accept
VISION_INTERMEDIATE_SIZE = 384
TEXT_INTERMEDIATE_SIZE = 320
MAX_LENGTH_TOKENS = 2048
VOCABULARY_SIZE = 640

PAD, END, IMAGE = "<pad>", "</s>", "<image>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# A request stands before its picture, so that what is looked for is known when the picture is read: with the picture
# first, so small a model did not learn to answer whether a thing is there. Nothing follows the end token of an
# assistant's turn: the last token trained is the one that ends answers.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' -}}
{%- if message['content'] is string -%}
{%- set parts = [{'type': 'text', 'text': message['content']}] -%}
{%- else -%}
{%- set parts = message['content'] -%}
{%- endif -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}
{%- for part in parts if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{{- '</s>' -}}
{%- endgeneration -%}
{%- else -%}
{%- for part in parts if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{{- '\\n' -}}
{%- for part in parts if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"""


def make_tokenizer(sentences: Iterable[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer that pads on the left and adds no token of its own."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[*ROLES, PAD, END, IMAGE],  # padding is not 0, which `pad_token_id or ...` takes for none
        show_progress=False,
    )
    core.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=MAX_LENGTH_TOKENS,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return the processor that belongs to the model; pictures of other sizes are resized and cropped."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": PICTURE_SIDE_PX}, crop_size={"height": PICTURE_SIDE_PX, "width": PICTURE_SIDE_PX}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIDE_PX,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """Return the model with random weights. The global random state of torch is left as it was."""
    vocabulary = tokenizer.get_vocab()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlavaForConditionalGeneration(_configuration(vocabulary))
    model.generation_config = GenerationConfig(eos_token_id=vocabulary[END], pad_token_id=vocabulary[PAD])
    return model


def _configuration(vocabulary: dict[str, int]) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=VISION_INTERMEDIATE_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        image_size=PICTURE_SIDE_PX,
        patch_size=PATCH_SIDE_PX,
        projection_dim=HIDDEN_SIZE,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=TEXT_INTERMEDIATE_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        max_position_embeddings=MAX_LENGTH_TOKENS,
        bos_token_id=None,
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[PAD],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocabulary[IMAGE],
        image_seq_length=NUM_IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
