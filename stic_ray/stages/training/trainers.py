"""What happens in a training step, on TRL's trainers: from a batch to the loss, the optimiser, and the logged figures.

Rows, their order and batches are in `data.py`, objectives in `method/objectives.py`. transformers runs
the loop: it takes the micro-batches of a step (`get_batch_samples`), goes forward and back through each
(`training_step`, `compute_loss`), lets the optimiser take its step, and logs (`log`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import datasets
import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import Trainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import use_adapter

from stic_ray.engines.sequences import labels_of
from stic_ray.engines.shared_prefix import model_inputs, sum_by_answer
from stic_ray.method.objectives import PairLogps, answer_logps, noisy_argmax_logps, regularised_dpo
from stic_ray.stages.training import models
from stic_ray.stages.training.data import IGNORED, REFERENCE_LOGPS, WEIGHT, Collator, ParquetRows
from stic_ray.stages.training.metrics import Speed

_COLUMNS = datasets.Dataset.from_list(
    [{"image": None, "prompt": None, "chosen": None, "rejected": None, "messages": None}]
)
"""What TRL looks at to see that the rows have images; it takes nothing but a dataset of `datasets`."""


class StepTrainer(Trainer):
    """What both trainers add to TRL's: rows in our order, a rate for the projector, and figures of each step."""

    def __init__(
        self, start: models.Start, rows: tuple[ParquetRows, ParquetRows], collator: Collator, **arguments: Any
    ) -> None:
        """Take the rows that are trained on and those held out, and TRL's arguments. A new adapter is of the seed."""
        self.config = start.config
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


def means(names: Sequence[str], sums: torch.Tensor) -> dict[str, float]:
    """Return the mean of each name, given the number of rows and the sum of each over them."""
    return dict(zip(names, (sums[1:] / sums[0]).tolist(), strict=True)) if sums[0] else {}


