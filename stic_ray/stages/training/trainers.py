"""What happens in a training step, on TRL's trainers: from a batch to the loss, the optimiser, and the logged figures.

Rows and their order are in `data.py`, batches in `collators.py`, what a model says of them in `scores.py`, and the
objectives in `method/objectives.py`. transformers runs the loop: it takes the micro-batches of a step
(`get_batch_samples`), goes forward and back through each (`training_step`, `compute_loss`), lets the optimiser take its
step, and logs (`log`).
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import datasets
import torch
from peft import PeftModel
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import Trainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import use_adapter

from stic_ray.core.training import OptimisationConfig
from stic_ray.method.objectives import PairLogps, mean_over_rejected, regularised_dpo
from stic_ray.stages.training import models
from stic_ray.stages.training.collators import REJECTED_IMAGE, TOKEN_WEIGHTS, Collator
from stic_ray.stages.training.data import WEIGHT, Example, ParquetRows
from stic_ray.stages.training.index import REFERENCE_LOGPS
from stic_ray.stages.training.metrics import Speed
from stic_ray.stages.training.scores import (
    AnswerLogps,
    Scores,
    drift,
    image_terms,
    lengths_of,
    likeliest_tokens,
    score_pairs,
    text_figures,
)

_COLUMNS = datasets.Dataset.from_list(
    [{"image": None, "prompt": None, "chosen": None, "rejected": None, "messages": None}]
)
"""What TRL looks at to see that the rows have images; it takes nothing but a dataset of `datasets`."""


class StepTrainer(Trainer):
    """What both trainers add to TRL's: rows in our order, a rate for the projector, and figures of each step."""

    def __init__(
        self,
        start: models.Start,
        stage: OptimisationConfig,
        rows: tuple[Dataset[Example], ParquetRows],
        collator: Collator,
        **arguments: Any,
    ) -> None:
        """Take the settings of the stage, the rows that are trained on and those held out, and TRL's arguments.

        A new adapter is of the seed.
        """
        self.config, self.stage = start.config, stage
        processor = collator.builder.processor
        arguments |= {"data_collator": collator, "processing_class": processor, "peft_config": start.new_adapter}
        super().__init__(train_dataset=_COLUMNS, eval_dataset=_COLUMNS, **arguments)
        self.train_dataset, self.eval_dataset = cast(Any, rows)
        if start.new_adapter is not None:
            models.initialise_adapter(models.model_of(self), self.config.seed)
        models.set_trainable(models.model_of(self), start)
        self.speed = Speed(self)
        self.sums: dict[str, tuple[list[str], torch.Tensor]] = {}
        """Of "train" and "eval": names, and behind the number of rows the sum of each over those since the last log."""

    @property
    def mode(self) -> str:
        """Whether the model is in training ("train") or in evaluation ("eval")."""
        return "train" if models.model_of(self).training else "eval"

    def get_batch_samples(self, *arguments: Any, **keywords: Any) -> Any:
        """Wait for the micro-batches of a step; there is none behind the last step.

        transformers 5.19 would take one more where a training goes on from the last, unless an epoch ends there.
        """
        if self.state.global_step >= self.state.max_steps:
            return [], None
        with self.speed.measure("data"):
            return super().get_batch_samples(*arguments, **keywords)

    def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """Go forward and back through a micro-batch."""
        with self.speed.measure("compute"):
            return super().training_step(*arguments, **keywords)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Go forward through a micro-batch and return its loss."""
        assert not return_outputs, "evaluation asks for the loss only"
        if self.mode == "eval":
            return self.loss_of(model, inputs, num_items_in_batch)
        self.speed.count(inputs)
        with self.speed.measure("forward"):
            return self.loss_of(model, inputs, num_items_in_batch)

    def loss_of(self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any) -> torch.Tensor:
        """Return the loss of a micro-batch."""
        raise NotImplementedError

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return transformers' optimiser with the projector in parameter groups of its own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if not is_new:
            return optimizer
        self.speed.watch(optimizer)
        rate = self.config.tuning.projector_learning_rate
        if rate is not None:
            parts = models.parameters_of(models.model_of(self))
            own = {id(parameter) for part, parameter in parts if part == "projector"}
            for group in [*optimizer.param_groups]:  # the schedule scales the rate of each
                params = group["params"]
                group["params"] = [p for p in params if id(p) not in own]
                optimizer.add_param_group({**group, "params": [p for p in params if id(p) in own], "lr": rate})
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return transformers' schedule, or what is left of one that has got down to `start_learning_rate`."""
        if self.stage.start_learning_rate is None:
            return super().create_scheduler(num_training_steps, optimizer)
        if self.lr_scheduler is None:
            rest = partial(rest_of_decay, self.stage, num_training_steps)
            self.lr_scheduler = LambdaLR(cast(Any, self.optimizer if optimizer is None else optimizer), rest)
        return self.lr_scheduler

    def record(self, counts: torch.Tensor, values: dict[str, torch.Tensor]) -> None:
        """Keep values of B rows, each of shape (B,), for the mean that the next log has.

        `counts` is by how much each row counts, and a value is what it adds. Training sums up on each worker and
        exchanges nothing; evaluation drops the rows that only fill up its last batch, which one worker cannot know.
        """
        rows = torch.stack([counts, *values.values()], dim=1).double()
        if self.mode == "eval":
            rows = cast(torch.Tensor, self.accelerator.gather_for_metrics(rows))
        before = self.sums[self.mode][1] if self.mode in self.sums else 0
        self.sums[self.mode] = [*values], rows.sum(0) + before

    def log(self, logs: dict[str, float], *arguments: Any, **keywords: Any) -> None:
        """Log, and with a step or an evaluation its figures. Called by all workers, which exchange them here once."""
        if "loss" in logs and self.speed.began_s is not None:
            speed, (names, sums) = self.speed.take(), self.sums.pop("train")
            own = torch.cat([speed, sums.to(speed.device)])
            every = cast(torch.Tensor, self.accelerator.gather(own[None])).cpu()
            logs |= self.speed.figures(every[:, : len(speed)]) | means(names, every[:, len(speed) :].sum(0))
        elif "eval" in self.sums:
            logs |= {f"eval_{name}": value for name, value in means(*self.sums.pop("eval")).items()}
        super().log(logs, *arguments, **keywords)


