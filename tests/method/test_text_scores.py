"""Scores of texts, against values worked by hand."""

import re

import pytest

from stic_ray.method.text_scores import (
    agreement,
    mean_to_others,
    ngram_f1,
    num_matches,
    num_words,
    repeated_share,
    sentences,
    word_ngrams,
)

THREE = ["a red circle and a blue square", "A red circle, and a green square.", "the blue square"]
"""Without articles: four runs of two words, four of which two are those of the first, and one that the first has."""


def test_agreement_is_the_mean_f1_with_the_other_answers() -> None:
    # 2 x 2 / (4 + 4) = 0.5 and 2 x 1 / (4 + 1) = 0.4; the second and the third share nothing.
    assert agreement(THREE, 2) == pytest.approx([(0.5 + 0.4) / 2, (0.5 + 0) / 2, (0.4 + 0) / 2], abs=1e-6)


def test_agreement_of_single_words() -> None:
    # red circle and blue square; red circle and green square: 2 x 4 / 10. Blue square: 2 x 2 / 7 and 2 x 1 / 7.
    expected = [(0.8 + 4 / 7) / 2, (0.8 + 2 / 7) / 2, (4 / 7 + 2 / 7) / 2]
    assert agreement(THREE, 1) == pytest.approx(expected, abs=1e-6)


def test_the_answer_that_most_others_share_is_picked() -> None:
    said = ["A dog and a cup.", "A dog and a cup on a table.", "A dog and a cup.", "A train in the rain."]
    values = agreement(said, 2)
    assert max(range(4), key=lambda place: values[place] or 0) in (0, 2) and values[3] == 0.0


def test_repeated_runs_count_as_often_as_both_have_them() -> None:
    # "red red red" has red-red twice, "red red" once: 2 x 1 / 3.
    assert ngram_f1(word_ngrams("red red red", 2), word_ngrams("red red", 2)) == pytest.approx(2 / 3, abs=1e-6)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [("", "", 1.0), ("", "a red circle", 0.0), ("dog", "A dog!", 1.0), ("dog", "a dog runs", 0.0), ("?", ".", 1.0)],
)
def test_short_texts(first: str, second: str, expected: float) -> None:
    assert ngram_f1(word_ngrams(first, 2), word_ngrams(second, 2)) == expected


def test_an_answer_alone_agrees_with_nobody() -> None:
    assert agreement(["a dog"], 2) == [None]
    assert agreement([], 2) == []


def test_the_mean_leaves_an_answer_itself_out() -> None:
    assert mean_to_others([[1.0, 0.2, 0.6], [0.2, 1.0, 0.0], [0.6, 0.0, 1.0]]) == pytest.approx([0.4, 0.1, 0.3])


def test_words_repetitions_and_matches() -> None:
    assert num_words(" A red  cup,\na dog. ") == 5
    # Runs of two in "red cup red cup red": rc, cr, rc, cr: two of four were there before.
    assert repeated_share("Red cup, red cup, red!", 2) == pytest.approx(0.5, abs=1e-6)
    assert repeated_share("a red cup", 3) == repeated_share("", 3) == 0.0
    assert num_matches("I think it is, I think.", re.compile(r"\bI think\b")) == 2


def test_sentences() -> None:
    text = "A cup of 2.5 l. Is it red?  Yes!\nNo end"
    assert sentences(text) == ["A cup of 2.5 l.", "Is it red?", "Yes!", "No end"]
    assert sentences(" \n ") == []
