"""TRL's trainers: DPO with STIC's objective, and likelihood."""

from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from stic_ray.core.config import DPOConfig
from stic_ray.engines.shared_prefix import labels_of, model_inputs, sum_by_answer
from stic_ray.method.objectives import (
    ObjectiveTerms,
    PairLogps,
    answer_logps,
    noisy_argmax_logps,
    regularised_dpo,
)
from stic_ray.stages.training.batches import IGNORED, REFERENCE_LOGPS
from stic_ray.stages.training.tuning import PartTrainer


class LikelihoodTrainer(PartTrainer, SFTTrainer):
    """TRL's trainer of likelihood."""


class RegularisedDPOTrainer(PartTrainer, DPOTrainer):
    """Minimises `method.objectives.regularised_dpo`; data, reference model and bookkeeping are TRL's.

    Batches are `SharedPrefixCollator`'s, or TRL's: the B chosen sequences first and the B rejected ones behind them.
    """

    def __init__(self, *arguments: Any, settings: DPOConfig, **keywords: Any) -> None:
        """Take TRL's arguments, and the objective's settings."""
        super().__init__(*arguments, **keywords)
        self.settings = settings

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = self._signature_columns or []
        self._signature_columns = [*columns, *(name for name in REFERENCE_LOGPS if name not in columns)]

    def _compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool) -> torch.Tensor:
        assert not return_outputs, "evaluation asks for the loss only"
        stored = [inputs.pop(name) for name in REFERENCE_LOGPS if name in inputs]
        policy_chosen, policy_rejected = self._logps(model, inputs)
        with torch.no_grad():
            reference_chosen, reference_rejected = stored or self._reference_logps(inputs)
        logps = PairLogps(policy_chosen, policy_rejected, reference_chosen, reference_rejected)
        terms = regularised_dpo(logps, beta=self.settings.beta, alpha=self.settings.alpha)
        self._record(logps, terms)
        return terms.loss

    def _logps(self, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the summed log-probabilities of chosen and rejected answers, each of shape (B,)."""
        if "segments" in inputs:
            config = cast(Any, self.accelerator.unwrap_model(model)).config
            arguments = model_inputs(inputs, config)
            outputs = model(**arguments, labels=labels_of(inputs, IGNORED), use_cache=False, fused_lm_head=True)
            return sum_by_answer(outputs.log_probs, inputs)
        arguments = {name: value for name, value in inputs.items() if name != "completion_mask"}
        mask_BT = inputs["completion_mask"][:, 1:]
        if self.settings.objective == "paper":
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED)
            # TRL's fused head gives log-probabilities without holding the logits of all positions.
            outputs = model(**arguments, labels=labels, use_cache=False, fused_lm_head=True)
            chosen, rejected = outputs.log_probs[:, -mask_BT.shape[1] :].sum(1).chunk(2)
            return chosen, rejected
        logits_BTV = model(**arguments, use_cache=False).logits[:, :-1]
        labels_BT = inputs["input_ids"][:, 1:]
        chosen_half, rejected_half = zip(*(x.chunk(2) for x in (logits_BTV, labels_BT, mask_BT)), strict=True)
        return answer_logps(*chosen_half), noisy_argmax_logps(*rejected_half)

    def _reference_logps(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference is the base model: the policy without its adapter, or TRL's frozen copy."""
        if self.ref_model is not None:
            return self._logps(self.ref_model, inputs)
        policy = self.accelerator.unwrap_model(self.model)
        assert isinstance(policy, PeftModel), "without a reference model the policy must carry an adapter"
        with policy.disable_adapter():
            return self._logps(self.model, inputs)

    def _record(self, logps: PairLogps, terms: ObjectiveTerms) -> None:
        values = {
            "loss/dpo": terms.dpo,
            "loss/regulariser": terms.regulariser,
            "rewards/chosen": terms.chosen_rewards,
            "rewards/rejected": terms.rejected_rewards,
            "rewards/margins": terms.chosen_rewards - terms.rejected_rewards,
            "rewards/accuracies": (terms.chosen_rewards > terms.rejected_rewards).float(),
            "logps/chosen": logps.policy_chosen,
            "logps/rejected": logps.policy_rejected,
        }
        metrics = self._metrics["train" if cast(nn.Module, self.model).training else "eval"]
        for name, value in values.items():
            gathered = cast(torch.Tensor, self.accelerator.gather(value.detach().float()))
            metrics[name].append(gathered.mean().item())
