"""PRIOR: a model that sees no image, its log-probabilities, and a training that weighs tokens by them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import SourceError
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import INFUSED, table_of
from stic_ray.core.steps import StepRun
from stic_ray.core.workload import ModelSize, Sizes
from stic_ray.engines.opening import open_engine
from stic_ray.method.objectives import image_token_weights
from stic_ray.stages.text_logps import TEXT_LOGPS
from stic_ray.stages.training.building import make_sft_trainer
from stic_ray.stages.training.collators import TOKEN_WEIGHTS
from stic_ray.stages.training.models import model_of
from tests.stages.test_training_batches import config_for, picture
from tests.stages.test_training_mixes import index, mixed, planned, write_real, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> RunDir:
    """Two shards of rows with images, and one of text."""
    folder = tmp_path_factory.mktemp("source")
    run = write_real(folder, tiny_llava, "rows", 9, with_image=True)
    text = write_real(folder, tiny_llava, "texts", 3, with_image=False)
    run.write_shard("text", 1, text.read_table("text", INFUSED), INFUSED)
    return run


@pytest.fixture(scope="module")
def scored(ray_session: None, source: RunDir, tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    output = RunDir.of(str(tmp_path_factory.mktemp("scored")))
    config = config_for(tiny_llava, actors={"batch_size": 4})
    accounts = TEXT_LOGPS.run(StepRun("text_logps", config, output, {"rows": source}))
    assert (accounts["num_rows_in"], accounts["num_rows_written"], accounts["num_rows_failed"]) == (12, 12, 0)
    return output


def test_rows_get_what_the_model_guesses_without_their_images(source: RunDir, scored: RunDir, tiny_llava: Path) -> None:
    engine = open_engine(ModelConfig(path=str(tiny_llava)), config_for(tiny_llava).actors)
    before, after = (run.read_table("rows", INFUSED).to_pylist() for run in (source, scored))
    assert [{**row, "text_logps": None} for row in after] == before and len(after) == 9
    expected = engine.score_tokens([row["messages"] for row in before])
    for row, logps in zip(after, expected, strict=True):
        assert row["text_logps"] == pytest.approx(logps, rel=1e-4, abs=1e-4)
    texts = scored.read_table("text", INFUSED).to_pylist()
    assert texts == source.read_table("text", INFUSED).to_pylist() and len(texts) == 3


def test_a_step_is_weighed_by_what_is_not_guessed(scored: RunDir, tiny_llava: Path, tmp_path: Path) -> None:
    """The loss of all rows by plain forward passes; text alone weighs as before, and so does all in evaluation."""
    config = mixed(tiny_llava, global_batch=12, prior_alpha=2.0, num_steps=1)
    config = config.model_copy(update={"workers": config.workers.model_copy(update={"micro_batch": 4})})
    trainer: Any = make_sft_trainer(config, planned(config, scored), tmp_path / "out")
    rows = [*scored.read_table("rows", INFUSED).to_pylist(), *scored.read_table("text", INFUSED).to_pylist()]
    collate, model, losses, num_tokens = trainer.data_collator, model_of(trainer).eval(), [], 0
    for number, row in enumerate(rows):
        image = picture(number % 5).convert("RGB") if row["image"] else None
        batch = collate([{**row, "image": image}])
        weights, labels = batch.pop(TOKEN_WEIGHTS)[0, 1:], batch.pop("labels")[0, 1:]
        learnt = labels != -100
        expected = image_token_weights(torch.tensor(row["text_logps"]), 2.0) if image else torch.ones(learnt.sum())
        assert weights[learnt].tolist() == pytest.approx(expected.tolist())
        assert float(expected.mean()) == pytest.approx(1.0) and (image is None or float(expected.std()) > 0)
        with torch.no_grad():
            logps = model(**batch).logits[0, :-1].log_softmax(-1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
        losses.append(-(logps * weights)[learnt].sum())
        num_tokens += int(learnt.sum())
    trainer.train()
    (loss,) = (each["loss"] for each in trainer.state.log_history if "loss" in each)
    assert loss == pytest.approx(float(sum(losses)) / num_tokens, rel=1e-4)

    model.eval()
    batch = collate([{**rows[0], "image": picture(0).convert("RGB")}])
    plain = {name: value for name, value in batch.items() if name != TOKEN_WEIGHTS}
    with torch.no_grad():
        assert trainer.loss_of(model, batch, None) == trainer.loss_of(model, plain, None)


def test_without_a_weight_training_is_what_it_was(
    source: RunDir, scored: RunDir, tiny_llava: Path, tmp_path: Path
) -> None:
    losses = []
    for name, run, settings in (("plain", source, {}), ("even", scored, {"prior_alpha": 0.0})):
        config = mixed(tiny_llava, num_steps=2, learning_rate=0.01, **settings)
        trainer: Any = make_sft_trainer(config, planned(config, run), tmp_path / name)
        trainer.train()
        losses.append([each["loss"] for each in trainer.state.log_history if "loss" in each])
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_model_can_be_trained_to_guess_without_images(source: RunDir, tiny_llava: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"image": "none", "num_steps": 4, "learning_rate": 0.01, "num_held_out": 4}
    more = write_source(tmp_path, "more", [9] * 40, with_image=True)
    for given, sources in (({}, [source]), ({"mix": {"rows": 1, "more": 1}}, [source, more])):
        config = mixed(tiny_llava, **settings, **given)
        trainer: Any = make_sft_trainer(config, planned(config, *sources), tmp_path / f"out{len(sources)}")
        seen: list[set[str]] = []
        trainer.speed.count = lambda batch, seen=seen: seen.append(set(batch))
        trainer.speed.figures = lambda every: {}
        trainer.train()
        losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
        assert losses[-1] < losses[0] and all(keys == {"input_ids", "attention_mask", "labels"} for keys in seen)


@pytest.mark.parametrize("logps", [None, [-0.5]])
def test_rows_without_log_probabilities_of_their_tokens_are_refused(
    logps: list[float] | None, tiny_llava: Path, tmp_path: Path
) -> None:
    config = mixed(tiny_llava, prior_alpha=1.0)
    run = write_source(tmp_path, "rows", [9], with_image=True)
    if logps is None:
        with pytest.raises(SourceError, match=r"^sft\.prior_alpha needs .* source 'rows' is without: have stage text_"):
            index(config, run)
        return
    (row,) = run.read_table("rows", INFUSED).to_pylist()
    run.write_shard("rows", 0, table_of([{**row, "text_logps": logps}], INFUSED), INFUSED)
    trainer: Any = make_sft_trainer(config, planned(config, run), tmp_path / "out")
    with pytest.raises(SourceError, match=r"a row has \d+ of 1: have stage text_logps") as caught:
        trainer.data_collator([{**row, "text_logps": logps, "image": picture(0).convert("RGB")}])
    assert "\n" not in str(caught.value)


def test_a_folder_without_rows_is_refused_and_the_estimate_reads_no_image(tiny_llava: Path, tmp_path: Path) -> None:
    config = config_for(tiny_llava)
    empty = StepRun("text_logps", config, RunDir.of(str(tmp_path)), {"rows": RunDir.of(str(tmp_path / "empty"))})
    with pytest.raises(SourceError, match=r"empty' has no rows-\*\.parquet or text-"):
        TEXT_LOGPS.run(empty)
    sizes = Sizes(ModelSize(1e9, 100, 1.0), None, 30, None, 150, 50, 1000)
    work = TEXT_LOGPS.work(config, sizes)
    assert work is not None and (work.num_rows, work.requests) == (30, ((1, 66, 0),))
    assert TEXT_LOGPS.work(config, replace(sizes, num_instructions=None)) is None