class LikelihoodTrainer(StepTrainer, SFTTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Maximises the likelihood of answers: the mean over their tokens, of all workers and micro-batches of a step."""

    def loss_of(self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any) -> torch.Tensor:
        """Return the summed negative log-probability, divided by the answers' tokens."""
        outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        num_rows = self.args.per_device_train_batch_size  # in evaluation, too
        with torch.no_grad():
            found = (outputs.label_mask, outputs.entropy, outputs.is_top1)
            # A blank picture's row stands behind the others (data.py), and not in every worker's batch.
            num_tokens, entropy, correct = (x.detach().float().sum(1)[:num_rows] for x in found)
            self.record(num_tokens, {"entropy": entropy, "mean_token_accuracy": correct})
        loss = -outputs.log_probs.sum()
        num_micro_batches = 1
        if num_items_in_batch is None:
            loss = loss / outputs.label_mask.sum().clamp(min=1)
        else:  # the tokens of all workers, over which the gradients are averaged
            loss = loss / torch.as_tensor(num_items_in_batch).clamp(min=1) * self.accelerator.num_processes
            num_micro_batches = self.current_gradient_accumulation_steps
        if self.aux_loss_enabled:  # of a mixture of experts: TRL's balance of their load
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / num_micro_batches
        return loss


class AnswerLogps(NamedTuple):
    """Log-probabilities of the answers of B pairs."""

    chosen: torch.Tensor
    """Summed over the answer; shape (B,)."""
    rejected: torch.Tensor
    by_token: torch.Tensor | None
    """Of the last K tokens of each sequence, 0 outside the answers; None where tokens were not scored as they are."""


class RegularisedDPOTrainer(StepTrainer, DPOTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Minimises `method.objectives.regularised_dpo` on batches of `SharedPrefixCollator` or `PreferenceCollator`."""

    def loss_of(self, model: Any, inputs: dict[str, torch.Tensor], num_items_in_batch: Any = None) -> torch.Tensor:
        """Return the mean over the pairs of a micro-batch, by their weights."""
        settings, weights = self.config.dpo, inputs.get(WEIGHT)
        policy = self.logps(model, inputs)
        with torch.no_grad():
            stored = [inputs[name] for name in REFERENCE_LOGPS if name in inputs]
            reference = AnswerLogps(stored[0], stored[1], None) if stored else self.reference_logps(inputs)
        logps = PairLogps(policy.chosen, policy.rejected, reference.chosen, reference.rejected)
        terms = regularised_dpo(logps, beta=settings.beta, alpha=settings.alpha, weights=weights)
        with torch.no_grad():
            margins = terms.chosen_rewards - terms.rejected_rewards
            values = {
                "loss/dpo": F.softplus(-margins),
                "loss/regulariser": -settings.alpha * policy.chosen,
                "rewards/chosen": terms.chosen_rewards,
                "rewards/rejected": terms.rejected_rewards,
                "rewards/margins": margins,
                "rewards/accuracies": (margins > 0).float(),
                "logps/chosen": policy.chosen,
                "logps/rejected": policy.rejected,
                **_drift(policy, reference, inputs),
            }
            counts = torch.ones_like(margins) if weights is None else (weights > 0).float()
            self.record(counts, {name: value * counts for name, value in values.items()})
        return terms.loss

    def logps(self, model: Any, inputs: dict[str, torch.Tensor]) -> AnswerLogps:
        """Return the log-probabilities of the answers under a model."""
        arguments = {
            name: value for name, value in inputs.items() if name not in ("completion_mask", WEIGHT, *REFERENCE_LOGPS)
        }
        is_shared = "segments" in inputs
        if is_shared or self.config.dpo.objective == "paper":
            if is_shared:
                labels = labels_of(arguments, IGNORED)
                arguments = model_inputs(arguments, cast(Any, self.accelerator.unwrap_model(model)).config)
            else:
                labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
            # TRL's fused head gives log-probabilities without holding the logits of all positions.
            outputs = model(**arguments, labels=labels, use_cache=False, fused_lm_head=True)
            return AnswerLogps(*_by_answer(outputs.log_probs, inputs), outputs.log_probs)
        logits_BTV = model(**arguments, use_cache=False).logits[:, :-1]
        labels_BT, mask_BT = inputs["input_ids"][:, 1:], inputs["completion_mask"][:, 1:]
        chosen_half, rejected_half = zip(*(x.chunk(2) for x in (logits_BTV, labels_BT, mask_BT)), strict=True)
        return AnswerLogps(answer_logps(*chosen_half), noisy_argmax_logps(*rejected_half), None)

    def reference_logps(self, inputs: dict[str, torch.Tensor]) -> AnswerLogps:
        """Return those under the model that training started from.

        It is a frozen model of its own where the policy is trained whole; else the policy with the frozen copy of
        the adapter that it started from, or without its new one.
        """
        if self.ref_model is not None:
            return self.logps(self.ref_model, inputs)
        policy = self.accelerator.unwrap_model(self.model)
        assert isinstance(policy, PeftModel), "without a reference model the policy must carry an adapter"
        with use_adapter(policy, models.REFERENCE if models.REFERENCE in policy.peft_config else None):
            return self.logps(self.model, inputs)


def _by_answer(values: torch.Tensor, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums over chosen and rejected answers, each of shape (B,), of a value per token, its last K tokens."""
    if "segments" in inputs:
        return sum_by_answer(values, inputs)
    mask_BT = inputs["completion_mask"][:, 1:]
    chosen, rejected = (values[:, -mask_BT.shape[1] :] * mask_BT).sum(1).chunk(2)
    return chosen, rejected


def _drift(policy: AnswerLogps, reference: AnswerLogps, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the answers' lengths in tokens and, where both models scored each token, how far the policy has gone.

    `kl` estimates KL(reference || policy) per token: e^d - 1 - d for d = log p(policy) - log p(reference), which is
    never negative (Schulman, "Approximating KL divergence", the third estimator), over the tokens of both answers.
    They are the reference's own, though to prompts that asked for more, or on other images.
    """
    known = policy.by_token if policy.by_token is not None else inputs["completion_mask"][:, 1:].float()
    lengths = _by_answer(torch.ones_like(known), inputs)
    drift = {"lengths/chosen": lengths[0], "lengths/rejected": lengths[1]}
    if policy.by_token is None or reference.by_token is None:
        return drift
    change = policy.by_token - reference.by_token
    chosen, rejected = _by_answer(change.expm1() - change, inputs)
    return {**drift, "kl": (chosen + rejected) / (lengths[0] + lengths[1])}
