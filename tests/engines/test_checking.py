"""What is no usable model is refused in one line that names the file, before weights are read."""

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import ModelError
from stic_ray.engines.checking import check_model
from stic_ray.engines.loading import load_processor
from stic_ray.engines.opening import check_engine
from tests import tiny_models
from tests.engines.conftest import Checkpoints
from tests.engines.families import EMBEDDED, NEED_TORCHVISION
from tests.engines.spoiling import (
    BAD_WEIGHTS,
    INDEX,
    WEIGHTS,
    cut_into_shards,
    cut_off,
    drop_json,
    edit_json,
    read_json,
    refusal,
)
from tests.engines.test_adapters import make_adapter, with_weights

TORCHVISION = importlib.util.find_spec("torchvision") is not None


@pytest.mark.parametrize("family", EMBEDDED)
def test_a_good_model_passes(family: str, checkpoint: Checkpoints) -> None:
    check_model(ModelConfig(path=str(checkpoint(family))))


def test_nothing_is_written_while_a_model_is_looked_at(spoiled: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit_json(spoiled, "generation_config.json", temperature=0.9)
    check_model(ModelConfig(path=str(spoiled)))
    BAD_WEIGHTS["a layer missing"](spoiled)
    refusal(check_model, spoiled)
    assert capfd.readouterr() == ("", "")


def test_a_directory_that_is_not_there_is_called_that(tmp_path: Path) -> None:
    """Not told in terms of the hub: the user mistyped a path."""
    message = refusal(check_model, tmp_path / "missing")
    assert "Repo id" not in message
    assert "repo_type" not in message


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_the_extra_that_an_engine_needs_is_named(checkpoint: Checkpoints) -> None:
    with pytest.raises(ModelError, match=r"stic-ray\[vllm\]") as caught:
        check_engine(ModelConfig(path=str(checkpoint("llava")), engine="vllm"))
    assert "\n" not in str(caught.value)


def test_an_empty_directory_is_no_model(tmp_path: Path) -> None:
    assert "config.json" in refusal(check_model, tmp_path)


def write_text_only(directory: Path) -> None:
    shutil.rmtree(directory)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).save_pretrained(directory)


SPOILERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "text only": (write_text_only, "llama"),
    "pickled weights only": (lambda model: (model / WEIGHTS).rename(model / "pytorch_model.bin"), "safetensors"),
    "no chat template": (lambda model: (model / "chat_template.json").unlink(), "model.chat_template"),
    "no configuration": (lambda model: (model / "config.json").unlink(), ""),
    "broken configuration": (lambda model: (model / "config.json").write_text("{", encoding="utf-8"), "config.json"),
    "unknown type": (lambda model: edit_json(model, "config.json", model_type="lava"), "lava"),
    "no tokenizer": (lambda model: [file.unlink() for file in model.glob("tokenizer*")], ""),
    "no image processor": (
        lambda model: [(model / f"{name}_config.json").unlink() for name in ("preprocessor", "processor")],
        "",
    ),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_a_directory_that_is_no_usable_model_is_refused(name: str, spoiled: Path) -> None:
    spoil, told = SPOILERS[name]
    spoil(spoiled)
    assert told in refusal(check_model, spoiled)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in %}",
        "{{ raise_exception('alternate') }}",
        "{% for m in messages %}<image>{{ m.content[-1].text | upper }}{% endfor %}",
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(template: str, spoiled: Path) -> None:
    edit_json(spoiled, "chat_template.json", chat_template=template)
    with pytest.raises(ModelError, match="^The chat template .*"):
        check_model(ModelConfig(path=str(spoiled)))


def test_a_missing_chat_template_can_be_given(spoiled: Path) -> None:
    (spoiled / "chat_template.json").unlink()
    model = ModelConfig(path=str(spoiled), chat_template=tiny_models.LLAVA_TEMPLATE)
    check_model(model)
    question = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    assert load_processor(model).apply_chat_template([question], tokenize=False) == "<s>USER: Hi "


@pytest.mark.skipif(TORCHVISION, reason="torchvision is installed")
@pytest.mark.parametrize("family", NEED_TORCHVISION)
def test_a_family_that_needs_torchvision_names_the_extra(family: str, checkpoint: Checkpoints) -> None:
    assert "stic-ray[torchvision]" in refusal(check_model, checkpoint(family))


def lose_a_shard(model: Path) -> None:
    cut_into_shards(model)
    (model / "model-00002-of-00002.safetensors").unlink()


def shorten_a_shard(model: Path) -> None:
    cut_into_shards(model)
    shard = model / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])


def point_at_a_weight_that_is_elsewhere(model: Path) -> None:
    cut_into_shards(model)
    index = read_json(model, INDEX)
    edit_json(model, INDEX, weight_map={name: "model-00001-of-00002.safetensors" for name in index["weight_map"]})


def lose_the_index(model: Path) -> None:
    cut_into_shards(model)
    (model / INDEX).unlink()


