"""Stages `dpo` and `sft` in two gloo workers under Ray Train and DeepSpeed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

from stic_ray.core.errors import SourceError, StageError
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import INFUSED, table_of
from stic_ray.engines.weight_names import has_hub_names
from stic_ray.stages.dpo import DPO
from stic_ray.stages.sft import SFT
from tests import tiny_models
from tests.stages.builders import step_of
from tests.stages.test_training_batches import config_for, encoded, write_pairs

pytestmark = pytest.mark.usefixtures("ray_session")


def prepare(folder: Path, num_pairs: int, *, with_text: bool = True) -> RunDir:
    """Write pairs and infused rows as the stages before would have."""
    write_pairs(folder / "preferences", num_pairs)
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A circle."}]
    rows: list[dict[str, Any]] = [
        {
            "id": str(index),
            "image": {"bytes": encoded(index), "path": None},
            "messages": messages,
            "num_sequence_tokens": 1,
            "model": "m",
        }
        for index in range(6)
    ]
    run = RunDir.of(str(folder))
    (run / "infusion").write_shard("rows", 0, table_of(rows, INFUSED), INFUSED)
    if with_text:
        text = [{**row, "id": f"t{row['id']}", "image": None} for row in rows[:2]]
        (run / "infusion").write_shard("text", 0, table_of(text, INFUSED), INFUSED)
    return run


def losses(run: RunDir, stage: str, name: str) -> list[float]:
    lines = ((run / stage).location / "metrics.jsonl").read().decode().splitlines()
    return [json.loads(line)[name] for line in lines]


def test_zero_2_lora_in_both_stages(tmp_path: Path, tiny_llava: Path) -> None:
    run = prepare(tmp_path / "two", 8)
    config = config_for(
        tiny_llava,
        workers={"num_workers": 2, "micro_batch": 2, "zero_stage": 2, "num_loaders": 1},
        sft={"learning_rate": 0.01, "global_batch": 4},
    )
    accounts = DPO.run(step_of(config, run, "dpo"))
    assert accounts["num_steps"] == 2 and accounts["num_rows_written"] == 8
    assert losses(run, "dpo", "loss/dpo")[0] == pytest.approx(math.log(2), abs=1e-6)
    (events,) = (tmp_path / "two" / "dpo" / "tensorboard").iterdir()
    assert events.stat().st_size > 0, "rank 0 alone writes"
    assert accounts["throughput"]["rows_per_second"] > 0
    assert accounts["warnings"] == [] and accounts["num_held_out"] == 0
    assert losses(run, "dpo", "seconds/backward_and_optimizer")[0] > 0, "one call of DeepSpeed's engine"
    SFT.run(step_of(config, run, "sft"))

    base = AutoModelForImageTextToText.from_pretrained(tiny_llava)
    adapters = {}
    for stage in ("dpo", "sft"):
        checkpoint = tmp_path / "two" / stage / "checkpoint"
        adapted = PeftModel.from_pretrained(base, checkpoint, adapter_name=stage)
        adapters[stage] = {n.replace(stage, ""): p for n, p in adapted.named_parameters() if f".{stage}." in n}
        assert any(p.any() for n, p in adapters[stage].items() if "lora_B" in n)
        assert not (checkpoint / "training_args.bin").exists()
        AutoProcessor.from_pretrained(checkpoint)
        result = (run / stage).read_json("result.json")
        assert result["trained"] == ["language_model"] and "vision_tower" in result["frozen"]
        assert not ((run / stage).location / "training").exists()
    assert any(not p.equal(adapters["dpo"][n]) for n, p in adapters["sft"].items())


def test_zero_3_leaves_a_whole_model_with_the_names_of_the_hub_in_any_folder(tmp_path: Path) -> None:
    """The folder has characters that mean something in a glob, and in a URI."""
    base = tiny_models.build("llava", tmp_path / "base")
    assert not has_hub_names(base), "a model that begins in transformers has names of its own"
    folder = tmp_path / "run [1] 50%*"
    run = prepare(folder, 4, with_text=False)
    config = config_for(
        base,
        tuning={"method": "full"},
        workers={"num_workers": 2, "micro_batch": 2, "zero_stage": 3},
    )
    DPO.run(step_of(config, run, "dpo"))
    checkpoint = folder / "dpo" / "checkpoint"
    assert has_hub_names(checkpoint)
    _, report = AutoModelForImageTextToText.from_pretrained(checkpoint, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    result = (run / "dpo").read_json("result.json")
    assert result["num_changed_tensors"] > 0 and result["frozen"] == ["vision_tower"]
    assert result["resumed_from_step"] == 0


@pytest.mark.slow
def test_an_error_that_would_come_again_ends_training_at_its_first_attempt(tmp_path: Path, tiny_llava: Path) -> None:
    """A loss that is no number, and a shard whose pictures are damaged: a line with the reason, and no restart."""
    run = prepare(tmp_path / "run", 8)
    rates = {"learning_rate": 1e30, "max_grad_norm": 1e30, "num_held_out": 0}
    config = config_for(tiny_llava, dpo=rates, workers={"num_workers": 2, "micro_batch": 2})
    assert config.workers.max_failures == 3
    with pytest.raises(
        StageError, match="dpo stopped at step 2: FloatingPointError: .* lower dpo.learning_rate"
    ) as caught:
        DPO.run(step_of(config, run, "dpo"))
    assert "\n" not in str(caught.value)
    assert (run / "dpo").read_json("result.json") is None
    assert len(list((tmp_path / "run" / "dpo" / "tensorboard").iterdir())) == 1, "each start writes a file"

    (shard,) = (Path(place.path) for place in (run / "preferences").shards("pairs"))
    content = bytearray(shard.read_bytes())
    content[200 : len(content) // 2] = bytes(len(content) // 2 - 200)  # the footer is whole
    shard.write_bytes(content)
    loading = config_for(tiny_llava, dpo={"num_held_out": 0}, workers={"micro_batch": 2, "num_loaders": 1})
    with pytest.raises(SourceError, match=r"pairs-000000.parquet' is damaged \(.*\. Delete it, ") as damaged:
        DPO.run(step_of(loading, run, "dpo"))
    assert "\n" not in str(damaged.value)
    assert len(list((tmp_path / "run" / "dpo" / "tensorboard").iterdir())) == 2
