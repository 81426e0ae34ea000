"""Rules over candidates and scores: each one and their compositions by hand, and what must hold for all of them."""

import itertools
import random
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from stic_ray.core.errors import Rejected
from stic_ray.core.schemas import Reason
from stic_ray.core.verification import RulesConfig
from stic_ray.method.ratings import Cut, RatedAnswer, combined_scores, cut_at, rank_of
from stic_ray.method.rules import Decision, decide, length_difference

IMAGE = "0123456789abcdef0123456789abcdef"


def answers(*scores: float | None, **changes: Any) -> list[RatedAnswer]:
    """Answers 0, 1, ... of these scores, each with a text of its own."""
    return [RatedAnswer(n, f"Answer {n}.", 10, score=score) for n, score in enumerate(scores)]


def texts(*given: str, scores: list[float] | None = None) -> list[RatedAnswer]:
    return [RatedAnswer(n, text, 10, score=scores[n] if scores else None) for n, text in enumerate(given)]


def judged(given: list[RatedAnswer], cut: Cut | None = None, **rules: Any) -> Decision:
    return decide(IMAGE, given, RulesConfig(**rules), 0, cut=cut)


def taken(decision: Decision) -> list[tuple[int, ...]]:
    """Numbers of each row: chosen, then rejected ones."""
    assert decision.rejected is None
    return [(c.chosen.number, *(each.number for each in c.rejected)) for c in decision.choices]


def reason(decision: Decision) -> Reason:
    assert decision.rejected is not None and not decision.choices
    return decision.rejected.reason


def test_the_best_is_set_against_the_worst() -> None:
    assert taken(judged(answers(0.5, 0.9, 0.1, 0.4))) == [(1, 2)]


def test_equal_scores_are_told_apart_by_their_numbers_and_never_paired() -> None:
    assert taken(judged(answers(1, 0, 1, 0))) == [(0, 1)]
    assert reason(judged(answers(1, 1, 1))) == "gap_too_small"


def test_further_pairs_take_answers_that_are_left() -> None:
    assert taken(judged(answers(0.5, 0.9, 0.1, 0.4, 0.7), num_pairs=2)) == [(1, 2), (4, 3)]
    assert taken(judged(answers(0.5, 0.9, 0.1, 0.4, 0.7), num_pairs=9)) == [(1, 2), (4, 3)]


def test_a_row_may_have_several_rejected_answers_the_worst_in_front() -> None:
    decision = judged(answers(0.5, 0.9, 0.1, 0.4), num_rejected=2)
    assert taken(decision) == [(1, 2, 3)]
    assert [decision.taken(n) for n in range(4)] == [None, "chosen", "rejected", "rejected"]
    assert taken(judged(answers(0.5, 0.9, 0.1), num_rejected=7)) == [(1, 2, 0)]
    assert taken(judged(answers(0.5, 0.9, 0.1, 0.4, 0.6), num_rejected=2, num_pairs=2)) == [(1, 2, 3), (4, 0)]


def test_a_gap_is_reached_or_the_image_gives_nothing() -> None:
    assert taken(judged(answers(0.75, 0.25), min_gap=0.5)) == [(0, 1)]
    assert taken(judged(answers(0.3, 0.1), min_gap=0.2)) == [(0, 1)]  # 0.3 - 0.1 is 0.19999999999999998
    decision = judged(answers(0.75, 0.3), min_gap=0.5)
    assert reason(decision) == "gap_too_small" and "0.45 apart, rules.min_gap=0.5" in str(decision.rejected)


def test_thresholds_hold_for_each_side() -> None:
    assert taken(judged(answers(0.9, 0.5, 0.1), min_chosen_score=0.9, max_rejected_score=0.1)) == [(0, 2)]
    assert reason(judged(answers(0.89, 0.5, 0.1), min_chosen_score=0.9)) == "below_threshold"
    low = judged(answers(0.89, 0.5, 0.2), max_rejected_score=0.1)
    assert reason(low) == "below_threshold" and "worst score is 0.2, rules.max_rejected_score=0.1" in str(low.rejected)
    assert judged(answers(0.9, 0.5, 0.3), min_chosen_score=0.8, max_rejected_score=0.3).lost == {1: "below_threshold"}


def test_the_rejected_answer_is_drawn_from_the_worse_half() -> None:
    scores = [0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.6]
    drawn = {
        decide(f"{n:032x}", answers(*scores), RulesConfig(pairing="worse_half"), 0).choices[0].rejected[0].number
        for n in range(60)
    }
    assert drawn == {1, 3, 5}  # three of seven are the worse half
    assert taken(judged(answers(0.2, 0.1), pairing="worse_half")) == [(0, 1)]


