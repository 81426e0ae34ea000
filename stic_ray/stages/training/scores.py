"""What a model says of a batch of pairs: log-probabilities of their answers, with each of the images.

Shapes: B pairs, K answers of each (the chosen one first), T tokens of a sequence.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stic_ray.core.training import DPOConfig
from stic_ray.engines.sequences import labels_of
from stic_ray.engines.shared_prefix import CHOSEN, model_inputs, sum_by_answer
from stic_ray.method.objectives import (
    ImageLogRatios,
    ObjectiveTerms,
    anchored_preference,
    answer_logps,
    conditional_preference,
    mean_over_rejected,
    noisy_argmax_logps,
    own_tokens_preference,
    symmetric_preference,
)
from stic_ray.stages.training.collators import IGNORED, NO_IMAGE, PLACES, REJECTED_IMAGE, Views
from stic_ray.stages.training.data import WEIGHT
from stic_ray.stages.training.index import REFERENCE_LOGPS

Inputs = dict[str, Any]
"""A batch of a PairCollator, or one of its views."""
_NOT_FOR_MODELS = frozenset(
    {"completion_mask", "is_answer", PLACES, WEIGHT, *REFERENCE_LOGPS, REJECTED_IMAGE, NO_IMAGE}
)


class AnswerLogps(NamedTuple):
    """Log-probabilities of the answers of B pairs with one of their images."""

    answers: Tensor
    """Summed over each answer, shape (B, K); 0 where a row has fewer answers."""
    by_token: Tensor | None = None
    """Of the last tokens of each sequence; None where tokens were not scored as they are."""
    own_tokens: Tensor | None = None
    """Of tokens in the place of the chosen answer's, shape (B,); None where they are not asked for."""


class Scores(NamedTuple):
    """Log-probabilities of B pairs with their own images, and in further views."""

    own_image: AnswerLogps
    views: dict[str, Tensor]
    """The answers that each view has, shape (B, answers)."""


def views_of(settings: DPOConfig) -> Views:
    """Return the views that the terms of a training need beside that of the pairs' own images."""
    if settings.symmetric_weight:
        return dict.fromkeys((REJECTED_IMAGE, NO_IMAGE), ("chosen", "rejected"))
    return {REJECTED_IMAGE: ("chosen",)} if settings.image_terms else {}


def score_pairs(
    model: Any,
    network: Any,
    inputs: Inputs,
    settings: DPOConfig,
    own: Tensor | None,
    stored: AnswerLogps | None = None,
) -> Scores:
    """Return what a model says of a batch.

    `network` is its configuration, `own` as in `score_answers`; with `stored` log-probabilities it is asked for the
    other views only.
    """
    if settings.objective == "released_code":
        return Scores(_released_code(model, inputs), {})
    scored = (REJECTED_IMAGE, NO_IMAGE) if settings.conditional_weight or settings.symmetric_weight else ()
    views = {name: score_answers(model, network, inputs[name]).answers for name in scored if name in inputs}
    return Scores(stored or score_answers(model, network, inputs, own), views)


def score_answers(model: Any, network: Any, inputs: Inputs, own: Tensor | None = None) -> AnswerLogps:
    """Return the log-probabilities of the answers of a view, and of `own` tokens in the place of the chosen ones'."""
    if own is not None:
        return _score_with_own_tokens(model, network, inputs, own)
    labels = labels_of({**inputs, "is_answer": _is_answer(inputs)}, IGNORED)
    # TRL's fused head gives log-probabilities without holding the logits of all positions.
    outputs = model(**_arguments(inputs, network), labels=labels, use_cache=False, fused_lm_head=True)
    return AnswerLogps(by_answer(outputs.log_probs, inputs), outputs.log_probs)


@torch.no_grad()
def likeliest_tokens(model: Any, network: Any, inputs: Inputs) -> Tensor:
    """Return the token that a model finds likeliest at each place of the chosen answers, row by row."""
    logits_BTV, is_chosen_BT = _logits(model, network, inputs)
    return logits_BTV[is_chosen_BT].argmax(-1)


def by_answer(values: Tensor, inputs: Inputs) -> Tensor:
    """Return the sums over each answer, shape (B, K), of a value per token, its last ones."""
    if "segments" in inputs:
        return sum_by_answer(values, inputs)
    mask_BT, (rows, numbers) = inputs["completion_mask"][:, 1:], inputs[PLACES].unbind(1)
    values = values[:, -mask_BT.shape[1] :]
    sums = (values * mask_BT[:, -values.shape[1] :]).sum(1)
    return sums.new_zeros(_num_rows(inputs), int(numbers.max()) + 1).index_put((rows, numbers), sums)


