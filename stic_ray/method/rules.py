"""From an image's answers and their scores to what is trained on: the rules of `rules.*` (docs/verification.md).

Everything is a function of (seed, image id), the answers and the settings; the order of the answers does not matter.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import permutations
from typing import Literal, NamedTuple

from stic_ray.core.errors import Rejected
from stic_ray.core.randomness import random_for
from stic_ray.core.schemas import Reason
from stic_ray.core.verification import RulesConfig
from stic_ray.method.ratings import Cut, RatedAnswer, is_whole
from stic_ray.method.scoring import normalise

Taken = Literal["chosen", "rejected", "both"]


class AnswerPair(NamedTuple):
    """Two answers that may be taken; of rows, which have no rejected answer, the same one twice."""

    chosen: RatedAnswer
    rejected: RatedAnswer


@dataclass(frozen=True)
class Choice:
    """What one row is made of."""

    chosen: RatedAnswer
    rejected: tuple[RatedAnswer, ...] = ()
    """The first is the row's own rejected answer; empty for rows of chosen answers alone."""


@dataclass
class Decision:
    """What became of an image's answers."""

    choices: list[Choice] = field(default_factory=list)
    rejected: Rejected | None = None
    """Why the image gives nothing; None where it gives something."""
    lost: dict[int, Reason] = field(default_factory=dict)
    """By number: the rule behind which an answer had no place left."""

    def taken(self, number: int) -> Taken | None:
        """Return what a candidate was taken as."""
        is_chosen = any(choice.chosen.number == number for choice in self.choices)
        is_rejected = any(answer.number == number for choice in self.choices for answer in choice.rejected)
        return "both" if is_chosen and is_rejected else "chosen" if is_chosen else "rejected" if is_rejected else None


def decide(
    image_id: str,
    answers: Sequence[RatedAnswer],
    rules: RulesConfig,
    seed: int,
    *,
    cut: Cut | None = None,
    check: Callable[[RatedAnswer], object] = lambda answer: None,
) -> Decision:
    """Apply the rules, one after another, to all that an image's candidates could be taken as.

    The reason of an image that gives nothing is the first rule that leaves nothing. `check` raises Rejected for an
    answer that cannot be trained on, such as one that is too long; it is asked about answers that would be taken, and
    the next best take the places of those.
    """
    decision = Decision()
    try:
        pairs = _left_by_the_rules(image_id, sorted(answers, key=lambda each: each.number), rules, cut, decision)
        _take(_in_order(pairs, image_id, rules, seed), rules, check, decision)
    except Rejected as error:
        decision.rejected = error
    return decision


class _Rule(NamedTuple):
    reason: Reason
    keeps: Callable[[RatedAnswer, RatedAnswer], bool]
    """Of a chosen and a rejected answer."""
    told: str
    """The message where it leaves nothing."""


def _left_by_the_rules(
    image_id: str, answers: list[RatedAnswer], rules: RulesConfig, cut: Cut | None, decision: Decision
) -> list[AnswerPair]:
    """Return what the rules leave, and note in `decision` which answers they lost. Raises Rejected if nothing."""
    if rules.majority is not None and not rules.scorers:
        groups = _groups(each for each in answers if is_whole(each))
        answers = [replace(each, score=groups[_agreed(each)] / max(1, groups.total())) for each in answers]
    takes_two = rules.makes == "pairs"
    pairs = [
        AnswerPair(*pair) for pair in (permutations(answers, 2) if takes_two else zip(answers, answers, strict=True))
    ]
    if not pairs:
        need = "a pair takes two" if takes_two else "one is needed"
        raise Rejected(Reason.NO_SCORE, f"it has {len(answers)} candidates, {need}")
    for rule in _rules_in_order(image_id, answers, rules, cut):
        kept = [pair for pair in pairs if rule.keeps(*pair)]
        gone = {each.number for pair in pairs for each in pair} - {each.number for pair in kept for each in pair}
        decision.lost |= dict.fromkeys(sorted(gone), rule.reason)
        if not kept:
            raise Rejected(rule.reason, rule.told)
        pairs = kept
    return pairs


