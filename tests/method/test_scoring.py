"""Reading answers out of responses, and scoring them."""

import pytest

from stic_ray.method.scoring import (
    METRICS,
    contains,
    exact_match,
    multiple_choice,
    read_yes_no,
    relaxed_number,
    vqa_accuracy,
    yes_no,
)

WORLD = ("cat", "dog")


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
        ("1,000", ["1000"], 1.0),
        ("1,2", ["12"], 0.0),
        ("cafe\u0301", ["caf\u00e9"], 1.0),
        ("10²", ["102"], 0.0),
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


@pytest.mark.parametrize(
    ("prediction", "answer", "is_equal"),
    [
        ("two", "2", True),
        ("None", "0", True),
        ("ten apples", "10 apples", True),
        ("dont", "don't", True),
        ("theyre", "they're", True),
        ("its", "it's", False),
        ("1,000", "1000", True),
        ("2.5", "2.5", True),
        ("2.5", "25", False),
        ("u.s.", "us", True),
        ("girls", "girl's", False),
        ("2:50 pm", "250 pm", False),
        ("black-white", "black white", True),
        ("The red  ball!", "red ball", True),
        ("", "the", False),
        ("the", "The", True),
    ],
)
def test_vqa_answers_are_compared_as_its_page_describes(prediction: str, answer: str, is_equal: bool) -> None:
    assert vqa_accuracy(prediction, [answer] * 10) == vqa_accuracy(prediction, [answer]) == float(is_equal)


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
