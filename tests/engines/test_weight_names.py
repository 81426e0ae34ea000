"""Weights get the names that checkpoints on the Hub have, and stay what they are."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from stic_ray.engines.weight_names import has_hub_names, link_with_hub_names, use_hub_names
from tests import tiny_models

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def made_by_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA that began in transformers 5, in two files."""
    folder = tiny_models.build("llava", tmp_path_factory.mktemp("checkpoints") / "llava")
    model = AutoModelForImageTextToText.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = {name: name.replace("model.language_model.", "language_model.model.") for name in weights}
    names = {
        name: new.removeprefix("model.").replace("lm_head.", "language_model.lm_head.") for name, new in names.items()
    }
    files = {new: f"model-0000{1 + ('language' in new)}-of-00002.safetensors" for new in names.values()}
    for file in set(files.values()):
        part = {new: weights[name] for name, new in names.items() if files[new] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_only_the_names_of_the_tower_change(made_by_transformers: Path, tmp_path: Path) -> None:
    before = weights_of(made_by_transformers)
    assert not has_hub_names(made_by_transformers)
    link_with_hub_names(made_by_transformers, tmp_path)
    assert has_hub_names(tmp_path) and not has_hub_names(made_by_transformers), "the original stays"
    after = weights_of(tmp_path)
    assert {name for name in after if name not in before} == {
        name for name in after if name.startswith("vision_tower.vision_model.")
    }
    assert all(
        tensor.equal(after[name.replace("vision_tower.", "vision_tower.vision_model.")])
        for name, tensor in before.items()
    )
    assert json.loads((tmp_path / INDEX).read_text())["weight_map"].keys() == after.keys()
    assert [file.name for file in tmp_path.glob("*.safetensors") if not file.is_symlink()] == [
        "model-00001-of-00002.safetensors"
    ], "the language model is not copied"


def test_transformers_reads_both(made_by_transformers: Path, tmp_path: Path) -> None:
    link_with_hub_names(made_by_transformers, tmp_path)
    models = []
    for folder in (made_by_transformers, tmp_path):
        model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        models.append(model.state_dict())
    assert all(tensor.equal(models[1][name]) for name, tensor in models[0].items())


@pytest.mark.parametrize("family", ["idefics3", "qwen2_vl"])
def test_families_without_such_a_tower_are_left_alone(family: str, tmp_path: Path) -> None:
    folder = tiny_models.build(family, tmp_path / family)
    before = (folder / "model.safetensors").read_bytes()
    assert has_hub_names(folder)
    use_hub_names(folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_the_toy_worlds_model_has_the_names_of_the_hub(tiny_llava: Path) -> None:
    assert has_hub_names(tiny_llava)
    assert any(name.startswith("vision_tower.vision_model.") for name in weights_of(tiny_llava))
