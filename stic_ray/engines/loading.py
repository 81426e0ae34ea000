"""Loading models and processors through transformers and PEFT, with errors that say what to do."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import ModelError, one_line
from stic_ray.core.training import Part
from stic_ray.engines.adapters import PART_NAMES, check_adapter_active, check_adapter_files, merge_adapter
from stic_ray.engines.hub import explained, hub_arguments
from stic_ray.engines.rendering import render

logger = logging.getLogger(__name__)


def load_processor(model: ModelConfig) -> ProcessorMixin:
    """Load the processor, ready for batches: left padding, a pad token, a chat template that opens with BOS.

    Its texts are to be tokenised with `add_special_tokens=False`: where the tokenizer would put a BOS token in
    front, the chat template does it here, so that generation and training see the same tokens. Raises ModelError.
    """
    name = f"model.path='{model.path}'"
    with explained(model, f"The processor of {name}"):
        processor: Any = AutoProcessor.from_pretrained(model.path, **hub_arguments(model))
    if not isinstance(processor, ProcessorMixin):
        raise ModelError(f"{name} has a tokenizer but no image processor (preprocessor_config.json).")
    tokenizer = processor.tokenizer
    if tokenizer.eos_token is None:
        raise ModelError(f"{name}: its tokenizer_config.json has no eos_token, which ends an answer.")
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.pad_token or tokenizer.eos_token
    template = model.chat_template or processor.chat_template or tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if not template:
        raise ModelError(f"{name} has no chat template; give one with model.chat_template=FILE.")
    processor.chat_template = template
    if _needs_bos(processor):
        processor.chat_template = "{{ bos_token }}" + template
    tokenizer.chat_template = processor.chat_template
    _complete(processor, model)
    return processor


def _complete(processor: Any, model: ModelConfig) -> None:
    """Take what the processors of older LLaVA checkpoints lack from the model, as transformers' conversion does.

    Since transformers 4.46 a processor counts the tokens of an image itself (github.com/huggingface/transformers,
    pull requests 30962 and 33424). Raises ModelError where processor and model disagree.
    """
    if not hasattr(processor, "num_additional_image_tokens"):
        return
    config = read_config(model)
    vision = config.vision_config
    expected = {
        "patch_size": getattr(vision, "patch_size", None),
        "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", None),
    }
    for field, value in expected.items():
        own = getattr(processor, field)
        if own is None:
            setattr(processor, field, value)
        elif value not in (None, own):
            raise ModelError(
                f"model.path='{model.path}': processor_config.json has {field}={own!r}, and config.json {value!r}."
            )
    if vision.model_type == "clip_vision_model":
        processor.num_additional_image_tokens = 1  # its class token


def load_model(
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    trainable: bool = False,
    merge: bool = False,
    device: torch.device | None = None,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel | PeftModel:
    """Load the weights (safetensors only) to `device`, with the model's adapter, a local folder, on top.

    The adapter is checked to be active and equal to its file. It is applied, not merged, unless `merge` asks for it:
    each layer is merged in float32 and only then rounded to `dtype`, in which small updates may vanish. Raises
    ModelError, and Failed where the Hub cannot be reached.
    """
    adapter = Path(model.adapter) if model.adapter else None
    merge = merge and adapter is not None
    read_as = dtype
    if merge:
        config = read_config(model)
        if (config.dtype or config.get_text_config().dtype) != dtype:
            read_as = torch.float32  # rounded once, behind the merge
    base = load_base(model, dtype=read_as, device=device, quantization=quantization)
    if adapter is None:
        return base
    check_adapter_files(adapter)
    with explained(model, f"The adapter '{adapter}' on model.path='{model.path}'"):
        adapted = PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable, autocast_adapter_dtype=merge)
    check_adapter_active(adapted, adapter)
    return merge_adapter(adapted, dtype) if merge else adapted


def load_base(
    model: ModelConfig,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """Load the weights of `model.path` to `device`; on `meta` names and shapes alone. Raises as `load_model`."""
    place = {"device_map": {"": device}} if device is not None and device.type != "cpu" else {}
    with explained(model), _quiet():
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            model.path,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            quantization_config=quantization,
            **place,
            **hub_arguments(model),
        )
    base, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(f"model.path='{model.path}' lacks {len(missing)} of its weights, '{missing[0]}' for one.")
    if mismatched := sorted(report["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise ModelError(
            f"model.path='{model.path}': '{name}' has the shape {list(stored)}, and by config.json {list(expected)}."
        )
    make_savable(base)
    return base


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bar and table of weights that do not fit from the console: we name the first."""
    level, has_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if has_bar:
            transformers_logging.enable_progress_bar()


def read_config(model: ModelConfig) -> Any:
    """Return the configuration of a model. Raises ModelError, and Failed where the Hub cannot be reached."""
    with explained(model):
        return AutoConfig.from_pretrained(model.path, **hub_arguments(model))


def make_savable(model: PreTrainedModel) -> None:
    """Drop the settings of generation that transformers reads but refuses to save, as a temperature without sampling.

    They would end a full fine-tuning at its first checkpoint. What ends an answer is kept; sampling is ours.
    """
    for name in model.config._get_generation_parameters():
        setattr(model.config, name, None)
    settings = model.generation_config
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError as error:
        kept = {name: getattr(settings, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**kept)
        logger.info(
            "generation_config.json of '%s' cannot be saved as it is, and checkpoints get its special tokens alone: %s",
            model.name_or_path,
            one_line(error),
        )


def read_generation_config(model: ModelConfig) -> GenerationConfig:
    """Return what the checkpoint asks of generation. Raises ModelError for a file that is none."""
    name = "generation_config.json"
    with explained(model, f"{name} of model.path='{model.path}'"), _quiet():
        if cached_file(model.path, name, revision=model.revision, _raise_exceptions_for_missing_entries=False):
            return GenerationConfig.from_pretrained(model.path, revision=model.revision or "main")
    return GenerationConfig.from_model_config(read_config(model))


def make_skeleton(model: ModelConfig) -> PreTrainedModel:
    """Return the model without its weights. Raises ModelError."""
    config = read_config(model)
    with explained(model), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=model.trust_remote_code)


def parts_of(model: nn.Module) -> dict[Part, list[str]]:
    """Return the name prefixes of vision tower, projector and language model in a model's parameter names.

    Raises ModelError when there is no language model to be found.
    """
    parts: dict[Part, list[str]] = {part: [] for part in PART_NAMES}
    for name, _ in [*model.named_modules(), *model.named_parameters()]:
        for part, known in PART_NAMES.items():
            outermost = not any(name.startswith(f"{prefix}.") for found in parts.values() for prefix in found)
            if name.rsplit(".", 1)[-1] in known and outermost and name not in parts[part]:
                parts[part].append(name)
    if not parts["language_model"]:
        raise ModelError(f"{type(model).__name__} has no part called language_model or text_model.")
    return parts


def choose_dtype(model: ModelConfig, *, on_gpu: bool) -> torch.dtype:
    """Return the number format of weights and activations."""
    if model.dtype == "auto":
        return torch.bfloat16 if on_gpu else torch.float32
    return getattr(torch, model.dtype)


def _needs_bos(processor: ProcessorMixin) -> bool:
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("x")["input_ids"][:1] != [bos]:
        return False
    asked = [{"role": "user", "content": "x"}]
    text = render(processor, asked, with_image=False, add_generation_prompt=False)
    return not text.startswith(tokenizer.bos_token)