def _rules_in_order(image_id: str, answers: list[RatedAnswer], rules: RulesConfig, cut: Cut | None) -> Iterator[_Rule]:
    """Yield the rules that are set."""
    num, needs_score = len(answers), bool(rules.scorers) or rules.majority is not None
    yield _Rule(Reason.EMPTY_ANSWER, _both(lambda a: bool(a.text.strip())), "its answers are empty")
    yield _Rule(Reason.TRUNCATED_ANSWER, _both(lambda a: not a.is_cut_off), "its answers were cut off")
    if needs_score:
        names = ", ".join(name for name, _ in rules.scorers)
        num_scored = sum(each.score is not None for each in answers)
        scored = f"{num_scored} of its {num} candidates have a score by {names}"
        yield _Rule(Reason.NO_SCORE, _both(lambda a: a.score is not None), scored)
    usable = [each for each in answers if is_whole(each) and (each.score is not None or not needs_score)]
    if cut is not None:
        best = max(each.value for each in usable)
        told = f"its best score is {best:.6g}, the top share of {rules.top_share:g} ends at {cut.score:.6g}"
        yield _Rule(Reason.NOT_IN_TOP_SHARE, lambda *_: cut.keeps(image_id, best), told)
    if rules.majority is not None:
        yield from _rules_of_majority(usable, rules, rules.majority)
    yield from _rules_of_scores(usable, rules)
    if (most := rules.max_length_difference) is not None:
        told = f"no two answers that may be a pair differ by at most {most:g} of the longer one's tokens"
        yield _Rule(Reason.UNBALANCED_LENGTHS, lambda c, r: length_difference(c, r) <= most, told)


def _both(holds: Callable[[RatedAnswer], bool]) -> Callable[[RatedAnswer, RatedAnswer], bool]:
    return lambda chosen, rejected: holds(chosen) and holds(rejected)


def _rules_of_majority(usable: list[RatedAnswer], rules: RulesConfig, share: float) -> Iterator[_Rule]:
    groups = _groups(usable)
    (text, most), *others = groups.most_common(2)
    is_majority = most >= share * len(usable) - 1e-9 and not (others and others[0][1] == most)
    told = f"its largest group of answers that agree is {most} of {len(usable)}, rules.majority={share:g}"
    yield _Rule(Reason.NO_MAJORITY, lambda c, r: is_majority and _agreed(c) == text, told)
    if rules.makes == "pairs":
        told = f"all of its {len(usable)} answers agree"
        yield _Rule(Reason.IDENTICAL_ANSWERS, lambda c, r: _agreed(r) != text, told)


def _rules_of_scores(usable: list[RatedAnswer], rules: RulesConfig) -> Iterator[_Rule]:
    """Yield the rules on texts and scores of an answer and of two."""
    if rules.makes == "pairs":
        told = f"its answers are all {usable[0].text.strip()[:80]!r}"
        yield _Rule(Reason.IDENTICAL_ANSWERS, lambda c, r: c.text.strip() != r.text.strip(), told)
    if (least := rules.min_chosen_score) is not None:
        best = max(each.value for each in usable)
        told = f"its best score is {best:.6g}, rules.min_chosen_score={least:g}"
        yield _Rule(Reason.BELOW_THRESHOLD, lambda c, r: c.value >= least, told)
    if (most := rules.max_rejected_score) is not None:
        worst = min(each.value for each in usable)
        told_worst = f"its worst score is {worst:.6g}, rules.max_rejected_score={most:g}"
        yield _Rule(Reason.BELOW_THRESHOLD, lambda c, r: r.value <= most, told_worst)
    if rules.makes == "pairs" and rules.pairing != "random":
        yield from _rules_of_gap(usable, rules)


