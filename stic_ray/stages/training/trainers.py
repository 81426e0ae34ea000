"""TRL's trainers: DPO with STIC's objective, and likelihood."""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from stic_ray.core.config import DPOConfig
from stic_ray.engines.sequences import labels_of
from stic_ray.engines.shared_prefix import model_inputs, sum_by_answer
from stic_ray.method.objectives import (
    ObjectiveTerms,
    PairLogps,
    answer_logps,
    noisy_argmax_logps,
    regularised_dpo,
)
from stic_ray.stages.training.batches import IGNORED, REFERENCE_LOGPS, WEIGHT
from stic_ray.stages.training.measured import MeasuredTrainer
from stic_ray.stages.training.tuning import PartTrainer


class AnswerLogps(NamedTuple):
    """Log-probabilities of the answers of B pairs."""

    chosen: torch.Tensor
    """Summed over the answer; shape (B,)."""
    rejected: torch.Tensor
    by_token: torch.Tensor | None
    """Of the last K tokens of each sequence, 0 outside the answers; None where tokens were not scored as they are."""


class LikelihoodTrainer(PartTrainer, MeasuredTrainer, SFTTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """TRL's trainer of likelihood."""


class RegularisedDPOTrainer(PartTrainer, MeasuredTrainer, DPOTrainer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Minimises `method.objectives.regularised_dpo`; data, reference model and bookkeeping are TRL's.

    Batches are `SharedPrefixCollator`'s, or TRL's: the B chosen sequences first and the B rejected ones behind them.
    """

    def __init__(self, *arguments: Any, settings: DPOConfig, **keywords: Any) -> None:
        """Take TRL's arguments, and the objective's settings."""
        super().__init__(*arguments, **keywords)
        self.settings = settings

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool) -> torch.Tensor:
        assert not return_outputs, "evaluation asks for the loss only"
        weights = inputs.pop(WEIGHT, None)
        stored = [inputs.pop(name) for name in REFERENCE_LOGPS if name in inputs]
        policy = self._logps(model, inputs)
        with torch.no_grad():
            reference = AnswerLogps(stored[0], stored[1], None) if stored else self._reference_logps(inputs)
        logps = PairLogps(policy.chosen, policy.rejected, reference.chosen, reference.rejected)
        terms = regularised_dpo(logps, beta=self.settings.beta, alpha=self.settings.alpha, weights=weights)
        with torch.no_grad():
            weights = torch.ones_like(policy.chosen) if weights is None else weights
            self._record(weights, {**self._metrics_of(logps, terms), **_drift(policy, reference, inputs)})
        return terms.loss

    def _logps(self, model: Any, inputs: dict[str, torch.Tensor]) -> AnswerLogps:
        inputs = {name: value for name, value in inputs.items() if name not in (WEIGHT, *REFERENCE_LOGPS)}
        if "segments" in inputs:
            config = cast(Any, self.accelerator.unwrap_model(model)).config
            arguments = model_inputs(inputs, config)
            outputs = model(**arguments, labels=labels_of(inputs, IGNORED), use_cache=False, fused_lm_head=True)
            return AnswerLogps(*_by_answer(outputs.log_probs, inputs), outputs.log_probs)
        arguments = {name: value for name, value in inputs.items() if name != "completion_mask"}
        mask_BT = inputs["completion_mask"][:, 1:]
        if self.settings.objective == "paper":
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
            # TRL's fused head gives log-probabilities without holding the logits of all positions.
            outputs = model(**arguments, labels=labels, use_cache=False, fused_lm_head=True)
            return AnswerLogps(*_by_answer(outputs.log_probs, inputs), outputs.log_probs)
        logits_BTV = model(**arguments, use_cache=False).logits[:, :-1]
        labels_BT = inputs["input_ids"][:, 1:]
        chosen_half, rejected_half = zip(*(x.chunk(2) for x in (logits_BTV, labels_BT, mask_BT)), strict=True)
        return AnswerLogps(answer_logps(*chosen_half), noisy_argmax_logps(*rejected_half), None)

    def _reference_logps(self, inputs: dict[str, torch.Tensor]) -> AnswerLogps:
        """The reference is the base model: the policy without its adapter, or TRL's frozen copy."""
        if self.ref_model is not None:
            return self._logps(self.ref_model, inputs)
        policy = self.accelerator.unwrap_model(self.model)
        assert isinstance(policy, PeftModel), "without a reference model the policy must carry an adapter"
        with policy.disable_adapter():
            return self._logps(self.model, inputs)

    def _metrics_of(self, logps: PairLogps, terms: ObjectiveTerms) -> dict[str, torch.Tensor]:
        margins = terms.chosen_rewards - terms.rejected_rewards
        return {
            "loss/dpo": F.softplus(-margins),
            "loss/regulariser": -self.settings.alpha * logps.policy_chosen,
            "rewards/chosen": terms.chosen_rewards,
            "rewards/rejected": terms.rejected_rewards,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0).float(),
            "logps/chosen": logps.policy_chosen,
            "logps/rejected": logps.policy_rejected,
        }

    def _record(self, weights: torch.Tensor, values: dict[str, torch.Tensor]) -> None:
        """Keep the values of all workers' pairs, each of shape (B,), for the mean that TRL logs."""
        own = torch.stack([weights, *values.values()], dim=1).float()
        every = cast(torch.Tensor, self.accelerator.gather_for_metrics(own))
        metrics = self._metrics["train" if cast(nn.Module, self.model).training else "eval"]
        for name, column in zip(values, every[every[:, 0] > 0].T[1:].tolist(), strict=True):
            metrics[name] += column


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
