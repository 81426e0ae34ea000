"""Terms about images, and several rejected answers: whole steps against plain forward passes; no Ray."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from stic_ray.core.errors import ConfigError, SourceError
from stic_ray.core.randomness import seed_for
from stic_ray.core.rundir import RunDir
from stic_ray.core.schemas import PAIRS, table_of
from stic_ray.engines.adapters import model_at
from stic_ray.engines.fingerprints import fingerprint
from stic_ray.method.corruption import corrupt, graded
from stic_ray.stages.training.building import make_dpo_trainer
from stic_ray.stages.training.data import ParquetRows, read_pairs
from stic_ray.stages.training.index import REFERENCE_LOGPS
from stic_ray.stages.training.models import model_of
from tests import tiny_models
from tests.stages.builders import pairs_in
from tests.stages.test_training_batches import EMBEDDED, config_for, encoded, figures_of, picture

BETA, ALPHA, DELTA = 0.3, 0.01, 0.2
TERMS: dict[str, dict[str, Any]] = {
    "conditional and anchor": {"conditional_weight": 0.7, "anchor_weight": 0.4, "anchor_delta": DELTA},
    "symmetric": {"text_weight": 0.0, "symmetric_weight": 1.0},
    "own tokens": {"text_weight": 0.5, "own_tokens_weight": 0.5},
    "all": {
        "anchor_delta": DELTA,
        "conditional_weight": 0.7,
        "anchor_weight": 0.4,
        "symmetric_weight": 0.3,
        "own_tokens_weight": 0.5,
    },
}
OTHERS = [[], ["Two green triangles."], ["A dog.", "Nothing is there at all."], []]
"""Further rejected answers of each row."""


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def row_of(index: int, **columns: Any) -> dict[str, Any]:
    return {
        **{name: 0 for name in PAIRS.names if PAIRS.field(name).type == "int64"},
        **{name: "x" for name in PAIRS.names if PAIRS.field(name).type == "string"},
        "image_id": f"image {index}",
        "image": {"bytes": encoded(index), "path": None},
        "prompt": [{"role": "user", "content": "Describe the picture."}],
        "chosen": said("There is a red circle. " * (1 + index % 3)),
        "rejected": said("There are four blue squares " * (1 + index % 2)),
        **columns,
    }


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    run = RunDir.of(str(folder))
    run.write_shard("pairs", 0, table_of(rows, PAIRS), PAIRS)
    return Path(run.shards("pairs")[0].path)


def write_all(folder: Path) -> Path:
    """Four pairs with a rejected image each, and three, two or one rejected answers."""
    rows = [
        row_of(
            index,
            rejected_image={"bytes": encoded(index + 4), "path": None},
            more_rejected=[said(text) for text in OTHERS[index]] or None,
        )
        for index in range(4)
    ]
    return write(folder, *rows)


def trainer_for(model: Path, folder: Path, share_prefix: bool, **settings: Any) -> Any:
    dpo = {"alpha": ALPHA, "beta": BETA, **settings}
    config = config_for(model, dpo=dpo, workers={"share_prefix": share_prefix})
    return make_dpo_trainer(config, pairs_in(config, write_all(folder / "pairs")), folder / "out")


def move(model: Any) -> None:
    """Move the adapter, so that the policy is no longer the reference."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))


class Plain:
    """One sequence at a time by an ordinary forward pass."""

    def __init__(self, trainer: Any) -> None:
        self.builder, self.model = trainer.data_collator.builder, model_of(trainer)

    def run(self, prompt: Any, answer: Any, image: Image.Image | None) -> tuple[Tensor, Tensor]:
        """Return log-probabilities (tokens, vocabulary) at the answer's places, and its tokens."""
        sequence = self.builder.build([*prompt, *answer], with_image=image is not None)
        batch = self.builder.batch([sequence], [image])
        learnt = batch.pop("is_answer")[0, 1:]
        logps = self.model(**batch).logits[0, :-1].float().log_softmax(-1)
        return logps[learnt], batch["input_ids"][0, 1:][learnt]

    def ratio(self, prompt: Any, answer: Any, image: Image.Image | None, tokens: Tensor | None = None) -> Tensor:
        """Return log p of the policy minus that of the reference."""
        logps, own = self.run(prompt, answer, image)
        with self.model.disable_adapter():
            before, _ = self.run(prompt, answer, image)
        tokens = own if tokens is None else tokens
        return (logps - before).gather(1, tokens[:, None]).sum()


