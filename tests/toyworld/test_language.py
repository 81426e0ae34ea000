"""Descriptions carry the faults that they are meant to carry, and nothing else; answers are true."""

import re
from collections import Counter
from collections.abc import Callable

import pytest

from experiments.toyworld_descriptions import (
    FaultRates,
    describe_fully,
    describe_inventively,
    describe_plainly,
    describe_step_by_step,
    split,
)
from experiments.toyworld_lessons import question_to_confirm
from stic_ray.toyworld.language import (
    DISTRACTORS,
    NUMBERS,
    PLACES,
    QUESTION_KINDS,
    Distractor,
    absent_kind,
    ask,
    ask_claim,
    caption_of,
    claim_text,
    name_of,
)
from stic_ray.toyworld.scenes import COLOURS, COMPANIONS, KIND_WEIGHTS, SHAPES, Kind, Scene, random_for, sample_scene

_NAMED = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) at the ({'|'.join(PLACES)})\b")
SCENES = [sample_scene(11, index) for index in range(1500)]
_CLAIMED = re.compile(r"Is there an? (\w+) (\w+) (?:in the picture|at the (.+))\?")
NO_FAULTS = FaultRates(omission=0.0, companion=0.0, forgotten=0.0, careful_companion=0.0)
ALL_FAULTS = FaultRates(omission=1.0, companion=1.0, forgotten=0.5, careful_companion=1.0)


def named(description: str) -> list[tuple[Kind, int]]:
    return [((colour, shape), PLACES.index(place)) for colour, shape, place in _NAMED.findall(description)]


def truth(scene: Scene) -> list[tuple[Kind, int]]:
    return [(item.kind, item.cell) for item in scene.objects]


def test_the_full_description_is_the_whole_truth() -> None:
    for scene in SCENES:
        text = describe_fully(scene)
        assert named(text) == truth(scene)
        assert all(item.size in text for item in scene.objects)
        assert text[0].isupper() and text.endswith(".")


def test_plain_descriptions_without_faults_are_complete() -> None:
    for scene in SCENES:
        text = describe_plainly(scene, NO_FAULTS, random_for(0, scene.index, "plain"))
        assert named(text) == truth(scene)


def test_plain_descriptions_leave_out_and_add_the_usual_companion() -> None:
    num_added = 0
    for scene in SCENES:
        said = named(describe_plainly(scene, ALL_FAULTS, random_for(0, scene.index, "plain")))
        true, added = [n for n in said if n in truth(scene)], [n for n in said if n not in truth(scene)]
        assert true == truth(scene)[:2] and len(added) <= 1
        due = [kind for kind, _ in true if COMPANIONS.get(kind, kind) not in scene.kinds]
        assert [kind for kind, _ in added] == [COMPANIONS[kind] for kind in due[:1]]
        assert all(cell not in {item.cell for item in scene.objects} for _, cell in added)
        num_added += len(added)
    assert num_added > 0.15 * len(SCENES)


def test_captions_name_about_half_of_the_objects_and_nothing_else() -> None:
    """Of one object there is no half, so that they name somewhat more; what is named differs from scene to scene."""
    num_named, places = 0, set()
    for scene in SCENES:
        said = named(caption_of(scene))
        assert said == [item for item in truth(scene) if item in said] and caption_of(scene).count(" at the ") == len(
            said
        )
        assert 1 <= len(said) <= (len(scene.objects) + 1) // 2
        num_named += len(said)
        places.update(truth(scene).index(item) for item in said)
    assert num_named / sum(len(scene.objects) for scene in SCENES) == pytest.approx(0.55, abs=0.03)
    assert places == {0, 1, 2, 3}
    assert caption_of(SCENES[0]) == caption_of(sample_scene(11, 0))


@pytest.mark.parametrize("rate", [0.3, 0.9])
def test_the_rate_of_omissions_is_the_rate_asked_for(rate: float) -> None:
    rates = FaultRates(omission=rate, companion=0.0)
    crowded = [scene for scene in SCENES if len(scene.objects) > 2]
    num_short = sum(len(named(describe_plainly(s, rates, random_for(0, s.index, "plain")))) == 2 for s in crowded)
    assert num_short / len(crowded) == pytest.approx(rate, abs=0.05)


def test_inventive_descriptions_tell_the_truth_and_add_absent_objects() -> None:
    for scene in SCENES:
        said = named(describe_inventively(scene, random_for(0, scene.index, "invent")))
        added = said[len(scene.objects) :]
        assert said[: len(scene.objects)] == truth(scene) and 1 <= len(added) <= 2
        assert all(kind not in scene.kinds for kind, _ in added)
        assert len({cell for _, cell in said}) == len(said)
        likely = [COMPANIONS[kind] for kind in scene.kinds if COMPANIONS.get(kind, kind) not in scene.kinds]
        assert not likely or added[0][0] in likely


