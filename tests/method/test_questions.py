"""Questions are read out of what a model writes, and kept where most answers say the same."""

from typing import Any

import pytest

from stic_ray.core.errors import Rejected
from stic_ray.core.schemas import Reason
from stic_ray.method.questions import Majority, check_majority, majority_of, read_question, read_questions


@pytest.mark.parametrize(
    ("written", "question"),
    [
        ("What colour is the dog?", "What colour is the dog?"),
        ("  1. What is left of the 3.5 m pole? It is a tree.", "What is left of the 3.5 m pole?"),
        ('Question 2: "How many birds are there?"', "How many birds are there?"),
        ("Sure, here is one.\n**Q:** Where is it?\nAnother?", "Where is it?"),
        ("<image>\nIs it red?", "Is it red?"),
        ("左边是什么？", "左边是什么？"),
    ],
)
def test_the_first_question_is_read(written: str, question: str) -> None:
    assert read_question(written) == question


@pytest.mark.parametrize("written", ["", "A red dog.", "?", " 1. ?!", "What colour is the"])
def test_what_is_no_question_is_rejected(written: str) -> None:
    with pytest.raises(Rejected) as caught:
        read_question(written)
    assert caught.value.reason is Reason.NO_QUESTION


def test_of_one_image_each_question_is_asked_once() -> None:
    found = read_questions(["What is it?", "Nothing.", "what is  it ?", "Where is it?"])
    kinds = [each.reason if isinstance(each, Rejected) else each for each in found]
    assert kinds == ["What is it?", Reason.NO_QUESTION, Reason.DUPLICATE, "Where is it?"]


@pytest.mark.parametrize(
    ("answers", "majority"),
    [
        (["Red.", "red", "The red", "Blue", "red"], Majority("red", 0.8, is_tied=False)),
        (["red", "blue"], Majority("red", 0.5, is_tied=True)),
        (["1,000", "1000", None, ""], Majority("1,000", 0.5, is_tied=False)),
        ([None, "", " . "], Majority(None, 0.0, is_tied=False)),
        (["A", "a", "the"], Majority("A", 2 / 3, is_tied=False)),
    ],
)
def test_answers_agree_case_punctuation_and_articles_aside(answers: list[Any], majority: Majority) -> None:
    """What is empty, or cut off (None), agrees with nothing but counts; of articles alone the text is compared."""
    found = majority_of(answers)
    assert found == (majority.answer, pytest.approx(majority.share), majority.is_tied)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (Majority("red", 0.6, is_tied=False), None),
        (Majority("red", 0.9, is_tied=False), None),
        (Majority("red", 0.5, is_tied=False), Reason.NO_MAJORITY),
        (Majority("red", 1.0, is_tied=False), Reason.TOO_EASY),
        (Majority(None, 0.0, is_tied=False), Reason.NO_MAJORITY),
        (Majority("red", 0.7, is_tied=True), Reason.NO_MAJORITY),
    ],
)
def test_a_question_is_kept_between_two_shares(found: Majority, reason: Reason | None) -> None:
    if reason is None:
        check_majority(found, 0.6, 0.9)
        return
    with pytest.raises(Rejected) as caught:
        check_majority(found, 0.6, 0.9)
    assert caught.value.reason is reason
