"""Loading models and processors through transformers and PEFT, with errors that say what to do."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)

from stic_ray.core.config import ModelConfig, Part
from stic_ray.core.errors import ModelError
from stic_ray.core.rundir import digest
from stic_ray.engines.rendering import split_answers

_PART_NAMES: dict[Part, tuple[str, ...]] = {
    "vision_tower": ("vision_tower", "vision_model", "visual"),
    "projector": ("multi_modal_projector", "connector", "image_newline"),
    "language_model": ("language_model", "text_model"),
}
_LOADING_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    ImportError,
    AttributeError,
    TypeError,
    RuntimeError,
    SafetensorError,
)


def check_model(model: ModelConfig) -> None:
    """Raise ModelError when `model` cannot be loaded here; reads configuration and processor, no weights."""
    local = model.path.startswith((".", "/", "~")) or model.path.count("/") > 1  # a hub id is "name" or "owner/name"
    if local and not Path(model.path).is_dir():
        raise ModelError(f"model.path='{model.path}' is no directory.")
    with _explained(model):
        config = AutoConfig.from_pretrained(model.path, **_hub_arguments(model))
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not model.trust_remote_code:
        raise ModelError(
            f"model.path='{model.path}' is a {config.model_type} model, which takes no images with text. "
            "Use a model that AutoModelForImageTextToText loads, such as LLaVA, LLaVA-NeXT or Idefics3."
        )
    if Path(model.path).is_dir() and not any(Path(model.path).glob("*.safetensors")):
        raise ModelError(f"model.path='{model.path}' holds no .safetensors weights, the only kind that is read.")
    check_template(load_processor(model))


def check_template(processor: ProcessorMixin) -> None:
    """Raise ModelError when the chat template drops the image, or does not let answers be told from questions."""
    turns = ("Question?", "Answer.", "More?", "Yes.")
    conversation = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    pieces = split_answers(processor, conversation, with_image=True)
    if getattr(processor, "image_token", "") not in pieces[0][0]:
        raise ModelError("The chat template shows no image; give another with model.chat_template=FILE.")


def load_processor(model: ModelConfig) -> ProcessorMixin:
    """Load the processor, ready for batches: left padding, a pad token, a chat template that opens with BOS.

    Its texts are to be tokenised with `add_special_tokens=False`: where the tokenizer would put a BOS token in
    front, the chat template does it here, so that generation and training see the same tokens.
    """
    with _explained(model):
        processor: Any = AutoProcessor.from_pretrained(model.path, **_hub_arguments(model))
    if not isinstance(processor, ProcessorMixin):
        raise ModelError(f"model.path='{model.path}' has a tokenizer but no image processor.")
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.chat_template is not None:
        processor.chat_template = model.chat_template
    if not processor.chat_template:
        processor.chat_template = tokenizer.chat_template
    if not processor.chat_template:
        raise ModelError(f"model.path='{model.path}' has no chat template; give one with model.chat_template=FILE.")
    if _lacks_bos(processor):
        processor.chat_template = "{{ bos_token }}" + str(processor.chat_template)
    tokenizer.chat_template = processor.chat_template
    return processor


def load_model(
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    adapter: Path | None = None,
    trainable: bool = False,
    merge: bool = False,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel | PeftModel:
    """Load the weights (safetensors only), with an adapter on top when one is given; on the CPU unless quantised.

    The adapter is checked to be active and equal to its file. It is applied, not merged, unless `merge` asks for it:
    that is computed in float32, and only then rounded to `dtype`, in which small updates may vanish. Raises ModelError.
    """
    merge = merge and adapter is not None
    with _explained(model):
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            model.path,
            dtype=torch.float32 if merge else dtype,
            use_safetensors=True,
            output_loading_info=True,
            quantization_config=quantization,
            **_hub_arguments(model),
        )
    base, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"model.path='{model.path}' lacks {len(missing)} of its weights, '{missing[0]}' for one.")
    if adapter is None:
        return base
    with _explained(model, f"The adapter '{adapter}' on model.path='{model.path}'"):
        adapted = PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable, autocast_adapter_dtype=False)
    check_adapter_active(adapted, adapter)
    return cast(Any, adapted).merge_and_unload().to(dtype) if merge else adapted


def check_adapter_active(model: PeftModel, adapter: Path) -> None:
    """Raise ModelError unless every tensor of the adapter's file is loaded, active, and not all are zero."""
    name_of_adapter = str(model.active_adapter)
    loaded = get_peft_model_state_dict(model, adapter_name=name_of_adapter, save_embedding_layers=False)
    num_active = 0
    for key, expected in read_adapter(adapter).items():
        if key not in loaded or not torch.equal(loaded[key].cpu(), expected.to(loaded[key].dtype)):
            raise ModelError(f"The adapter '{adapter}' does not fit its base model: '{key}' was not loaded.")
        num_active += bool(".lora_B." in key and expected.any())
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    inactive = [layer for layer in layers if layer.disable_adapters or name_of_adapter not in layer.active_adapters]
    if not layers or inactive or not num_active:
        raise ModelError(f"The adapter '{adapter}' changes nothing: {num_active} of its matrices are not zero.")


