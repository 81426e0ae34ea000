"""Statements of an answer: how questions are read, and what their probabilities make."""

import math

import pytest

from stic_ray.core.verification import ClaimsValue
from stic_ray.method.claims import claims_score, read_questions, yes_probability


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Is there a dog?\nIs it red?", ["Is there a dog?", "Is it red?"]),
        ("1. Is there a dog?\n2) Is it red?\n(3) Is it wet?", ["Is there a dog?", "Is it red?", "Is it wet?"]),
        ("- Is it red?\n* Is it wet?\n\u2022 Is it old?\n", ["Is it red?", "Is it wet?", "Is it old?"]),
        ("Q1: Is it red?\n- 2. Is it wet?\n**Is it old?**", ["Is it red?", "Is it wet?", "Is it old?"]),
        ("Here are the questions:\n\n \nIs it red?\n---\n3.", ["Is it red?"]),
        ("Is it red? Is it wet?", ["Is it red?", "Is it wet?"]),
        ("Is it red?\nis  it RED?\nIs it wet?", ["Is it red?", "Is it wet?"]),
        ("Are there 3 dogs?\n3 dogs?\n2.5 l of milk?", ["Are there 3 dogs?", "3 dogs?", "2.5 l of milk?"]),
        ("the cup is red", ["the cup is red"]),
        ("", []),
    ],
)
def test_questions_are_read(text: str, expected: list[str]) -> None:
    assert read_questions(text, 9) == expected


def test_there_is_a_limit() -> None:
    assert read_questions("a?\nb?\na?\nc?", 2) == ["a?", "b?"]


def test_half_a_question_is_left_out() -> None:
    assert read_questions("Is it red?\nIs it w", 9, cut_off=True) == ["Is it red?"]
    assert read_questions("Is it red?\nIs it wet?", 9, cut_off=True) == ["Is it red?", "Is it wet?"]


def test_probability_of_yes() -> None:
    # (0.2 + 0.1) / (0.2 + 0.1 + 0.05 + 0.15) = 0.6
    logps = [math.log(p) for p in (0.2, 0.1, 0.05, 0.15)]
    assert yes_probability(logps) == pytest.approx(0.6, abs=1e-6)
    assert yes_probability([logp - 900 for logp in logps]) == pytest.approx(0.6, abs=1e-6)
    assert yes_probability([0.0, -math.inf, -math.inf, -math.inf]) == 1.0


@pytest.mark.parametrize(
    ("value", "expected"),
    [("denied", -2.0), ("expected_denied", -(0.1 + 0.6 + 0.9 + 0.5)), ("confirmed_minus_denied", 2.0 - 2.0)],
)
def test_scores(value: ClaimsValue, expected: float) -> None:
    assert claims_score([0.9, 0.4, 0.1, 0.5], value) == pytest.approx(expected, abs=1e-6)


def test_an_answer_without_a_statement_has_no_score() -> None:
    assert claims_score([], "denied") is None