def expected_terms(plain: Plain, row: dict[str, Any]) -> dict[str, Tensor]:
    """The terms of a row, from plain forward passes, by the papers' formulas."""

    def loss(margin: Tensor) -> Tensor:
        return torch.log1p(torch.exp(-margin.double()))

    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    own, other = row["image"], row["rejected_image"]
    ratio = plain.ratio(prompt, chosen, own)
    answers = [rejected, *(row["more_rejected"] or [])]
    noised, labels = plain.run(prompt, chosen, other)
    assert (noised.argmax(-1) != labels).any(), "the model would say something else, so the term has something to do"
    pairs = [
        (ratio, plain.ratio(prompt, chosen, None)),
        (plain.ratio(prompt, chosen, None), plain.ratio(prompt, chosen, other)),
        (plain.ratio(prompt, rejected, other), plain.ratio(prompt, rejected, None)),
        (plain.ratio(prompt, rejected, None), plain.ratio(prompt, rejected, own)),
    ]
    return {
        "text": torch.stack([loss(BETA * (ratio - plain.ratio(prompt, each, own))) for each in answers]).mean(),
        "conditional": loss(BETA * (ratio - plain.ratio(prompt, chosen, other))),
        "anchor": loss(BETA * ratio - DELTA),
        "symmetric": torch.stack([loss(BETA * (better - worse)) for better, worse in pairs]).sum(),
        "own_tokens": loss(BETA * (ratio - plain.ratio(prompt, chosen, own, noised.argmax(-1)))),
        "regulariser": -plain.run(prompt, chosen, own)[0].gather(1, labels[:, None]).sum(),
    }


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("terms", TERMS)
def test_a_step_has_the_loss_of_plain_forward_passes(
    terms: str, share_prefix: bool, tmp_path: Path, tiny_llava: Path
) -> None:
    """With 2 to 4 answers a row, and weights of the rows as at the end of an epoch."""
    compare(tiny_llava, tmp_path, share_prefix, TERMS[terms])


@pytest.mark.parametrize("family", [family for family in EMBEDDED if family != "llava"])
def test_other_families_have_it_too(family: str, tmp_path: Path) -> None:
    """Whose pictures have different numbers of tokens."""
    compare(tiny_models.build(family, tmp_path / family), tmp_path, True, TERMS["all"])


