"""Multiple choice: what a benchmark gives as choices and answer, and what a response chooses."""

from typing import Any

import pytest

from stic_ray.method.choices import Choice, choice_lines, letter_of, read_choice, read_choices

COLOURS = ("blue", "red", "dark green", "grey")


def test_choices_are_shown_with_letters() -> None:
    assert choice_lines(["red", "blue"]) == "A. red\nB. blue"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("B", "B"),
        ("b", "B"),
        (" B \n", "B"),
        ("B.", "B"),
        ("(b).", "B"),
        ("(B) red", "B"),
        ("B: red", "B"),
        ("B) it is red", "B"),
        ("B, because it is red.", "B"),
        ("The answer is B.", "B"),
        ("The correct answer is: (C)", "C"),
        ("Answer: D", "D"),
        ("I would choose option C here.", "C"),
        ("red", "B"),
        ("Red.", "B"),
        ("It is red.", "B"),
        ("A red ball", "B"),
        ("A dark green field", "C"),
        ("The answer is a red ball.", "B"),
        ("", ""),
        ("I do not know.", ""),
        ("E", ""),
        ("A ball", ""),
        ("A cat and a dog", ""),
        ("It could be red or blue.", ""),
        ("A, B", ""),
        ("B and C", ""),
        ("The answer is A or the answer is B.", ""),
        ("reddish", ""),
        ("green", ""),
        ("**B**", "B"),
        ("<answer>B</answer>", "B"),
        ("B</s>", "B"),
        ("Ｂ", "B"),
        ("Answer：Ｂ", "B"),
        ("B。", "B"),
        ("**B.** It is red.", "B"),
        ("[B]", "B"),
        ("<B>", "B"),
        ("`B`", "B"),
        ('"B"', "B"),
        ("'B'", "B"),
        ("$B$", "B"),
        (r"\boxed{B}", "B"),
        (r"So it is $\boxed{\text{C}}$.", "C"),
        ("B is correct.", "B"),
        ("I think (C) is the best answer.", "C"),
        ("B\nIt is red.", "B"),
        ("B - red", "B"),
        ("The answer is (B)", "B"),
        ("The answer is **B**.", "B"),
        ("The answer is\n\nB", "B"),
        ("The correct answer is option A.", "A"),
        ("Answer: A", "A"),
        ("The answer is A because it is blue.", "A"),
        ("I would pick C.", "C"),
        ("It is red, as one sees.\n\n**B**", "B"),
        ("The answer is A red ball.", "B"),
        ("(A) is wrong. (B) is correct.", "B"),
        ("A is not right; the answer is D.", "D"),
        ("A. blue\nB. red\nC. dark green\nThe answer is C.", "C"),
        ("The answer to the question is B.", "B"),
        ("Correct: B", "B"),
        ("It's B.", "B"),
        ("C would be the best choice.", "C"),
        ("(b) and (c)", ""),
        ("A. blue\nB. red\nC. dark green\nD. grey", ""),
        ("Both B and C", ""),
        (r"\boxed{A} or \boxed{B}", ""),
        ("The answer is not B.", ""),
        ("I am not sure about this.", ""),
        ("A man and a woman.", ""),
        ("option b", "B"),
        ("Option b is right.", "B"),
        ("option b: a dog", "B"),
        ("Option B: a dog", "B"),
        ("OPTION B", "B"),
        ("Choice (b)", "B"),
        ("I would go with option d because it is grey.", "D"),
        ("option a", "A"),
        ("Option a: a dog", "A"),
        ("The answer is b.", "B"),
        ("the answer is a", "A"),
        ("The answer is a dog.", ""),
        ("I choose a dog.", ""),
        ("option b or option c", ""),
        ("Not A, but B", ""),
        ("Not A but B.", ""),
        ("Not option A, but option B", "B"),
        ("Not option A, but B", ""),
        ("It is not option A.", ""),
    ],
)
def test_the_choice_is_read_out_of_a_response(response: str, expected: str) -> None:
    assert read_choice(response, COLOURS) == expected


