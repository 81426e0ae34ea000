"""STIC's training objective, by the paper and by the released code, and terms about images that may be added to it.

Shapes: B pairs, R rejected answers of each, T target positions, V vocabulary. All log-probabilities are natural and
summed over the answer's tokens unless the name says `_BT`. A log-ratio is log p of the policy minus that of the
reference, of the same answer to the same prompt and image.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class PairLogps(NamedTuple):
    """Summed log-probabilities of the answers under policy and reference: (B,), or (B, R) of several rejected ones."""

    policy_chosen: torch.Tensor
    policy_rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    is_there: torch.Tensor | None = None
    """Which of the R rejected answers a row has, shape (B, R); all of them when None."""


class ObjectiveTerms(NamedTuple):
    """The loss to minimise and its parts, means over pairs; `loss` is dpo + regulariser.

    Rewards have shape (B,); of several rejected answers it is the mean of theirs.
    """

    loss: torch.Tensor
    dpo: torch.Tensor
    regulariser: torch.Tensor
    chosen_rewards: torch.Tensor
    rejected_rewards: torch.Tensor
    margins: torch.Tensor
    """Chosen minus rejected reward of each rejected answer, shape (B, R)."""


class ImageLogRatios(NamedTuple):
    """Log-ratios of both answers given the pair's own image, its rejected image, and no image; each of shape (B,)."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_on_rejected_image: torch.Tensor
    rejected_on_rejected_image: torch.Tensor
    chosen_without_image: torch.Tensor
    rejected_without_image: torch.Tensor


def regularised_dpo(
    logps: PairLogps, *, beta: float, alpha: float, weights: torch.Tensor | None = None
) -> ObjectiveTerms:
    """Return the mean over pairs of l(beta * margin) - alpha * log p(chosen), l(t) = log(1 + exp(-t)).

    STIC Algorithm 1. With the policy equal to the reference the margin is 0 and the DPO part is ln 2. The
    regulariser is a sum over the answer's tokens, not a mean: longer answers weigh more. `weights`, of shape (B,),
    multiply the pairs before the mean over all B. Of several rejected answers a pair has the mean of l over them.
    """
    weights = torch.ones_like(logps.policy_chosen) if weights is None else weights
    chosen_rewards = beta * (logps.policy_chosen - logps.reference_chosen)
    rejected_rewards = (beta * (logps.policy_rejected - logps.reference_rejected)).reshape(len(weights), -1)
    margins = chosen_rewards.unsqueeze(1) - rejected_rewards
    dpo = (weights * mean_over_rejected(preference(margins), logps.is_there)).mean()
    regulariser = -alpha * (weights * logps.policy_chosen).mean()
    rejected_rewards = mean_over_rejected(rejected_rewards, logps.is_there)
    record = (value.detach() for value in (chosen_rewards, rejected_rewards, margins))
    return ObjectiveTerms(dpo + regulariser, dpo, regulariser, *record)


def preference(margins: torch.Tensor) -> torch.Tensor:
    """Return -log sigma(margin) of each: Bradley and Terry's loss where the better side has that much more reward."""
    return -F.logsigmoid(margins)


def mean_over_rejected(values: torch.Tensor, is_there: torch.Tensor | None) -> torch.Tensor:
    """Return the mean over the R rejected answers that each row has, shape (B,)."""
    if is_there is None:
        return values.mean(1)
    return (values * is_there).sum(1) / is_there.sum(1)


def conditional_preference(chosen: torch.Tensor, on_rejected_image: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Return -log sigma(beta * (r(image) - r(rejected image))), r the log-ratio of the chosen answer; shape (B,).

    mDPO (arXiv:2406.11839), conditional preference optimisation: the answer is the same, so that only the picture can
    make the difference.
    """
    return preference(beta * (chosen - on_rejected_image))


def anchored_preference(chosen: torch.Tensor, *, beta: float, delta: float) -> torch.Tensor:
    """Return -log sigma(beta * r - delta), r the log-ratio of the chosen answer; shape (B,).

    mDPO (arXiv:2406.11839), anchored preference optimisation: the reward of the chosen answer itself is to be above
    `delta`, where a difference of rewards grows while both fall.
    """
    return preference(beta * chosen - delta)


def symmetric_preference(ratios: ImageLogRatios, *, beta: float) -> torch.Tensor:
    """Return the sum of S-VCO's four terms (arXiv:2502.13928), shape (B,).

    The chosen answer is true of the image, the rejected one of the rejected image. Each is to be likelier with the
    image that it is true of than without any (attend), and likelier without any than with the other (reject).
    """
    margins = (
        ratios.chosen - ratios.chosen_without_image,
        ratios.chosen_without_image - ratios.chosen_on_rejected_image,
        ratios.rejected_on_rejected_image - ratios.rejected_without_image,
        ratios.rejected_without_image - ratios.rejected,
    )
    return preference(beta * torch.stack(margins)).sum(0)


def own_tokens_preference(chosen: torch.Tensor, own_tokens: torch.Tensor, *, beta: float) -> torch.Tensor:
    """Return -log sigma(beta * (r(chosen) - r(own tokens))) with log-ratios given the clean image; shape (B,).

    POVID's second stage (arXiv:2402.11411). The own tokens are those that the policy finds likeliest at each position
    of the chosen answer when it sees the noised image. Policy and reference score the same ones: where they are those
    of the answer, nothing is pushed.
    """
    return preference(beta * (chosen - own_tokens))


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


def image_token_weights(text_logps: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return the weights (1 - p)^alpha of an answer's tokens, with mean 1; both of shape (T,).

    p is the probability that a model without the image gives each token: what it cannot guess is more likely about the
    image (PRIOR, arXiv 2505.08971, importance score and re-weighted loss). All tokens weigh 1 where it is sure of all.
    """
    weights = (-torch.expm1(text_logps.clamp(max=0.0))) ** alpha
    total = weights.sum()
    return weights * len(weights) / total if total > 0 else torch.ones_like(weights)