def compare(model: Path, folder: Path, share_prefix: bool, settings: dict[str, Any]) -> None:
    trainer = trainer_for(model, folder, share_prefix, **settings)
    rows = [trainer.train_dataset[i] for i in range(4)]
    for row, weight in zip(rows, (2.0, 1.0, 1.0, 0.0), strict=True):
        row["weight"] = weight
    batch = trainer.data_collator([dict(row) for row in rows])
    assert ("segments" in batch) == share_prefix
    model_of(trainer).eval()
    move(model_of(trainer))
    with torch.no_grad():
        found = trainer.compute_loss(model_of(trainer), batch).item()
        each = [expected_terms(Plain(trainer), row) for row in rows]
    weights = {"text": 1.0, "regulariser": ALPHA} | {
        name.removesuffix("_weight"): weight for name, weight in settings.items() if name.endswith("_weight")
    }
    loss = sum(
        row["weight"] * weight * terms[name]
        for row, terms in zip(rows, each, strict=True)
        for name, weight in weights.items()
    )
    assert found == pytest.approx(float(loss) / 4, rel=2e-5, abs=1e-6)
    figures = figures_of(trainer)
    for name in weights.keys() - {"text", "regulariser"}:
        mean = sum(terms[name] for terms in each[:3]) / 3
        assert figures[f"loss/{name}"] == pytest.approx(float(mean), rel=2e-5, abs=1e-6)
    assert figures["loss/dpo"] == pytest.approx(float(sum(terms["text"] for terms in each[:3])) / 3, rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("terms", ["conditional and anchor", "symmetric", "own tokens"])
def test_every_term_is_trained_on(terms: str, tmp_path: Path, tiny_llava: Path) -> None:
    """The first step has ln 2 for each comparison; then they are learned, and what is logged says so."""
    settings = {**TERMS[terms], "anchor_delta": 0.0, "alpha": 0.0, "num_steps": 4, "learning_rate": 0.003}
    trainer = trainer_for(tiny_llava, tmp_path, True, **settings)
    trainer.train()
    first, *_, last = [entry for entry in trainer.state.log_history if "loss/dpo" in entry]
    names = {name.removesuffix("_weight") for name, weight in settings.items() if name.endswith("_weight") and weight}
    for name in names - {"text"}:
        assert first[f"loss/{name}"] == pytest.approx((4 if name == "symmetric" else 1) * math.log(2), abs=1e-6)
        assert last[f"loss/{name}"] < first[f"loss/{name}"], name
    if terms == "own tokens":
        assert last["rewards/own_tokens"] < last["rewards/chosen"] and "rewards/rejected_image" not in last
        return
    margins = last["rewards/chosen"] - last["rewards/rejected_image"]
    assert last["rewards/image_margins"] == pytest.approx(margins, rel=1e-4) and margins > 0
    assert last["rewards/image_accuracies"] > 0.5 and last["logps/rejected_image"] < 0


def test_a_frozen_model_of_its_own_is_the_reference_of_every_term(tmp_path: Path, tiny_llava: Path) -> None:
    config = config_for(tiny_llava, tuning={"method": "full"}, dpo={**TERMS["all"], "num_steps": 2, "alpha": 0.0})
    trainer: Any = make_dpo_trainer(config, pairs_in(config, write_all(tmp_path / "pairs")), tmp_path / "out")
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "loss/dpo" in entry]
    for name, count in (("conditional", 1), ("symmetric", 4), ("own_tokens", 1)):
        assert first[f"loss/{name}"] == pytest.approx(count * math.log(2), abs=1e-6)
        assert second[f"loss/{name}"] != pytest.approx(count * math.log(2), abs=1e-4)


def test_stored_log_probabilities_are_for_the_own_images_only(tmp_path: Path, tiny_llava: Path) -> None:
    """The reference is asked for the rejected images, and the rest is what was stored."""
    trainer = trainer_for(tiny_llava, tmp_path, True, conditional_weight=1.0, alpha=0.0, beta=1.0, text_weight=0.0)
    rows = [{**trainer.train_dataset[i], "more_rejected": None} for i in range(4)]
    model = model_of(trainer).eval()
    with torch.no_grad():
        reference = trainer.reference_scores(trainer.data_collator(rows)).own_image.answers
        for row, (chosen, rejected) in zip(rows, reference.tolist(), strict=True):
            row |= dict(zip(REFERENCE_LOGPS, (chosen - 2.0, rejected), strict=True))
        found = trainer.compute_loss(model, trainer.data_collator(rows))
    assert found.item() == pytest.approx(math.log1p(math.exp(-2.0)), rel=1e-4)


def test_stored_log_probabilities_do_not_count_where_rows_have_further_answers(tmp_path: Path) -> None:
    model = tiny_models.build("llava", tmp_path / "model")
    config = config_for(model)
    revision = fingerprint(model_at(config.model, None))
    stored = {"model_revision": revision, **dict.fromkeys(REFERENCE_LOGPS, -1.0)}
    alone, several = row_of(0, **stored), row_of(1, **stored, more_rejected=[said("A dog.")])
    assert pairs_in(config, write(tmp_path / "one", alone)).has_reference_logps
    assert not pairs_in(config, write(tmp_path / "two", alone, several)).has_reference_logps


