"""What training saves: tried before the first step, and compared with it at the end; no Ray."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from stic_ray.core.errors import StageError
from stic_ray.core.storage import Location
from stic_ray.stages.training.building import make_dpo_trainer
from stic_ray.stages.training.models import model_of
from stic_ray.stages.training.worker import FirstSave, check_changed, hash_tensors
from tests.stages.builders import pairs_in
from tests.stages.test_training_batches import config_for, write_pairs


@pytest.mark.parametrize("what", ["the settings of generation", "the place of the record"])
def test_what_cannot_be_saved_is_found_before_the_first_step(what: str, tmp_path: Path, tiny_llava: Path) -> None:
    config = config_for(tiny_llava, tuning={"method": "full"})
    trainer: Any = make_dpo_trainer(config, pairs_in(config, write_pairs(tmp_path / "pairs", 4)), tmp_path / "out")
    place = tmp_path / "training"
    if what == "the settings of generation":
        trainer.model.generation_config.temperature = 0.9  # without do_sample
    else:
        place.write_text("a file where a folder should be")
    trainer.add_callback(FirstSave(trainer, tmp_path / "first", Location.of(str(place / "start.json"))))
    with pytest.raises((ValueError, OSError)):
        trainer.train()
    assert trainer.state.global_step == 0 and not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_training_that_changed_nothing_or_saved_other_tensors_is_an_error(tmp_path: Path, tiny_llava: Path) -> None:
    before = hash_tensors(tiny_llava)
    with pytest.raises(StageError, match="left the model as it was"):
        check_changed(tiny_llava, before)
    tensors = load_file(tiny_llava / "model.safetensors")
    name = next(name for name, tensor in tensors.items() if tensor.ndim == 2)
    bits = tensors[name].view(torch.int16 if tensors[name].element_size() == 2 else torch.int32)
    bits[-1, -1] ^= 1  # the last bit of one weight
    save_file(tensors, tmp_path / "model.safetensors")
    assert check_changed(tmp_path, before)["num_changed_tensors"] == 1
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(StageError, match="other tensors than its start"):
        check_changed(tmp_path, before)


def test_an_adapter_of_zeros_is_an_error(tmp_path: Path, tiny_llava: Path) -> None:
    config = config_for(tiny_llava)
    trainer: Any = make_dpo_trainer(config, pairs_in(config, write_pairs(tmp_path / "pairs", 4)), tmp_path / "out")
    trainer.save_model(str(tmp_path / "first"))
    before = hash_tensors(tmp_path / "first")
    with torch.no_grad():
        for name, parameter in model_of(trainer).named_parameters():
            if ".lora_A." in name:
                parameter += 1
    trainer.save_model(str(tmp_path / "final"))
    with pytest.raises(StageError, match="'num_nonzero_lora_b': 0"):
        check_changed(tmp_path / "final", before)
