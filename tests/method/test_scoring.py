"""Reading answers out of responses, and scoring them."""

import pytest

from stic_ray.method.scoring import (
    METRICS,
    choice_lines,
    contains,
    exact_match,
    letter_of,
    multiple_choice,
    read_choice,
    read_yes_no,
    relaxed_number,
    vqa_accuracy,
    yes_no,
)

COLOURS = ("blue", "red", "dark green", "grey")
WORLD = ("cat", "dog")


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


def test_the_text_of_a_choice_goes_before_its_letter() -> None:
    assert letter_of("B", ["C", "B", "A"]) == "B"
    assert letter_of("A", ["C", "B", "A"]) == "C"


@pytest.mark.parametrize(("prediction", "expected"), [("B", 1.0), ("b", 1.0), ("A", 0.0), ("", 0.0)])
def test_multiple_choice(prediction: str, expected: float) -> None:
    assert multiple_choice(prediction, ["B"]) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("two", ["two", "2"], 1.0),
        ("2", ["two", "2"], 1.0),
        ("The Red ball.", ["red ball"], 1.0),
        ("a red ball", ["ball"], 0.0),
        ("3.5", ["35"], 0.0),
        ("-5", ["5"], 0.0),
        ("", ["two"], 0.0),
        ("", ["A"], 0.0),
        ("!", ["?"], 0.0),
        ("A", ["A"], 1.0),
        ("B", ["A"], 0.0),
    ],
)
def test_exact_match(prediction: str, answers: list[str], expected: float) -> None:
    assert exact_match(prediction, answers) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("It is a red ball, I think.", ["red ball"], 1.0),
        ("It is reddish.", ["red"], 0.0),
        ("10 apples", ["1"], 0.0),
        ("nothing", ["red", "nothing"], 1.0),
        ("", ["red"], 0.0),
        ("anything", [""], 0.0),
    ],
)
def test_contains(prediction: str, answers: list[str], expected: float) -> None:
    assert contains(prediction, answers) == expected


@pytest.mark.parametrize(("num_equal", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_of_ten_annotators(num_equal: int, expected: float) -> None:
    """The mean over leaving each of ten annotators out, of min(1, equal answers among the others / 3).

    With two equal: leaving one of them out leaves 1/3, any of the other eight 2/3: (2 * 1/3 + 8 * 2/3) / 10 = 0.6.
    """
    answers = ["Cat."] * num_equal + [f"other {number}" for number in range(10 - num_equal)]
    assert vqa_accuracy("a cat", answers) == pytest.approx(expected)


def test_vqa_accuracy_of_few_answers_is_an_exact_match() -> None:
    assert vqa_accuracy("cat", ["cat", "dog"]) == 1.0
    assert vqa_accuracy("cow", ["cat", "dog"]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("105", ["100"], 1.0),
        ("95", ["100"], 1.0),
        ("106", ["100"], 0.0),
        ("-98", ["-100"], 1.0),
        ("98", ["-100"], 0.0),
        ("$1,020", ["1000"], 1.0),
        ("51%", ["50"], 1.0),
        ("0", ["0"], 1.0),
        ("0.01", ["0"], 0.0),
        ("Brazil.", ["brazil"], 1.0),
        ("Brasil", ["brazil"], 0.0),
        ("five", ["5"], 0.0),
        ("5", ["inf"], 0.0),
        ("nan", ["5"], 0.0),
        ("5", ["4", "5.1"], 1.0),
    ],
)
def test_relaxed_numbers_may_be_off_by_five_percent(prediction: str, answers: list[str], expected: float) -> None:
    assert relaxed_number(prediction, answers) == expected


@pytest.mark.parametrize(
    ("response", "answer", "expected"),
    [
        ("Yes", "yes", 1.0),
        ("Yes, there is.", "yes", 1.0),
        ("**Yes**", "Yes", 1.0),
        ("yes--it is on the left", "yes", 1.0),
        ("No.", "no", 1.0),
        ("NO!", "no", 1.0),
        ("There is no dog in the picture.", "no", 1.0),
        ("There is no dog in the picture.", "yes", 0.0),
        ("No, yes is what I would say if there were one.", "no", 1.0),
        ("Yes, and there is no cat.", "no", 0.0),
        ("It is nowhere.", "no", 0.0),
        ("None; it is not there, yesterday it was.", "no", 0.0),
        ("A yes-man stands there.", "yes", 0.0),
        ("No-one", "no", 0.0),
        ("", "no", 0.0),
        ("I cannot tell.", "yes", 0.0),
    ],
)
def test_yes_no(response: str, answer: str, expected: float) -> None:
    assert yes_no(response, [answer]) == expected
    assert yes_no(read_yes_no(response), [answer]) == expected


RIGHT_AND_WRONG = {"multiple_choice": ("C", "D"), "yes_no": ("yes", "no")}


@pytest.mark.parametrize("name", [name for name in METRICS if not METRICS[name].is_open])
def test_every_metric_gives_one_for_the_answer_and_nothing_for_silence(name: str) -> None:
    metric = METRICS[name]
    right, wrong = RIGHT_AND_WRONG.get(name, ("c", "d"))
    scores = [metric.score(metric.read(said, ()), [right], ()) for said in (right.lower(), "", wrong)]
    assert scores == [1.0, 0.0, 0.0] and metric.higher_is_better


def test_a_hallucination_is_worse_under_every_metric_of_objects() -> None:
    of_objects = {name: metric for name, metric in METRICS.items() if metric.is_open}
    assert {name: metric.higher_is_better for name, metric in of_objects.items()} == {
        "object_f1": True,
        "hallucinated_share": False,
        "any_hallucination": False,
    }
    for metric in of_objects.values():
        good, bad = (metric.score(metric.read(said, WORLD), ["cat"], WORLD) for said in ("A cat.", "A cat, a dog."))
        assert (good > bad) == metric.higher_is_better and min(good, bad) >= 0 and max(good, bad) <= 1
