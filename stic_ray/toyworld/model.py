"""A tiny LLaVA with random weights, made in seconds, in the ordinary Hugging Face layout.

It knows nothing, but it behaves like a model: its answers are words of the toy world in a plausible order,
depend on the picture and on the prompt, and end by themselves sooner or later. The usual initialisation gives
one repeated token whatever the input, which would leave nothing to prefer.
"""

import math
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
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

from stic_ray.toyworld.language import describe, sample_sentences
from stic_ray.toyworld.scenes import sample_scene

IMAGE_SIDE_PX = 48
PATCH_SIDE_PX = 8
HIDDEN_SIZE = 64
NUM_LAYERS = 2  # of the vision tower and of the language model, each
NUM_HEADS = 4
MAX_LENGTH_TOKENS = 2048
VOCABULARY_SIZE = 600

PAD, END, IMAGE = "<pad>", "</s>", "<image>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")

# Nothing follows the end token of an assistant's turn: the last token trained is the one that ends answers.
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
{%- for part in parts if part['type'] == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for part in parts if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}
{{- '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"""

_CORPUS_SEED = 0
_NUM_CORPUS_SCENES = 300

# How much layers amplify (one keeps the size of the input). Sharp attention makes an answer hang on single
# patches and words; small feed-forward layers leave the last word visible to the output layer.
_QUERY_KEY_GAIN = 3.0
_VALUE_OUTPUT_GAIN = 0.8
_FEED_FORWARD_GAIN = 0.3
_FLATNESS_REMOVED = 0.8  # share of a patch filter's mean taken away: edges count, which blurring destroys

# How the next word is scored: votes of the last word, against chance from everything else.
_VOTE_SCALE = 3.5
_SPOKEN_CHANCE_SCALE = 3.0
_UNSPOKEN_CHANCE_SCALE = 1.0
_RARE_SHARE = 0.003  # a successor this rare scores log(2) = 0.7, the only successor 5.8
_END_SCORE_FACTOR = 1.3  # about half of the answers end within 24 tokens
_REPETITION_SCORE = -4.0


def build_tiny_llava(directory: Path, seed: int) -> None:
    """Write a LLaVA of about 0.3M random parameters, its tokenizer and its processor into ``directory``.

    The same seed gives the same files, byte for byte. The global random state of torch is left as it was.
    """
    tokenizer = _train_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlavaForConditionalGeneration(_model_config(tokenizer.get_vocab()))
        _make_expressive(model, tokenizer)
    vocabulary = tokenizer.get_vocab()
    model.generation_config = GenerationConfig(eos_token_id=vocabulary[END], pad_token_id=vocabulary[PAD])
    model.save_pretrained(directory)
    _processor(tokenizer).save_pretrained(directory)


def _train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that pads on the left and adds no token of its own."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[*ROLES, PAD, END, IMAGE],  # padding is not 0, which `pad_token_id or ...` takes for none
        show_progress=False,
    )
    core.train_from_iterator(sample_sentences(_CORPUS_SEED, 0, _NUM_CORPUS_SCENES), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=MAX_LENGTH_TOKENS,
    )


def _model_config(vocabulary: dict[str, int]) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=HIDDEN_SIZE,
        intermediate_size=2 * HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        image_size=IMAGE_SIDE_PX,
        patch_size=PATCH_SIDE_PX,
        projection_dim=HIDDEN_SIZE,
    )
    text = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=3 * HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        head_dim=32,  # the smallest that common attention kernels accept
        max_position_embeddings=MAX_LENGTH_TOKENS,
        bos_token_id=None,
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[PAD],
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocabulary[IMAGE],
        image_seq_length=(IMAGE_SIDE_PX // PATCH_SIDE_PX) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIDE_PX}, crop_size={"height": IMAGE_SIDE_PX, "width": IMAGE_SIDE_PX}
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIDE_PX,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


@torch.no_grad()
def _make_expressive(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast) -> None:
    """Draw the weights anew, large enough for pictures, prompts and earlier words to decide the next word."""
    weights = dict(model.named_parameters())
    for name, weight in weights.items():
        if weight.ndim >= 2:
            weight.normal_(std=_gain(name) / math.sqrt(weight[0].numel()))
    patches = weights["model.vision_tower.embeddings.patch_embedding.weight"]
    patches.sub_(_FLATNESS_REMOVED * patches.mean(dim=(2, 3), keepdim=True))
    embeddings = weights["model.language_model.embed_tokens.weight"]
    embeddings.normal_(std=1.0)
    weights["lm_head.weight"].copy_(_output_rows(tokenizer, embeddings))


def _gain(parameter_name: str) -> float:
    if "language_model" not in parameter_name:
        return 1.0
    if "q_proj" in parameter_name or "k_proj" in parameter_name:
        return _QUERY_KEY_GAIN
    if "v_proj" in parameter_name or "o_proj" in parameter_name:
        return _VALUE_OUTPUT_GAIN
    return _FEED_FORWARD_GAIN


def _output_rows(tokenizer: PreTrainedTokenizerFast, embeddings: Tensor) -> Tensor:
    """Output weights under which the last word votes for the words that follow it in descriptions.

    The rest of the hidden state (picture, prompt, earlier words) meets random weights and decides among them.
    """
    scores = _successor_scores(tokenizer)
    has_successors = scores.any(dim=1)
    votes = (torch.linalg.pinv(embeddings[has_successors].double()) @ scores[has_successors]).T
    chance_scales = torch.where(scores.any(dim=0), _SPOKEN_CHANCE_SCALE, _UNSPOKEN_CHANCE_SCALE)
    chance_scales[tokenizer.get_vocab()[END]] = 0.0  # or some seeds would end at once, and others never
    chance = torch.randn(embeddings.shape) * chance_scales[:, None] / math.sqrt(HIDDEN_SIZE)
    return _VOTE_SCALE * votes.float() + chance


def _successor_scores(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Scores [previous token, next token] from descriptions; zero for pairs that never occur in them."""
    end = tokenizer.get_vocab()[END]
    counts = torch.zeros(len(tokenizer), len(tokenizer), dtype=torch.float64)
    for index in range(_NUM_CORPUS_SCENES):
        token_ids = tokenizer.encode("\n" + describe(sample_scene(_CORPUS_SEED, index)) + END)
        for previous, following in pairwise(token_ids):
            counts[previous, following] += 1
    scores = torch.log1p(counts / counts.sum(dim=1, keepdim=True).clamp(min=1) / _RARE_SHARE)
    scores[:, end] *= _END_SCORE_FACTOR
    scores.diagonal()[scores.any(dim=1)] = _REPETITION_SCORE
    return scores