@pytest.mark.parametrize(
    ("response", "choices", "expected"),
    [
        ("10", ("1", "10", "100"), "B"),
        ("There are 10 of them.", ("1", "10", "100"), "B"),
        ("3.5", ("3", "3.5", "5"), "B"),
        ("-5", ("5", "-5"), "B"),
        ("dark red", ("red", "dark red"), "B"),
        ("yes", ("yes", "no"), "A"),
        ("No, there is none.", ("yes", "no"), "B"),
        ("top left", ("left", "top left", "top"), "B"),
    ],
)
def test_the_text_of_a_choice_counts_as_whole_words(response: str, choices: tuple[str, ...], expected: str) -> None:
    assert read_choice(response, choices) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("B", "B"), (" b", "B"), (1, "B"), ("red", "B"), (0, "A"), (4, None), (-1, None), ("E", None), ("redd", None)],
)
def test_a_right_answer_is_given_as_letter_number_or_text(answer: str | int, expected: str | None) -> None:
    assert letter_of(answer, COLOURS) == expected


NUMBERS = ["3", "2", "1", "4"]


@pytest.mark.parametrize(
    ("answer", "choices", "expected"),
    [
        ("B", ["C", "B", "A"], "B"),
        (2, NUMBERS, "C"),
        (0, ["1", "0"], "A"),
        (1.0, ["sun", "moon"], "B"),
        ("2", ["sun", "moon", "star"], "C"),
        ("2.0", ["sun", "moon", "star"], "C"),
        ("(B)", ["sun", "moon"], "B"),
        ("B.", ["sun", "moon"], "B"),
        ("b)", ["sun", "moon"], "B"),
        ("B. moon", ["sun", "moon"], "B"),
        ("B. star", ["sun", "moon"], None),
        ("moon", ["Sun", "Moon"], "B"),
        ("Moon.", ["sun", "moon"], "B"),
        ("moon", ["Moon", "moon"], "B"),
        ("sun", ["sun ", "moon"], "A"),
        ("1", ["0", "1"], "B"),
        ("4", NUMBERS, "D"),
        (1, [0, 1, 2], "B"),
        ("C", ["sun", None, "moon"], "B"),
        (2, ["sun", None, "moon"], "B"),
        ("B", ["sun", None, "moon"], None),
        ("AB", ["sun", "moon"], None),
    ],
)
def test_an_answer_with_one_meaning_is_taken(answer: str | float, choices: list[Choice], expected: str | None) -> None:
    assert letter_of(answer, choices) == expected


@pytest.mark.parametrize(
    ("answer", "choices"),
    [
        ("A", ["C", "B", "A"]),
        ("2", NUMBERS),
        (2, [3, 2, 1, 4]),
        (3, [3, 4, 5, 6]),
        ("a", ["b", "a"]),
        ("sun", ["sun", "sun"]),
        ("MOON", ["Moon", "moon"]),
    ],
)
def test_an_answer_that_can_mean_two_choices_is_refused(answer: str | float, choices: list[Choice]) -> None:
    with pytest.raises(ValueError, match="write the letter"):
        letter_of(answer, choices)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, []),
        (float("nan"), []),
        (["sun", "moon"], ["sun", "moon"]),
        (["sun", "moon", None, float("nan")], ["sun", "moon", None, None]),
        ([None, None], []),
        ([1.0, 2.0], [1, 2]),
        ([0, 1], [0, 1]),
        ({"A": "sun", "B": "moon"}, ["sun", "moon"]),
        ({"B": "moon", "A": "sun", "C": None}, ["sun", "moon", None]),
        ({"label": ["A", "B"], "text": ["sun", "moon"]}, ["sun", "moon"]),
        ([("A", "sun"), ("B", "moon")], ["sun", "moon"]),
        ("['sun', 'moon']", ["sun", "moon"]),
        ('["sun", null]', ["sun", None]),
        ('{"A": "sun", "B": "moon"}', ["sun", "moon"]),
        (["A. sun", "B. moon"], ["sun", "moon"]),
        (["(A) sun", "(B) moon"], ["sun", "moon"]),
        (["C. Smith", "B. Jones"], ["C. Smith", "B. Jones"]),
    ],
)
def test_choices_are_read_in_every_form_of_one_meaning(given: Any, expected: list[Choice]) -> None:
    assert read_choices(given) == expected


@pytest.mark.parametrize(
    "given", ["sun or moon", 5, {"1": "sun", "2": "moon"}, {"A": "sun", "C": "moon"}, [["sun"], "moon"], [True, False]]
)
def test_choices_of_another_form_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match="choice"):
        read_choices(given)
