"""The controls in real trainings: likelihood alone, pairs of another run, fine-tuning without `dpo`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import RunError, SourceError
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import INFUSED, PAIRS
from stic_ray.engines.loading import load_processor
from stic_ray.pipeline import names_of
from stic_ray.recipes import stic
from stic_ray.stages.dpo import DPO
from stic_ray.stages.training.building import make_dpo_trainer
from stic_ray.stages.training.collators import AnswersOnlyCollator
from stic_ray.stages.training.models import model_of
from tests.stages.builders import draw_pictures, pairs_in, run_stages, step_of
from tests.stages.test_training_batches import config_for, picture, write_pairs
from tests.stages.test_training_data import write_positions

pytestmark = pytest.mark.slow


def with_other_rejected(folder: Path) -> Path:
    """Write the same pairs with another dispreferred answer."""
    run = RunDir.of(str(folder))
    table = run.read_table("pairs", PAIRS)
    other = [[{"role": "assistant", "content": "Nothing at all, or is there?"}]] * table.num_rows
    table = table.set_column(table.schema.get_field_index("rejected"), PAIRS.field("rejected"), [other])
    run.write_shard("pairs", 1, table, PAIRS)
    return Path(run.shards("pairs")[1].path)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_likelihood_alone_learns_the_preferred_answers_and_reads_no_other(
    method: str, tmp_path: Path, tiny_llava: Path
) -> None:
    dpo = {"objective": "sft", "num_steps": 3, "learning_rate": {"lora": 0.01, "full": 0.0003}[method]}
    config = config_for(tiny_llava, tuning={"method": method}, dpo=dpo)
    pairs = write_pairs(tmp_path / "pairs", 8)
    found = []
    for name, file in (("one", pairs), ("other", with_other_rejected(tmp_path / "pairs"))):
        torch.manual_seed(0)  # the new adapter is drawn before the trainer sets its seed
        trainer: Any = make_dpo_trainer(config, pairs_in(config, file), tmp_path / name)
        before = {n: p.detach().clone() for n, p in model_of(trainer).named_parameters()}
        trainer.train()
        changed = {n for n, p in model_of(trainer).named_parameters() if not torch.equal(p, before[n])}
        assert changed and all("language_model" in n or "multi_modal_projector" in n or "lm_head" in n for n in changed)
        assert method == "full" or all("lora_" in n for n in changed)
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == trainer.state.global_step == 3, "8 rows in batches of 4, repeated"
        assert losses[-1] < losses[0] - 0.05
        found.append(losses)
    assert found[0] == found[1]


@pytest.mark.usefixtures("ray_session")
def test_pairs_of_another_run_are_recorded_and_watched(tmp_path: Path, tiny_llava: Path) -> None:
    """Four of six pairs are of the first six images; six steps of four rows go over them more than once."""
    other = write_positions(tmp_path / "other" / "preferences", [0, 2, 3, 7], [9, 8], [5])
    other.write_manifest({"stage": "preferences", "num_rows_written": 7})
    settings = {"pairs": other.uri, "num_images": 6, "num_steps": 6, "warmup_share": 0.5, "image": "shuffled"}
    config = config_for(tiny_llava, dpo=settings)
    run = run_stages(config, tmp_path / "run", "dpo")

    manifest = (run / "dpo").manifest or {}
    assert (manifest["num_rows_in"], manifest["num_rows_written"], manifest["num_steps"]) == (4, 4, 6)
    assert [each["from"] for each in manifest["inputs"].values()] == [other.uri] and not (
        run / "preferences"
    ).location.exists()
    result = (run / "dpo").read_json("result.json")
    assert (result["num_steps"], result["num_rows"]) == (6, 4)
    lines = ((run / "dpo").location / "metrics.jsonl").read().decode().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    assert rates.index(max(rates)) == 3, "half of six steps are warm-up"

    other.write_manifest({"stage": "preferences", "num_rows_written": 6})
    with pytest.raises(RunError, match=r"dpo of .* was finished from another .*other/preferences"):
        run_stages(config, tmp_path / "run", "dpo")


def test_too_few_pairs_are_told_in_one_line(tmp_path: Path, tiny_llava: Path) -> None:
    other = write_positions(tmp_path / "pairs", [4, 6])
    for settings, message in (
        ({"num_images": 4}, "dpo.num_images=4 leaves none of the pairs"),
        ({"num_images": 5, "image": "shuffled"}, "at least 2 pairs"),
        ({"num_pairs": 3}, "dpo.num_pairs=3 are more than the 2 pairs that there are"),
    ):
        config = config_for(tiny_llava, dpo={"pairs": other.uri, **settings})
        with pytest.raises(SourceError, match=message):
            DPO.run(step_of(config, RunDir.of(str(tmp_path / "run")), "dpo"))


@pytest.mark.usefixtures("ray_session")
def test_instruction_data_alone_needs_no_other_stage(tmp_path: Path, tiny_llava: Path) -> None:
    """Questions as they are, a new adapter on the base model, one model scored, and a report that says so."""
    pictures = draw_pictures(tmp_path / "pictures", 4)
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A circle."}]
    rows = [{"id": str(i), "image": f"{i:03d}.jpg", "conversations": talk} for i in range(4)]
    rows.append({"id": "text", "conversations": talk})
    (pictures / "rows.json").write_text(json.dumps(rows))
    (pictures / "b.jsonl").write_text(json.dumps({"image": "000.jpg", "question": "What?", "answer": "circle"}))
    config = config_for(
        tiny_llava,
        infusion={"source": str(pictures / "rows.json"), "describe": False},
        sft={"start": "base", "num_steps": 2, "global_batch": 4, "learning_rate": 0.01},
        evaluation={
            "benchmarks": [str(pictures / "b.jsonl")],
            "models": ["sft"],
            "max_answer_tokens": 4,
            "max_description_tokens": 4,
        },
    )
    run = run_stages(config, tmp_path / "run", *names_of(stic(config)))

    assert not any((run / stage).location.exists() for stage in ("pool", "preferences", "dpo"))
    processor: Any = load_processor(ModelConfig(path=str(tiny_llava)))
    for row in (run / "infusion").read_table("rows", INFUSED).to_pylist():
        assert [m["content"] for m in row["messages"]] == ["What is it?", "A circle."]
        assert row["description"] is row["model"] is None
        batch = AnswersOnlyCollator(processor)([{"image": picture(0).resize((64, 64)), "messages": row["messages"]}])
        assert 0 <= batch["input_ids"].shape[1] - row["num_sequence_tokens"] <= 1, "but for the token that ends a turn"
    assert (run / "sft").read_json("result.json")["num_steps"] == 2
    assert [each["from"] for each in ((run / "sft").manifest or {})["inputs"].values()] == ["infusion"]
    scores = (run / "evaluation").read_json("scores.json")
    assert {(row["model"], row["difference"]) for row in scores} == {("sft", None)}
    report = run.read_json("report.json")
    assert report["headline"]["sentence"] == "No trained model was compared with the base model."
    assert (run.location / "report.html").exists()