def test_any_two_with_a_gap_are_drawn_and_the_better_one_is_chosen() -> None:
    scores, seen = [0, -1, -3, -3], set()
    for n in range(200):
        decision = decide(f"{n:032x}", answers(*scores), RulesConfig(pairing="any", min_gap=2, num_pairs=2), 0)
        assert len(set(taken(decision))) == 2
        seen |= set(taken(decision))
    assert seen == {(0, 2), (0, 3), (1, 2), (1, 3)}


def test_random_looks_at_no_score() -> None:
    seen = {taken(decide(f"{n:032x}", answers(0.9, 0.1, None), RulesConfig(pairing="random"), 0))[0] for n in range(40)}
    assert seen == {(0, 1), (1, 0)}  # the same candidates as with scores
    none = {
        taken(decide(f"{n:032x}", answers(None, None), RulesConfig(pairing="random", scorers={}), 0))[0]
        for n in range(40)
    }
    assert none == {(0, 1), (1, 0)}
    [[first, *_], *_] = [taken(judged(answers(0.9, 0.1, 0.2), pairing="random", num_pairs=3))]
    assert len(taken(judged(answers(0.9, 0.1, 0.2), pairing="random", num_pairs=9))) == 3, first  # never both ways


def test_answers_of_the_majority_are_chosen_and_others_rejected() -> None:
    given = texts("A red dog.", "a red dog", "The RED dog!", "Two cats.", "A cat.")
    decision = judged(given, scorers={}, majority=0.6)
    assert decision.choices[0].chosen.score == pytest.approx(0.6) and decision.choices[0].rejected[0].score == 0.2
    assert taken(decision) == [(0, 3)] and decision.lost == {}
    assert taken(judged(given, scorers={}, majority=0.5, num_rejected=4)) == [(0, 3, 4)]
    low = judged(given, scorers={}, majority=0.7)
    assert reason(low) == "no_majority" and "3 of 5, rules.majority=0.7" in str(low.rejected)
    assert reason(judged(texts("a", "a", "b", "b"), scorers={}, majority=0.5)) == "no_majority"  # neither is larger
    assert reason(judged(texts("Yes.", "yes"), scorers={}, majority=0.5)) == "identical_answers"
    assert taken(judged(texts("Yes.", "yes"), scorers={}, majority=0.5, makes="rows")) == [(0,)]


def test_majority_and_scores_compose() -> None:
    given = texts("dog", "dog", "cat", "cow", "cow", scores=[0.1, 0.8, 0.9, 0.3, 0.2])
    assert reason(judged(given, majority=0.4)) == "no_majority"
    given = texts("dog", "dog", "dog", "cat", "cow", scores=[0.1, 0.8, 0.8, 0.9, 0.2])
    assert taken(judged(given, majority=0.6)) == [(1, 4)]
    assert reason(judged(given, majority=0.6, min_gap=0.7)) == "gap_too_small"


def test_equal_texts_are_never_paired_nor_repeated() -> None:
    given = texts("dog", " dog ", "cat", scores=[0.9, 0.1, 0.2])
    assert taken(judged(given)) == [(0, 2)]  # number 1 is the worst and says the same as the best
    assert reason(judged(texts("dog", "dog", scores=[0.9, 0.1]))) == "identical_answers"
    given = texts("dog", "cat", "cat", "cow", scores=[0.9, 0.1, 0.2, 0.3])
    assert taken(judged(given, num_rejected=3)) == [(0, 1, 3)]


def test_lengths_of_a_pair_are_balanced() -> None:
    given = [
        RatedAnswer(0, "a", 100, score=0.9),
        RatedAnswer(1, "b", 40, score=0.1),
        RatedAnswer(2, "c", 80, score=0.3),
    ]
    assert length_difference(given[0], given[1]) == length_difference(given[1], given[0]) == pytest.approx(0.6)
    assert taken(judged(given, max_length_difference=0.6)) == [(0, 1)]
    assert taken(judged(given, max_length_difference=0.2)) == [(0, 2)]
    assert reason(judged(given, max_length_difference=0.1)) == "unbalanced_lengths"
    empty = [RatedAnswer(0, "a", 0, score=1.0), RatedAnswer(1, "b", 0, score=0.0)]
    assert length_difference(*empty) == 0.0