def image_terms(settings: DPOConfig, policy: Scores, reference: Scores) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the terms about images by their names in the settings, and what is logged of them; all of shape (B,)."""
    beta = settings.beta
    answers = policy.own_image.answers - reference.own_image.answers
    chosen, rejected = answers[:, 0], answers[:, 1]
    views = {name: value - reference.views[name] for name, value in policy.views.items()}
    terms, figures = {}, {}
    if settings.anchor_weight:
        terms["anchor"] = anchored_preference(chosen, beta=beta, delta=settings.anchor_delta)
    if settings.conditional_weight:
        terms["conditional"] = conditional_preference(chosen, views[REJECTED_IMAGE][:, 0], beta=beta)
    if settings.symmetric_weight:
        others = [*views[REJECTED_IMAGE].unbind(1), *views[NO_IMAGE].unbind(1)]
        terms["symmetric"] = symmetric_preference(ImageLogRatios(chosen, rejected, *others), beta=beta)
    if policy.own_image.own_tokens is not None and reference.own_image.own_tokens is not None:
        own = policy.own_image.own_tokens - reference.own_image.own_tokens
        terms["own_tokens"] = own_tokens_preference(chosen, own, beta=beta)
        figures["rewards/own_tokens"] = beta * own
    if REJECTED_IMAGE in views:
        reward = beta * views[REJECTED_IMAGE][:, 0]
        figures |= {"rewards/rejected_image": reward, "rewards/image_margins": beta * chosen - reward}
        figures["rewards/image_accuracies"] = (figures["rewards/image_margins"] > 0).float()
        figures["logps/rejected_image"] = policy.views[REJECTED_IMAGE][:, 0]
    return terms, {**{f"loss/{name}": term for name, term in terms.items()}, **figures}


def text_figures(
    settings: DPOConfig, terms: ObjectiveTerms, policy: AnswerLogps, is_there: Tensor
) -> dict[str, Tensor]:
    """Return what is logged of the preference between answers; all of shape (B,)."""

    def over_rejected(values: Tensor) -> Tensor:
        return mean_over_rejected(values, is_there)

    return {
        "loss/dpo": over_rejected(F.softplus(-terms.margins)),
        "loss/regulariser": -settings.alpha * policy.answers[:, 0],
        "rewards/chosen": terms.chosen_rewards,
        "rewards/rejected": terms.rejected_rewards,
        "rewards/margins": over_rejected(terms.margins),
        "rewards/accuracies": over_rejected((terms.margins > 0).float()),
        "logps/chosen": policy.answers[:, 0],
        "logps/rejected": over_rejected(policy.answers[:, 1:]),
    }


def drift(policy: AnswerLogps, reference: AnswerLogps, inputs: Inputs, lengths: Tensor) -> dict[str, Tensor]:
    """Return where both models scored each token how far the policy has gone, given the answers' lengths (B, K).

    `kl` estimates KL(reference || policy) per token: e^d - 1 - d for d = log p(policy) - log p(reference), which is
    never negative (Schulman, "Approximating KL divergence", the third estimator), over the tokens of all answers.
    They are the reference's own, though to prompts that asked for more, or on other images.
    """
    if policy.by_token is None or reference.by_token is None:
        return {}
    change = policy.by_token - reference.by_token
    return {"kl": by_answer(change.expm1() - change, inputs).sum(1) / lengths.sum(1)}


def lengths_of(inputs: Inputs) -> Tensor:
    """Return how many tokens each answer has, shape (B, K); 0 where a row has fewer answers."""
    return by_answer(_is_answer(inputs)[:, 1:].float(), inputs)


def _score_with_own_tokens(model: Any, network: Any, inputs: Inputs, own: Tensor) -> AnswerLogps:
    logits_BTV, is_chosen_BT = _logits(model, network, inputs)
    logps_BTV = logits_BTV.float().log_softmax(-1)
    tokens_BT = inputs["input_ids"][:, -logits_BTV.shape[1] :]
    by_token, by_own = (
        logps_BTV.gather(2, tokens.unsqueeze(2)).squeeze(2)
        for tokens in (tokens_BT, tokens_BT.masked_scatter(is_chosen_BT, own))
    )
    own_tokens = (by_own * is_chosen_BT).sum(1)[: _num_rows(inputs)]  # chosen answers are in the first sequences
    return AnswerLogps(by_answer(by_token, inputs), by_token, own_tokens)


def _logits(model: Any, network: Any, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Return the logits of the last T' tokens, which all answers are in, and which of them are of chosen answers."""
    is_answer = _is_answer(inputs)
    first = int(is_answer.any(0).nonzero()[0])
    num_kept = is_answer.shape[1] - first + 1
    outputs = model(**_arguments(inputs, network), use_cache=False, logits_to_keep=num_kept)
    if "segments" in inputs:
        is_chosen = is_answer & (inputs["segments"] == CHOSEN)
    else:
        is_chosen = is_answer & (inputs[PLACES][:, 1:] == 0)
    return outputs.logits[:, :-1], is_chosen[:, first:]


def _released_code(model: Any, inputs: Inputs) -> AnswerLogps:
    logits_BTV = model(**_arguments(inputs, None), use_cache=False).logits[:, :-1]
    labels_BT, mask_BT = inputs["input_ids"][:, 1:], inputs["completion_mask"][:, 1:]
    chosen, rejected = zip(*(x.chunk(2) for x in (logits_BTV, labels_BT, mask_BT)), strict=True)
    return AnswerLogps(torch.stack([answer_logps(*chosen), noisy_argmax_logps(*rejected)], 1))


def _arguments(inputs: Inputs, network: Any) -> Inputs:
    """Return what the model's forward takes."""
    arguments = {name: value for name, value in inputs.items() if name not in _NOT_FOR_MODELS}
    return model_inputs(arguments, network) if "segments" in inputs else arguments


def _is_answer(inputs: Inputs) -> Tensor:
    return inputs["is_answer"] if "segments" in inputs else inputs["completion_mask"] != 0


def _num_rows(inputs: Inputs) -> int:
    return len(inputs["segments"]) if "segments" in inputs else int(inputs[PLACES][:, 0].max()) + 1
