"""STIC's training objective, by the paper and by the released code, as functions of log-probabilities.

Shapes: B pairs, T target positions, V vocabulary. All log-probabilities are natural and summed over the answer's
tokens unless the name says `_BT`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class PairLogps(NamedTuple):
    """Summed log-probabilities of both answers under policy and reference; each of shape (B,)."""

    policy_chosen: torch.Tensor
    policy_rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor


class ObjectiveTerms(NamedTuple):
    """The loss to minimise and its parts, means over pairs; `loss` is dpo + regulariser. Rewards have shape (B,)."""

    loss: torch.Tensor
    dpo: torch.Tensor
    regulariser: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor


def regularised_dpo(
    logps: PairLogps, *, beta: float, alpha: float, weights: torch.Tensor | None = None
) -> ObjectiveTerms:
    """Return the mean over pairs of l(beta * margin) - alpha * log p(chosen), l(t) = log(1 + exp(-t)).

    STIC Algorithm 1. With the policy equal to the reference the margin is 0 and the DPO part is ln 2. The
    regulariser is a sum over the answer's tokens, not a mean: longer answers weigh more. `weights`, of shape (B,),
    multiply the pairs before the mean over all B.
    """
    weights = torch.ones_like(logps.policy_chosen) if weights is None else weights
    chosen_rewards = beta * (logps.policy_chosen - logps.reference_chosen)
    rejected_rewards = beta * (logps.policy_rejected - logps.reference_rejected)
    dpo = -(weights * F.logsigmoid(chosen_rewards - rejected_rewards)).mean()
    regulariser = -alpha * (weights * logps.policy_chosen).mean()
    return ObjectiveTerms(dpo + regulariser, dpo, regulariser, chosen_rewards.detach(), rejected_rewards.detach())


def answer_logps(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Return log p of the labels, summed over the masked positions; shape (B,). Logits are already shifted."""
    logps_BTV = torch.log_softmax(logits_BTV.float(), dim=-1)
    logps_BT = logps_BTV.gather(-1, labels_BT.unsqueeze(-1)).squeeze(-1)
    return (logps_BT * mask_BT).sum(-1)


def noisy_argmax_logps(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    """Return the rejected term of STIC's released code; shape (B,).

    At each answer position it scores the model's own most likely token other than the label, so the rejected
    text itself is never pushed down. Policy and reference each choose their own token. Kept for comparison with
    published runs; the paper's formula has log p of the rejected answer here.
    """
    others_BTV = logits_BTV.detach().scatter(-1, labels_BT.unsqueeze(-1), float("-inf"))
    return answer_logps(logits_BTV, others_BTV.argmax(-1), mask_BT)