def test_rows_have_the_best_answers_alone() -> None:
    assert taken(judged(answers(0.5, 0.9, 0.1), makes="rows")) == [(1,)]
    assert taken(judged(answers(0.5, 0.9, 0.1), makes="rows", num_pairs=2)) == [(1,), (0,)]
    assert taken(judged(answers(0.9), makes="rows", min_chosen_score=0.9)) == [(0,)]
    assert reason(judged(answers(0.8), makes="rows", min_chosen_score=0.9)) == "below_threshold"
    assert taken(judged(texts("x", "x", "y", scores=[3.0, 2.0, 1.0]), makes="rows", num_pairs=3)) == [(0,), (2,)]
    drawn = {
        taken(decide(f"{n:032x}", answers(1, 2, 3), RulesConfig(makes="rows", pairing="random"), 0))[0]
        for n in range(50)
    }
    assert drawn == {(0,), (1,), (2,)}


def test_what_cannot_be_used_is_as_if_it_were_not_there() -> None:
    given = [
        RatedAnswer(0, " ", 0, score=9.0),
        RatedAnswer(1, "cut", 99, is_cut_off=True, score=8.0),
        RatedAnswer(2, "no score", 9),
        RatedAnswer(3, "good", 9, score=1.0),
        RatedAnswer(4, "bad", 9, score=0.0),
    ]
    decision = judged(given)
    assert taken(decision) == [(3, 4)]
    assert decision.lost == {0: "empty_answer", 1: "truncated_answer", 2: "no_score"}
    assert reason(judged(given[:1] + given[3:4])) == "empty_answer"
    assert reason(judged(given[1:2] + given[3:4])) == "truncated_answer"
    none = judged(given[2:4])
    assert reason(none) == "no_score" and "1 of its 2 candidates have a score by consistency" in str(none.rejected)
    assert reason(judged([])) == reason(judged(given[3:4])) == "no_score"


def test_the_next_best_takes_the_place_of_what_is_too_long() -> None:
    def check(answer: RatedAnswer) -> None:
        asked.append(answer.number)
        if answer.number in too_long:
            raise Rejected(Reason.TOO_LONG, f"answer {answer.number}")

    asked: list[int] = []
    too_long = {1}
    decision = decide(IMAGE, answers(0.5, 0.9, 0.1, 0.4), RulesConfig(), 0, check=check)
    assert taken(decision) == [(0, 2)] and decision.lost == {1: "too_long"}
    assert len(asked) == len(set(asked)), "each is asked about once"
    too_long = {0, 1, 2, 3}
    decision = decide(IMAGE, answers(0.5, 0.9, 0.1, 0.4), RulesConfig(), 0, check=check)
    assert reason(decision) == "too_long"


def test_the_top_share_is_of_images_and_exact_among_equal_scores() -> None:
    ids = [f"{n:x}".ljust(32, "0") for n in (7, 3, 5, 1, 9)]
    ranks = np.array([rank_of(image) for image in ids])
    cut = cut_at(0.4, np.array([1.0, 5.0, 2.0, 4.0, 3.0]), ranks)
    assert cut.score == 4.0
    equal = cut_at(0.5, np.ones(5), ranks)
    assert sum(equal.keeps(image, 1.0) for image in ids) == 3
    assert cut_at(0.6, np.arange(5.0), ranks).score == 2.0  # ceil(0.6 x 5), whatever the float says
    assert cut_at(1.0, np.arange(5.0), ranks).score == 0.0
    assert taken(judged(answers(4.0, 1.0), cut=cut, top_share=0.4)) == [(0, 1)]
    below = judged(answers(3.9, 1.0), cut=cut, top_share=0.4)
    assert reason(below) == "not_in_top_share" and "best score is 3.9, the top share of 0.4 ends at 4" in str(
        below.rejected
    )


def score(number: int | None, scorer: str, value: float) -> dict[str, Any]:
    return {"image_id": IMAGE, "number": number, "scorer": scorer, "value": value}


TWO = [
    score(0, "a", 3.0),
    score(1, "a", 1.0),
    score(2, "a", 2.0),
    score(0, "b", 10.0),
    score(1, "b", 30.0),
    score(2, "b", 30.0),
]


def test_values_are_added_by_weight() -> None:
    rules = RulesConfig(scorers={"a": 2.0, "b": -0.1})
    assert combined_scores(TWO, range(3), rules) == pytest.approx({0: 5.0, 1: -1.0, 2: 1.0})


def test_ranks_are_averaged_by_weight() -> None:
    """By hand: a ranks 1, 0, 0.5; b ranks 0, 0.75, 0.75, as the two that are equal share the mean of 0.5 and 1."""
    assert combined_scores(TWO, range(3), RulesConfig(scorers={"a": 1, "b": 3}, combine="rank")) == pytest.approx(
        {0: 0.25, 1: 0.5625, 2: 0.6875}
    )
    turned = combined_scores(TWO, range(3), RulesConfig(scorers={"a": -1}, combine="rank"))
    assert turned == pytest.approx({0: 0.0, 1: 1.0, 2: 0.5})
    assert combined_scores(TWO[:1], [0], RulesConfig(scorers="a", combine="rank")) == {0: 1.0}


