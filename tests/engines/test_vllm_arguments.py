"""What vLLM is started with follows from the configuration; tests/vllm has the engine itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stic_ray.core.config import ActorsConfig, ModelConfig
from stic_ray.core.errors import ModelError
from stic_ray.engines.vllm_engine import end_with_us, engine_arguments
from stic_ray.engines.weight_names import has_hub_names
from tests.engines.conftest import Checkpoints


def arguments(path: Path, scratch: Path, adapter: Path | None = None, **actors: Any) -> dict[str, Any]:
    model = ModelConfig(path=str(path), adapter=str(adapter) if adapter else None)
    return engine_arguments(model, ActorsConfig(**actors), scratch)


def test_whole_gpus_share_a_model(tiny_llava: Path, tmp_path: Path) -> None:
    found = arguments(tiny_llava, tmp_path, num_gpus=2, gpu_memory_share=0.5, max_length_tokens=512, batch_size=8)
    assert (found["tensor_parallel_size"], found["distributed_executor_backend"]) == (2, "mp")
    assert (found["gpu_memory_utilization"], found["max_model_len"], found["max_num_seqs"]) == (0.5, 512, 8)
    assert (found["dtype"], found["enforce_eager"]) == ("bfloat16", False)


def test_actors_that_share_a_gpu_share_its_memory(tiny_llava: Path, tmp_path: Path) -> None:
    found = arguments(tiny_llava, tmp_path, num_gpus=0.5)
    assert (found["tensor_parallel_size"], found["gpu_memory_utilization"]) == (1, 0.45)


def test_a_cpu_computes_as_it_can(tiny_llava: Path, tmp_path: Path) -> None:
    found = arguments(tiny_llava, tmp_path)
    assert (found["dtype"], found["enforce_eager"], found["enable_chunked_prefill"]) == ("float32", True, False)
    assert (found["model"], list(tmp_path.iterdir())) == (str(tiny_llava), [])


def test_a_checkpoint_without_the_names_of_the_hub_is_linked(checkpoint: Checkpoints, tmp_path: Path) -> None:
    found = arguments(checkpoint("llava"), tmp_path)
    assert found["model"] == str(tmp_path) and has_hub_names(tmp_path)


@pytest.mark.parametrize(("rank", "room"), [(4, 8), (16, 16), (20, 32), (128, 128)])
def test_an_adapter_finds_room(rank: int, room: int, tiny_llava: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    assert arguments(tiny_llava, tmp_path, tmp_path)["max_lora_rank"] == room


def test_an_adapter_that_is_too_large_is_refused(tiny_llava: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 600}))
    with pytest.raises(ModelError, match="rank 600, vLLM takes up to 512"):
        arguments(tiny_llava, tmp_path, tmp_path)


def test_processes_end_with_the_one_that_needs_them() -> None:
    """One of them is gone before, and whoever has its number by then is left alone."""
    lives, gone = (subprocess.Popen(["sleep", "600"]) for _ in range(2))
    watchdog = end_with_us([lives.pid, gone.pid, None])
    gone.kill()
    gone.wait()
    assert lives.poll() is None
    watchdog.communicate()  # closes its input, as the end of this process would
    assert lives.wait() == -9 and watchdog.returncode == 0


def test_a_release_that_lacks_what_we_use_is_refused_before_weights_are_loaded(
    tiny_llava: Path, tmp_path: Path
) -> None:
    (tmp_path / "vllm-0.1.0.dist-info").mkdir()
    (tmp_path / "vllm-0.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.1.0\n")
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("class ModelRegistry:\n    pass\n")
    code = (
        "from stic_ray.core.config import ModelConfig\n"
        "from stic_ray.engines.vllm_engine import check_vllm\n"
        f"check_vllm(ModelConfig(path={str(tiny_llava)!r}))"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "vLLM 0.1.0 is not one that stic-ray[vllm] installs" in output.stderr
    assert output.stderr.splitlines()[-1].startswith("stic_ray.core.errors.ModelError")
