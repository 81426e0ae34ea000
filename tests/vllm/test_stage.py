"""Stages with `model.engine=vllm`, in Ray: from pictures to pairs, over a killed actor, and with what `dpo` left."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from stic_ray.core.config import ModelConfig, RunConfig
from stic_ray.core.errors import ModelError
from stic_ray.core.randomness import seed_for
from stic_ray.core.rundir import RunDir
from stic_ray.engines.base import Request, Sampling
from stic_ray.engines.opening import check_engine, open_engine
from stic_ray.engines.vllm_engine import VllmEngine
from stic_ray.engines.weight_names import has_hub_names
from stic_ray.method.images import decode
from stic_ray.stages.dpo import DPO
from tests import tiny_models
from tests.engines.families import mixed_requests
from tests.stages.builders import draw_pictures, fake_config, pairs_of, rejected_of, run_stages, step_of
from tests.stages.test_training import prepare
from tests.stages.test_training_batches import config_for
from tests.vllm.conftest import ACTORS
from tests.vllm.test_engine import PICTURES

NUM_PICTURES = 32


def config_of(folder: Path, model: Path, pictures: Path) -> RunConfig:
    return fake_config(
        folder,
        pictures,
        model={"engine": "vllm", "path": str(model)},
        preferences={"temperature": 0.7, "max_new_tokens": 24, "allow_truncated": True},
        actors={"num_actors": 1, "batch_size": 4},
    )


def vllm_processes() -> dict[int, int]:
    """Processes of vLLM below this one's Ray, each with the one that started it: an actor."""
    found = {}
    for process in psutil.process_iter(["name", "cmdline", "ppid"]):
        command = " ".join([process.info["name"], *(process.info["cmdline"] or [])])
        if "VLLM::EngineCore" in command:
            found[process.pid] = process.info["ppid"]
    return found


@pytest.mark.timeout(900)  # vLLM starts three times
@pytest.mark.usefixtures("ray_session")
def test_pairs_are_those_of_a_quiet_engine_when_the_actor_is_killed(
    tmp_path: Path, tiny_llava: Path, vllm_engine: VllmEngine
) -> None:
    """And what vLLM had started goes with its actor: on a GPU it would keep the memory."""
    config = config_of(tmp_path, tiny_llava, draw_pictures(tmp_path / "pictures", NUM_PICTURES))
    before = vllm_processes()
    orphans: list[int] = []

    def kill_after_the_first_shard() -> None:
        output = RunDir.of(str(tmp_path / "run")) / "preferences"
        while not output.shards("pairs"):
            time.sleep(0.05)
        [(engine, actor)] = [item for item in vllm_processes().items() if item[0] not in before]
        os.kill(actor, signal.SIGKILL)
        orphans.append(engine)

    killer = threading.Thread(target=kill_after_the_first_shard)
    killer.start()
    run = run_stages(config, tmp_path / "run", "pool", "preferences")
    killer.join()

    assert orphans and not psutil.pid_exists(orphans[0])
    rows = pairs_of(run).to_pylist()
    assert len({row["image_id"] for row in rows}) == len(rows) > NUM_PICTURES // 2
    assert len(rows) + len(rejected_of(run, "preferences")) == NUM_PICTURES
    requests = [
        Request(row["chosen_prompt"], decode(row["image"]["bytes"]), seed_for(config.seed, row["image_id"], "chosen"))
        for row in rows
    ]
    sampling = Sampling(config.preferences.max_new_tokens, config.preferences.temperature)
    quiet = [answer.text for answer in vllm_engine.generate(requests, sampling)]
    assert [row["chosen"][0]["content"] for row in rows] == quiet


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_dpo_saved_loads(method: str, tmp_path: Path, tiny_llava: Path) -> None:
    """It answers as in the transformers engine, and not as the base model."""
    run = prepare(tmp_path / "run", 8)
    config = config_for(tiny_llava, tuning={"method": method}, dpo={"learning_rate": 0.01})
    DPO.run(step_of(config, run, "dpo"))
    checkpoint = tmp_path / "run" / "dpo" / "checkpoint"
    model = ModelConfig(path=str(tiny_llava))
    base, expected = (
        open_engine(model, ACTORS, saved).generate(PICTURES, Sampling(24)) for saved in (None, checkpoint)
    )
    opened = open_vllm(tiny_llava, adapter=checkpoint) if method == "lora" else open_vllm(checkpoint)
    with opened as engine:
        assert engine.generate(PICTURES, Sampling(24)) == expected != base


@contextmanager
def open_vllm(path: Path, adapter: Path | None = None) -> Iterator[VllmEngine]:
    """An engine for the length of a block."""
    model = ModelConfig(path=str(path), engine="vllm", adapter=str(adapter) if adapter else None)
    engine = VllmEngine(model, ACTORS)
    try:
        yield engine
    finally:
        engine.close()


def test_a_tiled_model_that_began_in_transformers_answers_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaVA-NeXT: another layout of names, texts that begin with <s>, pictures that take different numbers of tokens.

    Its heads are made larger than in other tests, as vLLM's CPU attention knows no smaller ones.
    """
    monkeypatch.setattr(tiny_models, "HIDDEN_SIZE", 64)
    monkeypatch.setattr(tiny_models, "NUM_HEADS", 2)
    for name, fields in (("_SIZES", {"hidden_size": 64}), ("_PATCHES", {"num_attention_heads": 2})):
        monkeypatch.setattr(tiny_models, name, getattr(tiny_models, name) | fields)
    base = tiny_models.build("llava_next", tmp_path / "base")
    assert not has_hub_names(base)
    expected = open_engine(ModelConfig(path=str(base)), ACTORS).generate(mixed_requests(), Sampling(8))
    assert len({answer.num_image_tokens for answer in expected}) > 2
    with open_vllm(base) as engine:
        assert engine.generate(mixed_requests(), Sampling(8)) == expected


def test_a_model_that_vllm_does_not_have_is_refused_in_one_line(tiny_llava: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_llava, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["PaintingForConditionalGeneration"]}))
    check_engine(ModelConfig(path=str(tiny_llava), engine="vllm"))
    with pytest.raises(ModelError, match="PaintingForConditionalGeneration, which vLLM does not have") as caught:
        check_engine(ModelConfig(path=str(copy), engine="vllm"))
    assert str(copy) in str(caught.value) and "\n" not in str(caught.value)
