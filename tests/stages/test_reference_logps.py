"""Log-probabilities that are stored with the pairs, and used in the place of the reference model's pass."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from stic_ray.core.config import RunConfig
from stic_ray.core.errors import ConfigError, Rejected
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import PAIRS, table_of
from stic_ray.core.storage import Location
from stic_ray.method.prompts import load_prompts
from stic_ray.stages.preferences import PairMaker
from stic_ray.stages.training.building import make_dpo_trainer
from stic_ray.stages.training.data import REFERENCE_LOGPS
from stic_ray.stages.training.index import index_pairs
from stic_ray.stages.training.models import model_of
from tests.stages.builders import check, draw_pictures, fake_config, pairs_in
from tests.stages.test_training_batches import config_for, figures_of, write_pairs

LN_2 = 0.6931472


def make_pairs(config: RunConfig, pictures: Path, checkpoint: Location | None = None) -> list[dict[str, Any]]:
    fetched = {"fetch_reason": None, "fetch_error": None}
    rows = [
        {"image_id": f"{number}", "position": number, "path": path.name, "encoded": path.read_bytes(), **fetched}
        for number, path in enumerate(sorted(pictures.glob("*.jpg")))
    ]
    maker = PairMaker(config, load_prompts(None), checkpoint)
    candidates, finished = [maker.prepare(row) for row in rows], []
    for candidate, answer in zip(candidates, maker.answer(candidates), strict=True):
        with suppress(Rejected):
            finished.append((candidate, maker.finish(candidate, answer)))
    maker.complete(finished)
    return [pair for _, tables in finished for pair in tables["pairs"]]


def asking_for_logps(model: Path, **sections: dict[str, Any]) -> RunConfig:
    preferences = {"reference_logps": True, "allow_truncated": True, "max_new_tokens": 24}
    return config_for(model, preferences=preferences, actors={"batch_size": 3}, **sections)


def test_they_are_what_training_would_work_out(tmp_path: Path, tiny_llava: Path) -> None:
    """Under its own reference's log-probabilities the untrained policy has a DPO part of ln 2."""
    config = asking_for_logps(tiny_llava)
    pairs = make_pairs(config, draw_pictures(tmp_path / "pictures", 5))
    assert len(pairs) > 1 and len({pair[name] for pair in pairs for name in REFERENCE_LOGPS}) == 2 * len(pairs)
    run = RunDir.of(str(tmp_path / "run"))
    run.write_shard("pairs", 0, table_of(pairs, PAIRS), PAIRS)
    trainer: Any = make_dpo_trainer(config, pairs_in(config, Path(run.shards("pairs")[0].path)), tmp_path / "out")
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    with torch.no_grad():
        expected = trainer.reference_scores(batch).own_image.answers
        trainer.reference_scores = None  # is not asked again
        trainer.compute_loss(model_of(trainer).eval(), dict(batch))
    assert not set(REFERENCE_LOGPS) & set(trainer.eval_dataset.columns), "evaluation compares tokens"
    stored = torch.stack([batch[name] for name in REFERENCE_LOGPS], dim=1)
    torch.testing.assert_close(stored, expected, atol=1e-4, rtol=1e-6)
    assert figures_of(trainer)["loss/dpo"] == pytest.approx(LN_2, abs=1e-5)


