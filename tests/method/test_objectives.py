"""STIC's objective against values worked by hand."""

import math

import pytest
import torch

from stic_ray.method.objectives import (
    ImageLogRatios,
    ObjectiveTerms,
    PairLogps,
    anchored_preference,
    answer_logps,
    conditional_preference,
    image_token_weights,
    noisy_argmax_logps,
    own_tokens_preference,
    regularised_dpo,
    symmetric_preference,
)

LN2 = math.log(2)
PROBABILITIES = (0.5, 0.25, 0.125, 0.125)
"""Of a vocabulary of four tokens; their logarithms are -1, -2, -3 and -3 times ln 2."""


def logps(
    policy_chosen: list[float],
    policy_rejected: list[float],
    reference_chosen: list[float],
    reference_rejected: list[float],
    *,
    requires_grad: bool = False,
) -> PairLogps:
    policy = [torch.tensor(values, requires_grad=requires_grad) for values in (policy_chosen, policy_rejected)]
    return PairLogps(*policy, torch.tensor(reference_chosen), torch.tensor(reference_rejected))


def logits(num_rows: int, num_positions: int) -> torch.Tensor:
    """The same distribution at every position, not normalised: log-softmax must take the shift away."""
    return (torch.tensor(PROBABILITIES).log() + 5.0).expand(num_rows, num_positions, 4).clone()


def test_one_pair() -> None:
    """beta 0.5: rewards 0.5 * (-10 + 11) = 0.5 and 0.5 * (-12 + 11) = -0.5, margin 1.

    dpo = ln(1 + e^-1) = 0.313262; regulariser = -0.01 * -10 = 0.1; loss = 0.413262.
    """
    terms = regularised_dpo(logps([-10.0], [-12.0], [-11.0], [-11.0]), beta=0.5, alpha=0.01)
    assert terms.dpo.item() == pytest.approx(0.313262, abs=1e-6)
    assert terms.regulariser.item() == pytest.approx(0.1)
    assert terms.loss.item() == pytest.approx(0.413262, abs=1e-6)
    assert terms.chosen_rewards.tolist() == pytest.approx([0.5])
    assert terms.rejected_rewards.tolist() == pytest.approx([-0.5])


def test_two_pairs_are_averaged() -> None:
    """Margins 1 and -2 at beta 1: (ln(1 + e^-1) + ln(1 + e^2)) / 2 = (0.313262 + 2.126928) / 2 = 1.220095.

    Regulariser: 0.1 * (3 + 5) / 2 = 0.4.
    """
    terms = regularised_dpo(logps([-3.0, -5.0], [-4.0, -4.0], [-3.0, -4.0], [-3.0, -5.0]), beta=1.0, alpha=0.1)
    assert terms.dpo.item() == pytest.approx(1.220095, abs=1e-6)
    assert terms.regulariser.item() == pytest.approx(0.4)
    assert terms.loss.item() == pytest.approx(1.620095, abs=1e-6)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_a_policy_equal_to_the_reference_has_a_dpo_part_of_ln_2(beta: float) -> None:
    terms = regularised_dpo(logps([-7.0, -90.0], [-3.0, -1.0], [-7.0, -90.0], [-3.0, -1.0]), beta=beta, alpha=0.0)
    assert terms.dpo.item() == pytest.approx(LN2)
    assert terms.chosen_rewards.tolist() == terms.rejected_rewards.tolist() == [0.0, 0.0]


def test_without_alpha_there_is_no_regulariser() -> None:
    terms = regularised_dpo(logps([-10.0], [-12.0], [-11.0], [-11.0]), beta=0.5, alpha=0.0)
    assert terms.regulariser.item() == 0.0
    assert terms.loss.item() == terms.dpo.item()


def test_the_gradients_push_the_chosen_up_and_the_rejected_down() -> None:
    """At margin 0 the derivative of l is -1/2: -beta/2 - alpha = -0.06 and +beta/2 = 0.05, halved over two pairs.

    Adding to a log-probability whose gradient is negative lowers the loss.
    """
    given = logps([-7.0, -8.0], [-3.0, -2.0], [-7.0, -8.0], [-3.0, -2.0], requires_grad=True)
    regularised_dpo(given, beta=0.1, alpha=0.01).loss.backward()
    assert given.policy_chosen.grad is not None and given.policy_rejected.grad is not None
    assert given.policy_chosen.grad.tolist() == pytest.approx([-0.03, -0.03])
    assert given.policy_rejected.grad.tolist() == pytest.approx([0.025, 0.025])