def _rules_of_gap(usable: list[RatedAnswer], rules: RulesConfig) -> Iterator[_Rule]:
    by_score = sorted(usable, key=lambda each: (each.value, each.number))
    if rules.pairing == "worse_half":
        half = {each.number for each in by_score[: len(by_score) // 2]}
        yield _Rule(Reason.GAP_TOO_SMALL, lambda c, r: r.number in half, "no answer is in the worse half")
    gap = rules.min_gap
    spread = by_score[-1].value - by_score[0].value
    told = f"its scores are {spread:.6g} apart, " + (f"rules.min_gap={gap:g}" if gap else "so none is better")
    enough = (lambda c, r: c.value > r.value) if gap is None else (lambda c, r: c.value - r.value >= gap - 1e-9)
    yield _Rule(Reason.GAP_TOO_SMALL, enough, told)


def _agreed(answer: RatedAnswer) -> str:
    return normalise(answer.text) or answer.text.strip()


def _groups(answers: Iterable[RatedAnswer]) -> Counter[str]:
    """Return how many answers say the same, by what they say."""
    return Counter(map(_agreed, answers))


def length_difference(first: RatedAnswer, second: RatedAnswer) -> float:
    """Return the difference in tokens as a share of the longer answer."""
    return abs(first.num_tokens - second.num_tokens) / max(first.num_tokens, second.num_tokens, 1)


def _in_order(pairs: list[AnswerPair], image_id: str, rules: RulesConfig, seed: int) -> list[AnswerPair]:
    """Return the pairs, those to be taken first in front."""
    generator = random_for(seed, image_id, "rules")
    pairs = sorted(pairs, key=lambda pair: (pair.chosen.number, pair.rejected.number))
    if rules.pairing in ("any", "random"):
        generator.shuffle(pairs)
        return pairs
    if rules.pairing == "worse_half":
        numbers = sorted({pair.rejected.number for pair in pairs})
        place = dict(zip(numbers, generator.sample(range(len(numbers)), len(numbers)), strict=True))
        return sorted(pairs, key=lambda pair: (-pair.chosen.value, pair.chosen.number, place[pair.rejected.number]))
    return sorted(pairs, key=lambda pair: (-pair.chosen.value, pair.rejected.value))


def _take(
    pairs: Sequence[AnswerPair], rules: RulesConfig, check: Callable[[RatedAnswer], object], decision: Decision
) -> None:
    """Fill in the choices. Raises Rejected where `check` leaves none."""
    unfit: dict[int, Rejected | None] = {}
    used: list[frozenset[str]] = []  # texts of pairs, or of chosen answers alone
    each_once = rules.pairing in ("best_worst", "worse_half")

    def fits(answer: RatedAnswer) -> bool:
        if answer.number not in unfit:
            try:
                check(answer)
                unfit[answer.number] = None
            except Rejected as error:
                unfit[answer.number] = error
                decision.lost[answer.number] = error.reason
        return unfit[answer.number] is None

    def can_be(pair: AnswerPair) -> bool:
        texts = _texts(pair)
        is_new = texts.isdisjoint(frozenset().union(*used)) if each_once else texts not in used
        return is_new and fits(pair.chosen) and fits(pair.rejected)

    for first in pairs:
        if len(decision.choices) == rules.num_pairs:
            return
        if not can_be(first):
            continue
        taken = [first]
        for pair in pairs if rules.num_rejected > 1 else ():
            is_new = all(_texts(pair) != _texts(other) for other in taken)
            if pair.chosen is first.chosen and is_new and len(taken) < rules.num_rejected and can_be(pair):
                taken.append(pair)
        used += map(_texts, taken)
        losers = tuple(pair.rejected for pair in taken) if rules.makes == "pairs" else ()
        decision.choices.append(Choice(first.chosen, losers))
    if not decision.choices:
        raise next(error for error in unfit.values() if error is not None)


def _texts(pair: AnswerPair) -> frozenset[str]:
    return frozenset(answer.text.strip() for answer in pair)