def test_a_score_of_the_image_holds_for_all_its_candidates_and_a_missing_one_for_none() -> None:
    rules = RulesConfig(scorers=["a", "b"])
    image = [*TWO[:2], score(None, "b", 7.0)]
    assert combined_scores(image, range(3), rules) == {0: 10.0, 1: 8.0}
    assert combined_scores([*TWO[:3], score(0, "b", float("nan"))], range(3), rules) == {}
    assert combined_scores([], range(3), rules) == {} == combined_scores(TWO, [], rules)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"scorers": {"a": 0.0}}, "weight 0 does nothing"),
        ({"scorers": {}}, "need a score"),
        ({"scorers": {}, "majority": 0.5, "top_share": 0.5}, "need a score"),
        ({"pairing": "random", "min_gap": 1.0}, "cannot be used with min_gap"),
        ({"makes": "rows", "num_rejected": 2, "max_length_difference": 0.5}, "max_length_difference and num_rejected"),
        ({"makes": "rows", "pairing": "any"}, "pairing=any is for pairs"),
        ({"combine": "rank", "top_share": 0.5}, "use combine=value"),
    ],
)
def test_rules_that_contradict_each_other_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        RulesConfig(**settings)


def random_case(generator: random.Random) -> tuple[list[RatedAnswer], dict[str, Any]]:
    makes = generator.choice(["pairs", "pairs", "rows"])
    pairing = generator.choice(
        ["best_worst", "random"] if makes == "rows" else ["best_worst", "worse_half", "any", "random"]
    )
    rules: dict[str, Any] = {"makes": makes, "pairing": pairing, "num_pairs": generator.randint(1, 3)}
    options: dict[str, Any] = {"majority": 0.3}
    if pairing != "random":
        options |= {"min_chosen_score": 0.4}
    if makes == "pairs":
        options |= {"max_length_difference": 0.5, "num_rejected": 3}
        if pairing != "random":
            options |= {"min_gap": 0.3, "max_rejected_score": 0.6}
    rules |= {name: value for name, value in options.items() if generator.random() < 0.3}
    given = [
        RatedAnswer(
            number,
            generator.choice(["", "dog", "Dog.", "cat", "cow", "a cow", "hen"]),
            generator.randint(0, 12),
            is_cut_off=generator.random() < 0.1,
            score=None if generator.random() < 0.1 else generator.choice([0.0, 0.2, 0.5, 0.5, 0.9]),
        )
        for number in generator.sample(range(12), generator.randint(0, 8))
    ]
    return given, rules


def test_whatever_the_rules_what_they_promise_holds() -> None:
    generator, ended = random.Random(5), {True: 0, False: 0}
    for _ in range(1500):
        given, settings = random_case(generator)
        rules = RulesConfig(**settings)
        decision = decide(IMAGE, given, rules, 1)
        again = decide(IMAGE, generator.sample(given, len(given)), rules, 1)
        assert again.choices == decision.choices and again.lost == decision.lost, "the order of candidates matters"
        assert (decision.rejected is None) == bool(decision.choices), "an image ends in exactly one way"
        ended[bool(decision.choices)] += 1
        assert len(decision.choices) <= rules.num_pairs
        for choice in decision.choices:
            chosen, losers = choice.chosen, choice.rejected
            assert len(losers) <= rules.num_rejected and bool(losers) == (rules.makes == "pairs")
            assert all(each.text and not each.is_cut_off and each.score is not None for each in (chosen, *losers))
            assert chosen.value >= (rules.min_chosen_score or 0)
            assert len({each.text for each in (chosen, *losers)}) == 1 + len(losers)
            for each in losers if rules.pairing != "random" else ():
                assert chosen.value > each.value and chosen.value - each.value >= (rules.min_gap or 0) - 1e-9
                assert each.value <= (rules.max_rejected_score or 1)
            for each in losers:
                assert length_difference(chosen, each) <= (rules.max_length_difference or 1)
        rows = [frozenset((c.chosen.text, r.text)) for c in decision.choices for r in c.rejected or (c.chosen,)]
        assert len(set(rows)) == len(rows), "no two rows compare the same texts"
    assert min(ended.values()) > 300


def test_the_draw_depends_on_seed_and_image_alone() -> None:
    rules = RulesConfig(pairing="random")
    drawn = {
        (s, n): taken(decide(f"{n:032x}", answers(*range(8)), rules, s))[0]
        for s, n in itertools.product(range(4), range(4))
    }
    assert len(set(drawn.values())) > 8
    assert drawn[2, 3] == taken(decide(f"{3:032x}", answers(*range(8)), rules, 2))[0]