def test_in_a_second_round_they_count_where_they_are_of_the_model_that_it_starts_from(
    tmp_path: Path, tiny_llava: Path
) -> None:
    config = asking_for_logps(tiny_llava, dpo={"global_batch": 4, "num_steps": 2})
    first: Any = make_dpo_trainer(config, pairs_in(config, write_pairs(tmp_path / "first", 4)), tmp_path / "out")
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    adapter = Location.of(str(tmp_path / "adapter"))
    pictures = draw_pictures(tmp_path / "pictures", 5)
    for name, maker, used in (("of the adapter", adapter, True), ("of the base", None, False)):
        pairs = make_pairs(config, pictures, maker)
        run = RunDir.of(str(tmp_path / name))
        run.write_shard("pairs", 0, table_of(pairs, PAIRS), PAIRS)
        rows = index_pairs(config, run.shards("pairs"), adapter)
        assert rows.has_reference_logps == used
        trainer: Any = make_dpo_trainer(config, rows, tmp_path / f"out {name}", tmp_path / "adapter")
        with torch.no_grad():
            trainer.compute_loss(
                model_of(trainer).eval(), trainer.data_collator([dict(r) for r in trainer.train_dataset])
            )
        assert figures_of(trainer)["loss/dpo"] == pytest.approx(LN_2, abs=1e-5)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_later_round_is_compared_with_its_start_or_with_the_runs_own_model(
    method: str, tmp_path: Path, tiny_llava: Path
) -> None:
    """Compared with the untrained model, a policy that was trained has a reward before its first step."""
    settings = {"global_batch": 4, "num_steps": 3, "learning_rate": 1e-2}
    config = config_for(tiny_llava, dpo=settings, tuning={"method": method})
    rows = pairs_in(config, write_pairs(tmp_path / "pairs", 4))
    first: Any = make_dpo_trainer(config, rows, tmp_path / "out")
    batch = first.data_collator([dict(row) for row in first.train_dataset])
    with torch.no_grad():
        of_base = first.reference_scores(batch).own_image.answers
    first.train()
    first.save_model(str(tmp_path / "trained"))
    losses = {}
    for reference in ("start", "base"):
        second = config.model_copy(update={"dpo": config.dpo.model_copy(update={"reference": reference})})
        trainer: Any = make_dpo_trainer(second, rows, tmp_path / f"out {reference}", tmp_path / "trained")
        with torch.no_grad():
            found = trainer.reference_scores(dict(batch)).own_image.answers
            trainer.compute_loss(model_of(trainer).eval(), dict(batch))
        assert torch.allclose(found, of_base, atol=1e-3) is (reference == "base")
        losses[reference] = figures_of(trainer)["loss/dpo"]
    assert losses["start"] == pytest.approx(LN_2, abs=1e-5) and abs(losses["base"] - LN_2) > 1e-3


def test_a_reference_without_adapter_is_refused_for_a_run_that_begins_with_one(tiny_llava: Path) -> None:
    config = config_for(tiny_llava, dpo={"reference": "base"})
    config = config.model_copy(update={"model": config.model.model_copy(update={"adapter": "somewhere"})})
    with pytest.raises(ConfigError, match="leave dpo.reference=start"):
        check(config, "dpo")


@pytest.mark.parametrize("why", ["of another model", "of other pictures", "missing in one pair"])
def test_they_are_left_alone_where_they_do_not_hold(why: str, tmp_path: Path, tiny_llava: Path) -> None:
    config = asking_for_logps(tiny_llava, dpo={"image": "shuffled" if why == "of other pictures" else "own"})
    pairs = make_pairs(config, draw_pictures(tmp_path / "pictures", 4))
    if why == "of another model":
        pairs = [{**pair, "model_revision": "other"} for pair in pairs]
    if why == "missing in one pair":
        pairs[1] = {**pairs[1], REFERENCE_LOGPS[1]: None}
    run = RunDir.of(str(tmp_path / "run"))
    run.write_shard("pairs", 0, table_of(pairs, PAIRS), PAIRS)
    trainer: Any = make_dpo_trainer(config, pairs_in(config, Path(run.shards("pairs")[0].path)), tmp_path / "out")
    assert not set(REFERENCE_LOGPS) & set(trainer.train_dataset.columns)


def test_an_engine_that_cannot_score_is_told_before_work(tmp_path: Path) -> None:
    config = fake_config(tmp_path, draw_pictures(tmp_path / "pictures", 2), preferences={"reference_logps": True})
    with pytest.raises(ConfigError, match=r"needs model\.engine=transformers.*model\.engine=fake does not"):
        check(config, "pool", "preferences")