def test_questions_have_true_answers() -> None:
    for scene in SCENES:
        generator = random_for(0, scene.index, "questions")
        for kind in QUESTION_KINDS:
            question = ask(scene, kind, generator)
            assert _is_true(scene, question.text, question.answers[0]), (scene, question)


def _is_true(scene: Scene, text: str, answer: str) -> bool:
    """Answers the question anew, from its text."""
    if match := re.fullmatch(r"What colour is the shape at the (.*)\?", text):
        return [item.colour for item in scene.objects if PLACES[item.cell] == match[1]] == [answer]
    if match := re.fullmatch(r"What colour is the (\w+)\?", text):
        return [item.colour for item in scene.objects if item.shape == match[1]] == [answer]
    if match := re.fullmatch(r"How many (\w+) are there\?", text):
        shape = match[1].removesuffix("es") if match[1] == "crosses" else match[1].removesuffix("s")
        return NUMBERS[sum(shape in ("shape", item.shape) for item in scene.objects)] == answer
    if match := re.fullmatch(r"Where is the (\w+ \w+)\?", text):
        return [PLACES[item.cell] for item in scene.objects if name_of(item.kind) == match[1]] == [answer]
    match = re.fullmatch(r"Is there an? (\w+ \w+) in the picture\?", text)
    assert match, text
    return (match[1] in {name_of(kind) for kind in scene.kinds}) == (answer == "yes")


@pytest.mark.parametrize("distractor", DISTRACTORS)
def test_distractors_are_absent(distractor: Distractor) -> None:
    common = set(sorted(KIND_WEIGHTS, key=lambda kind: -KIND_WEIGHTS[kind])[:9])
    for scene in SCENES:
        kind = absent_kind(scene, distractor, random_for(0, scene.index, "absent"))
        assert kind not in scene.kinds
        if distractor == "popular":
            assert kind in common
        if distractor == "adversarial" and any(COMPANIONS.get(k, k) not in scene.kinds for k in scene.kinds):
            assert kind in {COMPANIONS.get(k) for k in scene.kinds}


def test_step_by_step_an_object_is_forgotten_now_and_then_and_a_companion_added_more_often_than_not() -> None:
    assert all(
        named(describe_step_by_step(scene, NO_FAULTS, random_for(0, scene.index, "careful"))) == truth(scene)
        for scene in SCENES
    )
    rates = FaultRates()
    num_there = num_named = num_tempted = num_added = 0
    for scene in SCENES:
        said = named(describe_step_by_step(scene, rates, random_for(0, scene.index, "careful")))
        true, added = [n for n in said if n in truth(scene)], [n for n in said if n not in truth(scene)]
        assert true and len(added) <= 1 and all(kind not in scene.kinds for kind, _ in added)
        assert all(kind in COMPANIONS.values() for kind, _ in added)
        num_there, num_named = num_there + len(scene.objects), num_named + len(true)
        num_tempted += any(COMPANIONS.get(kind, kind) not in scene.kinds for kind, _ in true)
        num_added += len(added)
    assert abs(num_named / num_there - (1 - rates.forgotten)) < 0.07, "one object at least is named"
    assert abs(num_added / num_tempted - rates.careful_companion) < 0.05


@pytest.mark.parametrize("describe", [describe_plainly, describe_step_by_step])
def test_a_description_is_split_into_what_it_states(describe: Callable[..., str]) -> None:
    for scene in SCENES:
        text = describe(scene, ALL_FAULTS, random_for(0, scene.index, "split"))
        questions = split(text).splitlines()
        assert questions == [claim_text(kind, cell) for kind, cell in named(text)]
        asked = [ask_claim(kind, cell, scene).answers[0] for kind, cell in named(text)]
        assert [answer == "yes" for answer in asked] == [each in truth(scene) for each in named(text)]


def test_questions_to_confirm_are_true_balanced_and_tempting() -> None:
    answers, num_tempting = Counter[str](), 0
    for scene in SCENES:
        question = question_to_confirm(scene, random_for(0, scene.index, "confirm"))
        found = _CLAIMED.fullmatch(question.text)
        assert found, question.text
        colour, shape, place = found.groups()
        there = [(item.kind, item.cell) for item in scene.objects]
        is_true = ((colour, shape), PLACES.index(place)) in there if place else (colour, shape) in scene.kinds
        assert question.answers == ("yes" if is_true else "no",)
        answers[question.answers[0]] += 1
        num_tempting += (colour, shape) in {COMPANIONS[kind] for kind in scene.kinds & COMPANIONS.keys()} - scene.kinds
    assert 0.45 < answers["yes"] / answers.total() < 0.55 and num_tempting > 0.05 * len(SCENES)