def read_adapter(adapter: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a saved adapter."""
    return load_file(adapter / "adapter_model.safetensors")


def parts_of_adapter(adapter: Path) -> set[Part]:
    """Return the parts of a model that a saved adapter changes."""
    known: dict[str, Part] = {name: part for part, names in _PART_NAMES.items() for name in names}
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        words = [name.split(".") for name in file.offset_keys()]
    found: list[list[Part]] = [[known[name] for name in names if name in known] for names in words]
    return {parts[0] for parts in found if parts}


def is_adapter(checkpoint: Path) -> bool:
    """Whether a checkpoint folder holds a PEFT adapter rather than a full model."""
    return (checkpoint / "adapter_config.json").is_file()


def parts_of(model: nn.Module) -> dict[Part, list[str]]:
    """Return the name prefixes of vision tower, projector and language model in a model's parameter names.

    Raises ModelError when there is no language model to be found.
    """
    parts: dict[Part, list[str]] = {part: [] for part in _PART_NAMES}
    for name, _ in [*model.named_modules(), *model.named_parameters()]:
        for part, known in _PART_NAMES.items():
            outermost = not any(name.startswith(f"{prefix}.") for found in parts.values() for prefix in found)
            if name.rsplit(".", 1)[-1] in known and outermost and name not in parts[part]:
                parts[part].append(name)
    if not parts["language_model"]:
        raise ModelError(f"{type(model).__name__} has no part called language_model or text_model.")
    return parts


def image_token_id(processor: ProcessorMixin) -> int:
    """Return the id of the token that stands for a piece of an image."""
    token_id = getattr(processor, "image_token_id", None)
    if token_id is None:
        raise ModelError(f"{type(processor).__name__} does not say which token stands for an image.")
    return int(token_id)


def choose_dtype(model: ModelConfig, *, on_gpu: bool) -> torch.dtype:
    """Return the number format of weights and activations."""
    if model.dtype == "auto":
        return torch.bfloat16 if on_gpu else torch.float32
    return getattr(torch, model.dtype)


def fingerprint(model: ModelConfig) -> str:
    """Return the revision of a hub id, or a hash of the names, sizes and headers of a directory's weight files."""
    folder = Path(model.path)
    if not folder.is_dir():
        return model.revision or "main"
    parts = []
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            parts.append((file.name, file.stat().st_size, stream.read(65536).hex()))
    return digest(parts)


def _hub_arguments(model: ModelConfig) -> dict[str, Any]:
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


@contextmanager
def _explained(model: ModelConfig, what: str | None = None) -> Iterator[None]:
    """Turn what transformers and PEFT raise while loading into one line."""
    try:
        with warnings.catch_warnings():
            yield
    except _LOADING_ERRORS as error:
        first = " ".join(str(error).split())
        if "torchvision" in first.lower():
            raise ModelError(
                f"model.path='{model.path}' needs torchvision: install the extra stic-ray[torchvision]."
            ) from error
        if what is not None:
            raise ModelError(f"{what} cannot be loaded: {first[:300]}") from error
        where = "" if Path(model.path).is_dir() else " is no directory here, and as a hub id"
        raise ModelError(f"model.path='{model.path}'{where} cannot be loaded: {first[:300]}") from error


def _lacks_bos(processor: ProcessorMixin) -> bool:
    tokenizer = processor.tokenizer
    bos = tokenizer.bos_token_id
    if bos is None or tokenizer("x")["input_ids"][:1] != [bos]:
        return False
    message = {"role": "user", "content": [{"type": "text", "text": "x"}]}
    text = processor.apply_chat_template([message], tokenize=False)
    return not text.startswith(tokenizer.bos_token)