def use_the_tokenizer_of_another_model(model: Path) -> None:
    content = read_json(model, "tokenizer.json")
    words = {word: number for number, word in enumerate(("<unk>", "<image>", "<s>", "</s>", "<pad>", "cat"))}
    content["model"] = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    content["added_tokens"] = [token | {"id": words[token["content"]]} for token in content["added_tokens"]]
    (model / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


LACKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard": (lose_a_shard, "model-00002-of-00002.safetensors' is not there"),
    "the end of a shard": (shorten_a_shard, "model-00002-of-00002.safetensors' is damaged"),
    "the end of its weights": (cut_off, "model.safetensors' is damaged"),
    "a weight of its index": (point_at_a_weight_that_is_elsewhere, "lacks the weight"),
    "its index": (lose_the_index, INDEX),
    "an index that can be read": (lambda model: (lose_a_shard(model), (model / INDEX).write_text("{")), INDEX),
    "a tokenizer that was downloaded": (
        lambda model: (model / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1"),
        "tokenizer.json",
    ),
    "a tokenizer that can be read": (
        lambda model: edit_json(model, "tokenizer.json", model={"type": "BPE", "vocab": 5}),
        "tokenizer",
    ),
    "a whole tokenizer": (lambda model: (model / "tokenizer.json").write_text('{"version": "1.0",'), "tokenizer.json"),
    "its own tokenizer": (use_the_tokenizer_of_another_model, "token"),
    "an end of answers": (lambda model: drop_json(model, "tokenizer_config.json", "eos_token"), "eos_token"),
    "a generation_config.json in UTF-8": (
        lambda model: (model / "generation_config.json").write_bytes(b"\xff\xfe{\x00}\x00"),
        "generation_config.json",
    ),
    "a generation_config.json that transformers takes": (
        lambda model: edit_json(model, "generation_config.json", max_new_tokens=-1),
        "generation_config.json",
    ),
    "an image token": (lambda model: edit_json(model, "config.json", image_token_index=7), "token 7 in config.json"),
    "patches of its tower": (lambda model: edit_json(model, "processor_config.json", patch_size=16), "patch_size=16"),
    "a size of pictures": (
        lambda model: edit_json(model, "preprocessor_config.json", size={"width": 0}),
        "",
    ),
}


@pytest.mark.parametrize("name", LACKS)
def test_what_a_checkpoint_lacks_is_named_with_its_file(name: str, spoiled: Path) -> None:
    spoil, found = LACKS[name]
    spoil(spoiled)
    assert found in refusal(check_model, spoiled)


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_weights_that_are_not_the_models_are_found_before_they_are_read(name: str, spoiled: Path) -> None:
    BAD_WEIGHTS[name](spoiled)
    refusal(check_model, spoiled)


def test_shards_that_are_whole_pass(spoiled: Path) -> None:
    cut_into_shards(spoiled)
    check_model(ModelConfig(path=str(spoiled)))


def test_a_generation_config_that_would_end_training_passes_as_it_is_mended(spoiled: Path) -> None:
    edit_json(spoiled, "generation_config.json", temperature=0.9, top_p=0.6)
    edit_json(spoiled, "config.json", no_repeat_ngram_size=3)
    check_model(ModelConfig(path=str(spoiled)))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "llava_mistral"},
        {"model_type": "llava_llama", "architectures": ["LlavaLlamaForCausalLM"]},
        {"model_type": "llava_qwen"},
        {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]},
        {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
    ],
    ids=str,
)
def test_a_checkpoint_of_llavas_own_code_is_called_that(changes: dict[str, Any], spoiled: Path) -> None:
    edit_json(spoiled, "config.json", **changes)
    message = refusal(check_model, spoiled)
    assert "llava-hf" in message and "upgrade" not in message


@pytest.fixture(scope="session")
def adapter(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(checkpoint("llava"), tmp_path_factory.mktemp("adapters") / "llava")


def test_an_adapter_is_no_model_but_one_of_its_base(adapter: Path, checkpoint: Checkpoints) -> None:
    message = refusal(check_model, adapter)
    assert f"model.path={checkpoint('llava')}" in message
    assert f"model.adapter={adapter}" in message


def check_adapter(base: Path, adapter: Path) -> None:
    check_model(ModelConfig(path=str(base), adapter=str(adapter)))


def test_an_adapter_of_this_model_passes(adapter: Path, checkpoint: Checkpoints) -> None:
    check_adapter(checkpoint("llava"), adapter)


@pytest.mark.parametrize("other", ["idefics3", "toyworld"])
def test_an_adapter_of_another_model_is_refused(other: str, adapter: Path, checkpoint: Checkpoints) -> None:
    with pytest.raises(ModelError, match="does not fit|cannot be loaded"):
        check_adapter(checkpoint(other), adapter)


def test_an_adapter_that_changes_nothing_is_refused(adapter: Path, checkpoint: Checkpoints, tmp_path: Path) -> None:
    zeros = with_weights(adapter, tmp_path / "zeros", lambda name, weight: weight * 0)
    with pytest.raises(ModelError, match="changes nothing"):
        check_adapter(checkpoint("llava"), zeros)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_is_no_adapter_is_refused(
    name: str, adapter: Path, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    (copy / name).write_text("{")
    with pytest.raises(ModelError, match="cannot be loaded"):
        check_adapter(checkpoint("llava"), copy)
    (copy / name).unlink()
    with pytest.raises(ModelError, match=name):
        check_adapter(checkpoint("llava"), copy)
    with pytest.raises(ModelError, match="is no folder"):
        check_adapter(checkpoint("llava"), tmp_path / "nowhere")


def test_remote_code_needs_a_revision() -> None:
    with pytest.raises(ModelError, match=r"model\.revision"):
        check_model(ModelConfig(path="owner/name", trust_remote_code=True))
