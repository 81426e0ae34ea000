"""What can be known to be wrong with a model before anything is spent; weights are not read."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils.peft_utils import find_adapter_config_file

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import ModelError, type_and_message
from stic_ray.engines.adapters import adapter_of, check_adapter_fits
from stic_ray.engines.fingerprints import SETTINGS
from stic_ray.engines.hub import explained, hub_arguments
from stic_ray.engines.loading import (
    load_base,
    load_processor,
    make_savable,
    make_skeleton,
    read_config,
    read_generation_config,
)
from stic_ray.engines.rendering import split_answers
from stic_ray.engines.sequences import SequenceBuilder
from stic_ray.engines.weight_names import INDEX

_WEIGHTS = "model.safetensors"
_POINTER = b"version https://git-lfs"


def check_model(model: ModelConfig) -> None:
    """Raise ModelError when `model` cannot be loaded, asked, trained or saved here.

    Reads configuration, processor and adapter, and of weights in a directory names and shapes. Raises Failed where the
    Hub cannot be reached.
    """
    folder = Path(model.path)
    local = model.path.startswith((".", "/", "~")) or model.path.count("/") > 1  # a hub id is "name" or "owner/name"
    if local and not folder.is_dir():
        raise ModelError(f"model.path='{model.path}' is no directory.")
    if folder.is_dir():
        _check_files(folder)
    _check_kind(model)
    if folder.is_dir():
        _check_shards(folder)
    config = read_config(model)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not model.trust_remote_code:
        raise ModelError(
            f"model.path='{model.path}' is a {config.model_type} model, which takes no images with text. "
            "Use a model that AutoModelForImageTextToText loads, such as LLaVA, LLaVA-NeXT or Idefics3."
        )
    read_generation_config(model)
    processor = load_processor(model)
    check_template(processor)
    _check_picture(processor, config, model)
    skeleton = load_base(model, device=torch.device("meta")) if folder.is_dir() else make_skeleton(model)
    _check_saving(model, skeleton, processor)
    adapter = adapter_of(model)
    if adapter is not None:
        check_adapter_fits(adapter, skeleton)


def check_template(processor: ProcessorMixin) -> None:
    """Raise ModelError when the chat template drops the image, or answers cannot be separated from questions in it."""
    turns = [("user", "Question?"), ("assistant", "Answer."), ("user", "More?"), ("assistant", "Yes.")]
    conversation = [{"role": role, "content": text} for role, text in turns]
    pieces = split_answers(processor, conversation, with_image=True)
    if getattr(processor, "image_token", "") not in pieces[0][0]:
        raise ModelError("The chat template shows no image; give another with model.chat_template=FILE.")


def _check_kind(model: ModelConfig) -> None:
    """Refuse folders that hold something else than a model of transformers, and say what they hold."""
    with explained(model):
        adapter = find_adapter_config_file(model.path, revision=model.revision)
        settings: Mapping[str, Any] = PreTrainedConfig.get_config_dict(model.path, **hub_arguments(model))[0]
    if adapter is not None:
        base = json.loads(Path(adapter).read_text(encoding="utf-8")).get("base_model_name_or_path") or "its base model"
        raise ModelError(
            f"model.path='{model.path}' is an adapter of '{base}' (it holds adapter_config.json): set "
            f"model.path={base} and model.adapter={model.path}."
        )
    if not settings:
        raise ModelError(f"model.path='{model.path}' is no model: it has no config.json.")
    kind, architectures = str(settings.get("model_type")), settings.get("architectures") or []
    unknown = kind.startswith("llava_") and kind not in CONFIG_MAPPING
    causal = any("Llava" in name and name.endswith("ForCausalLM") for name in architectures)
    if unknown or causal or "mm_vision_tower" in settings:
        raise ModelError(
            f"model.path='{model.path}' is a checkpoint of LLaVA's own code (model_type={kind} in config.json), which "
            "transformers does not read; use the converted one from https://huggingface.co/llava-hf, such as "
            "llava-hf/llava-v1.6-mistral-7b-hf."
        )


def _check_files(folder: Path) -> None:
    """Find files that were not downloaded, or not to their end, of those that are read before the weights."""
    for file in sorted(folder.iterdir()):
        if not file.is_file() or not (SETTINGS.fullmatch(file.name) or file.suffix == ".safetensors"):
            continue
        with file.open("rb") as stream:
            if stream.read(len(_POINTER)) == _POINTER:
                raise ModelError(f"'{file}' is a pointer of git-lfs, its content was not downloaded: run git lfs pull.")
        if file.suffix == ".json":
            _read_json(file)
        if file.name == "tokenizer.json":
            try:
                Tokenizer.from_file(str(file))
            except Exception as error:  # its own type
                raise ModelError(f"'{file}' is no tokenizer: {type_and_message(error)}") from error


def _check_shards(folder: Path) -> None:
    """Compare the index of the weights, and their headers, with the files."""
    held: dict[str, set[str]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as weights:  # compares the header with the file's size
                held[file.name] = set(weights.keys())
        except (SafetensorError, OSError) as error:
            raise ModelError(f"'{file}' is damaged, or not whole: {type_and_message(error)}") from error
    if not held:
        raise ModelError(f"model.path='{folder}' holds no .safetensors weights, the only kind that is read.")
    if _WEIGHTS in held:
        return
    if not (folder / INDEX).is_file():
        raise ModelError(f"model.path='{folder}' has {', '.join(held)}, and neither {_WEIGHTS} nor {INDEX}.")
    named: Any = _read_json(folder / INDEX).get("weight_map") or {}
    for name, file in named.items():
        if name not in held.get(file, ()):
            state = f"lacks the weight '{name}'" if file in held else "is not there"
            raise ModelError(f"'{folder / file}' {state}, and {INDEX} names it: download the checkpoint again.")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"'{file}' is no JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _check_picture(processor: Any, config: Any, model: ModelConfig) -> None:
    """Make a sequence of a question about a blank picture, and of its answer."""
    words = "What is in the picture?"
    with explained(model, f"The tokenizer of model.path='{model.path}'"):
        builder = SequenceBuilder(processor)
        given_back = builder.tokenizer.decode(builder.ask(words, with_image=True).ids)
    if "".join(words.split()) not in "".join(given_back.split()):
        raise ModelError(f"model.path='{model.path}': its tokenizer makes '{given_back}' of '{words}'; is it whole?")
    if builder.image_token_id != getattr(config, "image_token_id", builder.image_token_id):
        raise ModelError(
            f"model.path='{model.path}': an image is token {config.image_token_id} in config.json, and "
            f"{builder.image_token_id} in the processor's files."
        )
    conversation = [{"role": "user", "content": words}, {"role": "assistant", "content": "Nothing."}]
    try:
        sequence = builder.build(conversation, with_image=True)
        batch = builder.batch([sequence], [Image.new("RGB", (64, 64))])
    except Exception as error:  # whatever a processor does without what it lacks
        absent = [name for name, value in vars(processor).items() if value is None]
        raise ModelError(
            f"model.path='{model.path}': its processor fails on a blank picture ({type_and_message(error)})"
            + (f"; processor_config.json lacks {', '.join(absent)}." if absent else ".")
        ) from error
    if not (batch["input_ids"] == builder.image_token_id).any() or not batch["is_answer"].any():
        raise ModelError(f"model.path='{model.path}': its processor makes no tokens of a picture, or of an answer.")


def _check_saving(model: ModelConfig, skeleton: PreTrainedModel, processor: ProcessorMixin) -> None:
    """Save what a checkpoint has beside the weights, as training will."""
    make_savable(skeleton)
    what = f"model.path='{model.path}', its configuration and processor, cannot be saved as training does, and"
    with explained(model, what), tempfile.TemporaryDirectory() as folder:
        skeleton.config.save_pretrained(folder)
        if skeleton.generation_config is not None:
            skeleton.generation_config.save_pretrained(folder)
        processor.save_pretrained(folder)