def test_rewards_are_for_the_record_and_carry_no_gradient() -> None:
    given = logps([-7.0], [-3.0], [-7.0], [-3.0], requires_grad=True)
    terms = regularised_dpo(given, beta=0.1, alpha=0.01)
    assert not terms.chosen_rewards.requires_grad
    assert not terms.rejected_rewards.requires_grad


@pytest.mark.parametrize(("margin", "expected"), [(1e4, 0.0), (-1e4, 1e4)])
def test_extreme_margins_stay_finite(margin: float, expected: float) -> None:
    """l(t) is 0 for large t and -t for large negative t; a naive log(1 + exp(-t)) overflows."""
    terms = regularised_dpo(logps([margin], [0.0], [0.0], [0.0]), beta=1.0, alpha=0.0)
    assert terms.loss.item() == pytest.approx(expected)


def test_the_logp_of_an_answer_is_the_sum_over_its_tokens() -> None:
    """Labels 0, 1, 3 of which the first is masked: ln 0.25 + ln 0.125 = -5 ln 2. Second row: ln 0.5 = -ln 2."""
    labels = torch.tensor([[0, 1, 3], [0, 1, 2]])
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]])
    found = answer_logps(logits(2, 3), labels, mask)
    assert found.tolist() == pytest.approx([-5 * LN2, -LN2], rel=1e-6)


def test_masked_positions_do_not_matter() -> None:
    labels, mask = torch.tensor([[0, 1, 3]]), torch.tensor([[0, 1, 1]])
    other = logits(1, 3)
    other[:, 0] = torch.tensor([9.0, -9.0, 3.0, 0.0])
    changed = labels.clone()
    changed[:, 0] = 2
    assert answer_logps(other, changed, mask).equal(answer_logps(logits(1, 3), labels, mask))
    assert noisy_argmax_logps(other, changed, mask).equal(noisy_argmax_logps(logits(1, 3), labels, mask))