def rest_of_decay(settings: OptimisationConfig, num_steps: int, step: int) -> float:
    """Return the learning rate at a step as a share of `learning_rate`: `start_learning_rate` first, 0 at the end."""
    assert settings.start_learning_rate is not None
    begin, left = settings.start_learning_rate / settings.learning_rate, 1 - min(step, num_steps) / num_steps
    if settings.schedule == "linear":
        return begin * left
    turned = math.acos(2 * begin - 1)  # of the half turn from the highest rate to 0
    return (1 + math.cos(math.pi - (math.pi - turned) * left)) / 2


def means(names: Sequence[str], sums: torch.Tensor) -> dict[str, float]:
    """Return the mean of each name, given the number of rows and the sum of each over them."""
    return dict(zip(names, (sums[1:] / sums[0]).tolist(), strict=True)) if sums[0] else {}


class LikelihoodTrainer(StepTrainer, SFTTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Maximises the likelihood of answers: the mean over their tokens, of all workers and micro-batches of a step."""

    def loss_of(self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any) -> torch.Tensor:
        """Return the summed negative log-probability, divided by the answers' tokens; in training by their weights."""
        weights = inputs.get(TOKEN_WEIGHTS)
        inputs = {name: value for name, value in inputs.items() if name != TOKEN_WEIGHTS}
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        num_rows = self.args.per_device_train_batch_size  # in evaluation, too
        with torch.no_grad():
            found = (outputs.label_mask, outputs.entropy, outputs.is_top1)
            # A blank picture's row stands behind the others (collators.py), and not in every worker's batch.
            num_tokens, entropy, correct = (x.detach().float().sum(1)[:num_rows] for x in found)
            self.record(num_tokens, {"entropy": entropy, "mean_token_accuracy": correct})
        logps = outputs.log_probs if weights is None or self.mode == "eval" else outputs.log_probs * weights[:, 1:]
        loss = -logps.sum()
        num_micro_batches = 1
        if num_items_in_batch is None:
            loss = loss / outputs.label_mask.sum().clamp(min=1)
        else:  # the tokens of all workers, over which the gradients are averaged
            loss = loss / torch.as_tensor(num_items_in_batch).clamp(min=1) * self.accelerator.num_processes
            num_micro_batches = self.current_gradient_accumulation_steps
        if self.aux_loss_enabled:  # of a mixture of experts: TRL's balance of their load
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / num_micro_batches
        return loss


class RegularisedDPOTrainer(StepTrainer, DPOTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Minimises `method.objectives.regularised_dpo`, and terms about images, on batches of a `PairCollator`."""

    def loss_of(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Return the mean over the pairs of a micro-batch, by their weights."""
        settings, network = self.config.dpo, self.network
        own = likeliest_tokens(model, network, inputs[REJECTED_IMAGE]) if settings.own_tokens_weight else None
        policy = score_pairs(model, network, inputs, settings, own)
        with torch.no_grad():
            stored = None
            if own is None and all(name in inputs for name in REFERENCE_LOGPS):
                stored = AnswerLogps(torch.stack([inputs[name] for name in REFERENCE_LOGPS], dim=1))
            if stored is not None and not settings.image_terms:
                reference = Scores(stored, {})
            else:
                reference = self.reference_scores(inputs, own, stored)
            lengths = lengths_of(inputs)
        is_there = lengths[:, 1:] > 0
        (chosen, rejected), (chosen_before, rejected_before) = (
            (scores.own_image.answers[:, 0], scores.own_image.answers[:, 1:]) for scores in (policy, reference)
        )
        logps = PairLogps(chosen, rejected, chosen_before, rejected_before, is_there)
        weights = inputs.get(WEIGHT, torch.ones_like(chosen))
        terms = regularised_dpo(logps, beta=settings.beta, alpha=settings.alpha, weights=weights)
        loss = settings.text_weight * terms.dpo + terms.regulariser
        added, figures = image_terms(settings, policy, reference)
        for name, term in added.items():
            loss = loss + getattr(settings, f"{name}_weight") * (weights * term).mean()
        with torch.no_grad():
            values = {
                **text_figures(settings, terms, policy.own_image, is_there),
                "lengths/chosen": lengths[:, 0],
                "lengths/rejected": mean_over_rejected(lengths[:, 1:], is_there),
                **drift(policy.own_image, reference.own_image, inputs, lengths),
                **figures,
            }
            counts = (weights > 0).float()
            self.record(counts, {name: value.detach() * counts for name, value in values.items()})
        return loss

    @property
    def network(self) -> Any:
        """The configuration of the model."""
        return cast(Any, self.accelerator.unwrap_model(self.model)).config

    def reference_scores(
        self, inputs: dict[str, Any], own: torch.Tensor | None = None, stored: AnswerLogps | None = None
    ) -> Scores:
        """Return the scores under the model that training started from; `stored` as in `score_pairs`.

        It is a frozen model of its own where the policy is trained whole; else the policy with the frozen copy of
        the adapter that it started from, or without its new one.
        """
        settings, network = self.config.dpo, self.network
        if self.ref_model is not None:
            return score_pairs(self.ref_model, network, inputs, settings, own, stored)
        policy = self.accelerator.unwrap_model(self.model)
        assert isinstance(policy, PeftModel), "without a reference model the policy must carry an adapter"
        with use_adapter(policy, models.REFERENCE if models.REFERENCE in policy.peft_config else None):
            return score_pairs(self.model, network, inputs, settings, own, stored)