def test_pairs_without_a_rejected_image_are_refused_where_a_term_needs_one(tmp_path: Path, tiny_llava: Path) -> None:
    image = {"bytes": encoded(5), "path": None}
    some = write(tmp_path / "some", row_of(0, rejected_image=image), row_of(1))
    every = write(tmp_path / "all", row_of(0, rejected_image=image))
    old = tmp_path / "old.parquet"  # as a run of an earlier version has left it
    table = pq.read_table(some)
    new = ("more_rejected", "rejected_image", "rejected_image_corruption", "chosen_number", "rejected_numbers")
    pq.write_table(table.drop_columns([*new, "chosen_score", "rejected_scores"]), old)
    config = config_for(tiny_llava, dpo={"conditional_weight": 1.0})
    for file in (some, old):
        with pytest.raises(
            SourceError, match=r"dpo.conditional_weight needs a rejected image .*dpo.rejected_image=crop"
        ):
            pairs_in(config, file)
    assert pairs_in(config, every).num_trained == 1
    made = config_for(tiny_llava, dpo={"conditional_weight": 1.0, "rejected_image": "crop", "num_steps": 1})
    trainer: Any = make_dpo_trainer(made, pairs_in(made, old), tmp_path / "out")
    trainer.train()
    assert trainer.state.log_history[0]["loss/conditional"] == pytest.approx(math.log(2), abs=1e-6)


def test_rejected_images_are_made_by_seed_epoch_and_image(tmp_path: Path) -> None:
    """Their strength goes from one value to another over the steps; held-out rows have the last one."""
    settings = {
        "conditional_weight": 1.0,
        "rejected_image": "mask",
        "rejected_image_strength": 0.2,
        "rejected_image_strength_end": 0.8,
        "num_epochs": 2,
        "global_batch": 2,
        "num_held_out": 0,
    }
    config = config_for(tmp_path, dpo=settings)
    rows = pairs_in(config, write(tmp_path / "pairs", *(row_of(index) for index in range(6))))
    trained, held_out = read_pairs(config, replace(rows, held_out=rows.trained))

    def made(dataset: ParquetRows, index: int) -> tuple[str, Image.Image]:
        row = dataset[index]
        return row["image_id"], row["rejected_image"]

    for epoch in (0, 1):
        trained.set_epoch(epoch)
        for index in range(6):
            name, found = made(trained, index)
            clean = picture(int(name.split()[1]))
            strength = 0.2 + 0.6 * (3 * epoch + index // 2) / 5
            drawn = seed_for(config.seed, name, f"rejected image of epoch {epoch}") % 2**32
            assert found.tobytes() == corrupt(clean, graded("mask", strength, drawn)).tobytes()
            assert found.tobytes() != clean.tobytes()
    assert made(held_out, 3)[1].tobytes() == made(held_out, 3)[1].tobytes()
    drawn = seed_for(config.seed, "image 0", "rejected image of epoch 0") % 2**32
    assert made(held_out, 0)[1].tobytes() == corrupt(picture(0), graded("mask", 0.8, drawn)).tobytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "sft", "conditional_weight": 1.0}, "conditional_weight adds a term to objective=paper"),
        ({"objective": "released_code", "anchor_weight": 1.0}, "anchor_weight adds a term to objective=paper"),
        ({"objective": "sft", "text_weight": 0.5}, "text_weight is of the DPO part"),
        ({"image": "blank", "own_tokens_weight": 1.0}, "image=blank takes the own one away"),
        ({"symmetric_weight": 1.0, "rejected_image": "crop"}, "rejected_image=pair, not crop"),
        ({"rejected_image_strength_end": 1.0}, "rejected_image_strength_end is for images that training makes"),
        ({"conditional_weight": -1.0}, "greater than or equal to 0"),
    ],
)
def test_settings_that_make_no_sense_together_are_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        config_for(tmp_path, dpo=settings)


def test_two_passes_are_refused_where_deepspeed_cannot_add_up_their_gradients(tmp_path: Path) -> None:
    workers, terms = {"zero_stage": 3, "gradient_checkpointing": True}, {"conditional_weight": 1.0}
    with pytest.raises(ConfigError, match=r"dpo.conditional_weight learns from two passes .* use zero_stage=2"):
        config_for(tmp_path, dpo=terms, workers=workers)
    config_for(tmp_path, dpo={"own_tokens_weight": 1.0}, workers=workers)
    config_for(tmp_path, dpo=terms, workers=workers, tuning={"method": "full"})
    config_for(tmp_path, dpo=terms, workers={**workers, "gradient_checkpointing": False})