def test_the_noisy_argmax_takes_the_models_best_token_other_than_the_label() -> None:
    """Labels 0, 2, 3: the best other tokens are 1, 0 and 0, together ln 0.25 + 2 ln 0.5 = -4 ln 2.

    With the last position masked: -3 ln 2. The labels themselves would give -(1 + 3 + 3) ln 2.
    """
    labels = torch.tensor([[0, 2, 3], [0, 2, 3]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    assert noisy_argmax_logps(logits(2, 3), labels, mask).tolist() == pytest.approx([-4 * LN2, -3 * LN2], rel=1e-6)
    assert answer_logps(logits(2, 3), labels, mask).tolist() == pytest.approx([-7 * LN2, -4 * LN2], rel=1e-6)


def test_the_noisy_argmax_pushes_on_the_token_that_it_scores() -> None:
    """Label 0, so token 1 is scored: its logit has gradient 1 - 0.25, the others minus their probability."""
    given = logits(1, 1).requires_grad_()
    noisy_argmax_logps(given, torch.tensor([[0]]), torch.tensor([[1]])).sum().backward()
    assert given.grad is not None
    assert given.grad[0, 0].tolist() == pytest.approx([-0.5, 0.75, -0.125, -0.125], rel=1e-5)


def released_code(policy_logits: torch.Tensor, reference_logits: torch.Tensor) -> ObjectiveTerms:
    """One pair of two-token answers: chosen [0, 1], rejected [0, 2]."""
    chosen, rejected, mask = torch.tensor([[0, 1]]), torch.tensor([[0, 2]]), torch.ones(1, 2)
    return regularised_dpo(
        PairLogps(
            answer_logps(policy_logits, chosen, mask),
            noisy_argmax_logps(policy_logits, rejected, mask),
            answer_logps(reference_logits, chosen, mask),
            noisy_argmax_logps(reference_logits, rejected, mask),
        ),
        beta=0.1,
        alpha=1 / 1024,
    )


def test_the_objective_of_the_released_code() -> None:
    """Policy (1/2, 1/4, 1/8, 1/8), reference (1/8, 1/8, 1/2, 1/4), at both positions.

    Chosen 0, 1: policy -3 ln 2, reference -6 ln 2. Rejected 0, 2: the policy scores tokens 1 and 0, -3 ln 2; the
    reference its own choice, 2 and 3, -3 ln 2. Rewards 0.3 ln 2 and 0, so dpo = ln(1 + 2^-0.3) = 0.594611;
    regulariser = 3 ln 2 / 1024 = 0.002031. With log p of the rejected text itself (policy -4, reference -4 ln 2)
    the loss would be the same here, so the next test separates the two.
    """
    reference = torch.tensor([0.125, 0.125, 0.5, 0.25]).log().expand(1, 2, 4)
    terms = released_code(logits(1, 2), reference)
    assert terms.dpo.item() == pytest.approx(math.log(1 + 2**-0.3), rel=1e-5)
    assert terms.regulariser.item() == pytest.approx(3 * LN2 / 1024, rel=1e-5)
    assert terms.loss.item() == pytest.approx(math.log(1 + 2**-0.3) + 3 * LN2 / 1024, rel=1e-5)


def test_the_released_code_differs_from_the_paper() -> None:
    """Reference uniform: chosen -4 ln 2. Released: its rejected term is -4 ln 2 too, the policy's -3 ln 2.

    Rewards 0.1 ln 2 and 0.1 ln 2: margin 0, dpo = ln 2. The paper: policy log p(0, 2) = -4 ln 2 like the
    reference's, so the margin is 0.1 ln 2 and dpo = ln(1 + 2^-0.1).
    """
    uniform = torch.zeros(1, 2, 4)
    assert released_code(logits(1, 2), uniform).dpo.item() == pytest.approx(LN2, rel=1e-5)
    chosen, rejected, mask = torch.tensor([[0, 1]]), torch.tensor([[0, 2]]), torch.ones(1, 2)
    paper = PairLogps(
        *(answer_logps(of, answer, mask) for of in (logits(1, 2), uniform) for answer in (chosen, rejected))
    )
    terms = regularised_dpo(paper, beta=0.1, alpha=0.0)
    assert terms.dpo.item() == pytest.approx(math.log(1 + 2**-0.1), rel=1e-5)


@pytest.mark.parametrize("score", [answer_logps, noisy_argmax_logps], ids=["paper", "released_code"])
def test_a_policy_equal_to_the_reference_gives_ln_2_from_logits(score: object) -> None:
    """Both answers scored by the same model twice: every reward is 0."""
    assert callable(score)
    torch.manual_seed(0)
    model, labels, mask = torch.randn(3, 5, 4), torch.randint(4, (3, 5)), torch.ones(3, 5)
    chosen, rejected = answer_logps(model, labels, mask), score(model, labels.flip(0), mask)
    terms = regularised_dpo(PairLogps(chosen, rejected, chosen, rejected), beta=0.1, alpha=0.0)
    assert terms.loss.item() == pytest.approx(LN2)


def test_the_regulariser_is_a_sum_over_tokens() -> None:
    """Under uniform probabilities 3 tokens cost 3 ln 4 and 6 cost 6 ln 4: a mean would not tell them apart."""

    def regulariser(num_tokens: int) -> float:
        chosen = answer_logps(
            torch.zeros(1, num_tokens, 4), torch.zeros(1, num_tokens).long(), torch.ones(1, num_tokens)
        )
        return regularised_dpo(PairLogps(chosen, chosen, chosen, chosen), beta=0.1, alpha=0.5).regulariser.item()

    assert regulariser(3) == pytest.approx(0.5 * 3 * math.log(4))
    assert regulariser(6) == pytest.approx(2 * regulariser(3))


def test_half_precision_logits_are_summed_in_full_precision() -> None:
    """4,096 tokens of 1 - ln(e + 3) = -0.743668 each; bfloat16 keeps three digits, and stops counting at 256."""
    model = torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(1, 4096, 4).bfloat16()
    found = answer_logps(model, torch.zeros(1, 4096).long(), torch.ones(1, 4096))
    assert found.dtype is torch.float32
    assert found.item() == pytest.approx(4096 * (1 - math.log(math.e + 3)), rel=1e-5)


def test_several_rejected_answers_are_averaged_over_those_that_are_there() -> None:
    """beta 1, rewards of the chosen 0 and 1; of the rejected (-1, 2) and (1, none): margins 1, -2 and 0.

    The first row: (ln(1 + e^-1) + ln(1 + e^2)) / 2 = (0.313262 + 2.126928) / 2 = 1.220095, the second ln 2. Their mean
    is 0.956621; with weights 2 and 0 it is 1.220095.
    """
    given = PairLogps(
        torch.tensor([-3.0, -4.0]),
        torch.tensor([[-4.0, -1.0], [-2.0, 0.0]]),
        torch.tensor([-3.0, -5.0]),
        torch.tensor([[-3.0, -3.0], [-3.0, 0.0]]),
        torch.tensor([[True, True], [True, False]]),
    )
    terms = regularised_dpo(given, beta=1.0, alpha=0.0)
    assert terms.dpo.item() == pytest.approx(0.956621, abs=1e-6)
    assert terms.rejected_rewards.tolist() == pytest.approx([0.5, 1.0])
    assert terms.margins.tolist() == [[1.0, -2.0], [0.0, 1.0]]
    weighted = regularised_dpo(given, beta=1.0, alpha=0.0, weights=torch.tensor([2.0, 0.0]))
    assert weighted.dpo.item() == pytest.approx(1.220095, abs=1e-6)


def test_mdpos_terms() -> None:
    """beta 0.5: ln(1 + e^-(0.5 * (2 + 2))) = ln(1 + e^-2) = 0.126928; the anchor ln(1 + e^-(0.5 * 2 - 0.5)) = 0.474077.

    With log-ratios of 0 both are ln 2 where delta is 0.
    """
    chosen, other, zero = torch.tensor([2.0]), torch.tensor([-2.0]), torch.zeros(1)
    assert conditional_preference(chosen, other, beta=0.5).tolist() == pytest.approx([0.126928], abs=1e-6)
    assert anchored_preference(chosen, beta=0.5, delta=0.5).tolist() == pytest.approx([0.474077], abs=1e-6)
    assert conditional_preference(zero, zero, beta=0.5).tolist() == pytest.approx([LN2])
    assert anchored_preference(zero, beta=0.5, delta=0.0).tolist() == pytest.approx([LN2])


def test_the_anchor_holds_the_chosen_answer_where_a_difference_does_not() -> None:
    """Both log-ratios fall by 3: the conditional term stays, the anchor rises."""
    chosen, other = torch.tensor([1.0]), torch.tensor([0.0])
    assert conditional_preference(chosen - 3, other - 3, beta=1.0).equal(
        conditional_preference(chosen, other, beta=1.0)
    )
    assert anchored_preference(chosen - 3, beta=1.0, delta=0.0) > anchored_preference(chosen, beta=1.0, delta=0.0)


def test_svcos_terms() -> None:
    """beta 1. The chosen answer: 1 with its image, 0 without, -2 with the other one: margins 1 and 2.

    The rejected one: -1 with its image, 0 without, 3 with the other one: margins -1 and -3. Together
    0.313262 + 0.126928 + 1.313262 + 3.048587 = 4.802039.
    """
    ratios = ImageLogRatios(*(torch.tensor([value]) for value in (1.0, 3.0, -2.0, -1.0, 0.0, 0.0)))
    assert symmetric_preference(ratios, beta=1.0).tolist() == pytest.approx([4.802039], abs=1e-6)
    assert symmetric_preference(ImageLogRatios(*[torch.zeros(2)] * 6), beta=1.0).tolist() == pytest.approx(
        [4 * LN2] * 2
    )


def test_svcos_anchor_pulls_both_ways() -> None:
    """The gradients of the answers without an image cancel where every margin is the same."""
    ratios = ImageLogRatios(*(torch.zeros(1, requires_grad=True) for _ in range(6)))
    symmetric_preference(ratios, beta=1.0).sum().backward()
    found = [float(ratio.grad) for ratio in ratios if ratio.grad is not None]
    assert found == pytest.approx([-0.5, 0.5, 0.5, -0.5, 0.0, 0.0])


def test_povids_term() -> None:
    """beta 0.1: ln(1 + e^-(0.1 * (4 - -6))) = ln(1 + e^-1) = 0.313262; own tokens that are the answer's give ln 2."""
    chosen = torch.tensor([4.0])
    assert own_tokens_preference(chosen, torch.tensor([-6.0]), beta=0.1).tolist() == pytest.approx([0.313262], abs=1e-6)
    assert own_tokens_preference(chosen, chosen, beta=0.1).tolist() == pytest.approx([LN2])


def test_tokens_that_are_not_guessed_without_the_image_weigh_more() -> None:
    """1 - p is 0.5, 0.75 and 0.25, its mean 0.5; squared 0.25, 0.5625 and 0.0625, its mean 0.875 / 3."""
    guessed = torch.tensor([0.5, 0.25, 0.75]).log()
    assert image_token_weights(guessed, 1.0).tolist() == pytest.approx([1.0, 1.5, 0.5])
    assert image_token_weights(guessed, 2.0).tolist() == pytest.approx([0.75 / 0.875, 1.6875 / 0.875, 0.1875 / 0.875])
    assert image_token_weights(guessed, 0.0).tolist() == [1.0, 1.0, 1.0]
    assert image_token_weights(torch.zeros(2), 1.0).tolist() == [1.0, 1.0], "all are sure"
