"""The judge of the model's own questions agrees with the world that makes them."""

import random

import pytest

from experiments.own_questions import figures, true_answers
from stic_ray.toyworld.language import QUESTION_KINDS, QuestionKind, ask
from stic_ray.toyworld.scenes import Scene, sample_scene


@pytest.mark.parametrize("kind", QUESTION_KINDS)
def test_it_knows_the_answers_to_the_worlds_own_questions(kind: QuestionKind) -> None:
    num_known = 0
    for index in range(200):
        scene = sample_scene(0, index)
        question = ask(scene, kind, random.Random(index))
        found = true_answers(question.text, scene)
        num_known += found is not None
        assert found is None or question.answers[0] in found
    assert num_known > 150


def scene_with_two() -> Scene:
    """Return a scene with two objects of one shape."""
    for index in range(2000):
        scene = sample_scene(0, index)
        shapes = [item.shape for item in scene.objects]
        if len(scene.objects) > 1 and len(set(shapes)) < len(shapes):
            return scene
    raise AssertionError("there are many")


def test_what_a_scene_has_twice_has_no_one_answer() -> None:
    scene = scene_with_two()
    twice = next(item.shape for item in scene.objects if sum(o.shape == item.shape for o in scene.objects) > 1)
    assert true_answers(f"What colour is the {twice}?", scene) is None
    assert true_answers("Why is it so?", scene) is None


def test_right_answers_are_counted_by_how_many_agree() -> None:
    scene = sample_scene(0, 0)
    number = len(scene.objects)
    question = "How many shapes are there?"
    rows = [
        {"image_id": "a", "question": question, "answer": str(number), "share": 1.0},
        {"image_id": "a", "question": question, "answer": "none", "share": 0.5},
        {"image_id": "a", "question": "Why?", "answer": "so", "share": 1.0},
        {"image_id": "a", "question": question, "answer": None, "share": 0.0},
    ]
    found = figures(rows, {"a": scene})
    assert found["num_rows"] == 4 and found["num_known"] == 2
    assert found["by_share"]["0"] == {"num_questions": 2, "right": 0.5}
    assert found["by_share"]["0.9"] == {"num_questions": 1, "right": 1.0}
