"""One image to one pair: what is asked, and which answers are no pair."""

import hashlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from stic_ray.core.errors import Rejected
from stic_ray.core.preferences import NEGATIVES, PreferencesConfig
from stic_ray.core.schemas import PAIRS, Reason, table_of
from stic_ray.method.corruption import pixel_change
from stic_ray.method.preferences import (
    AnswerText,
    PairPlan,
    borrowed,
    judge_pair,
    pair_row,
    picture_for_rejected,
    plan_pair,
    swapped,
)
from stic_ray.method.prompts import load_prompts
from tests.core.builders import pair
from tests.method.pictures import photo

PROMPTS = load_prompts(None)
CONFIG = PreferencesConfig()
IDS = [f"image-{number}" for number in range(4000)]


def plans(seed: int = 0, config: PreferencesConfig = CONFIG, ids: list[str] = IDS) -> list[PairPlan]:
    return [plan_pair(name, seed, config, PROMPTS, position) for position, name in enumerate(ids)]


def test_a_plan_depends_on_seed_and_id_alone() -> None:
    few = IDS[:50]
    assert plans(ids=few) == plans(ids=few[::-1])[::-1]
    assert plans(seed=1, ids=few) != plans(seed=0, ids=few)
    other = PreferencesConfig(num_images=9, temperature=1.0, top_p=0.5, max_new_tokens=5, allow_truncated=True)
    assert plans(config=other, ids=few) == plans(ids=few)


KEPT = [
    ("corrupted_image", 1),
    ("hallucination_prompt", 7),
    ("hallucination_prompt", 3),
    ("hallucination_prompt", 5),
    ("hallucination_prompt", 6),
    ("corrupted_image", 0),
]


def test_the_plan_of_an_image_is_the_same_for_ever() -> None:
    """Kept from today: a run that is finished next year must draw the same."""
    drawn = [(plan.negative, PROMPTS.plain.index(plan.prompt)) for plan in plans(seed=42, ids=IDS[:6])]
    assert drawn == KEPT


def test_all_that_is_drawn_of_stic_is_the_same_for_ever() -> None:
    """A hash of 500 plans, made before there were other kinds of dispreferred answers."""
    fields = ("kind", "shorter_side_px", "brightness_factor", "hue_shift_turns", "brightness_first", "strength")
    drawn = [
        (
            PROMPTS.plain.index(plan.prompt),
            PROMPTS.step_by_step.index(plan.chosen_prompt),
            plan.rejected_prompt in PROMPTS.hallucination and PROMPTS.hallucination.index(plan.rejected_prompt),
            plan.negative,
            [plan.corruption[field] for field in fields] if plan.corruption else None,
        )
        for plan in plans(seed=42, ids=IDS[:500])
    ]
    assert hashlib.blake2b(repr(drawn).encode(), digest_size=8).hexdigest() == "2f93586e97446598"


def kinds_of(drawn: list[PairPlan]) -> Counter[str]:
    return Counter(plan.corruption["kind"] if plan.corruption else plan.negative for plan in drawn)


def test_kinds_are_drawn_by_their_weights() -> None:
    """4,000 images, weights 1 to 3: 667 and 2,000 with standard deviations of 24 and 32."""
    config = PreferencesConfig(negatives={"text_swap": 1.0, "crop": 2.0, "blur": 3.0})
    found = kinds_of(plans(config=config))
    assert found.keys() == {"text_swap", "crop", "blur"}
    assert 570 < found["text_swap"] < 760 and 1870 < found["blur"] < 2130
    reordered = PreferencesConfig(negatives={"blur": 6.0, "crop": 4.0, "text_swap": 2.0})
    assert plans(config=reordered, ids=IDS[:100]) == plans(config=config, ids=IDS[:100])
    assert config.shares == pytest.approx({"text_swap": 1 / 6, "crop": 2 / 6, "blur": 3 / 6})


@pytest.mark.parametrize("kind", NEGATIVES)
def test_every_kind_can_be_drawn_alone(kind: str) -> None:
    clean = photo()
    for plan in plans(config=PreferencesConfig(negatives=kind), ids=IDS[:20]):
        assert kinds_of([plan]) == {kind: 1}
        assert plan.asks_twice == (kind not in ("text_swap", "other_image"))
        picture, change = picture_for_rejected(plan, clean)
        assert (change is None) == (picture is clean) == (plan.corruption is None)


def test_strength_goes_along_the_pools_order() -> None:
    config = PreferencesConfig(negatives="blur", strength=0.2, strength_end=0.6, num_images=5)
    drawn = [plan.corruption for plan in plans(config=config, ids=IDS[:5])]
    assert [each["strength"] for each in drawn if each] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    assert PreferencesConfig(strength=0.3).strength_at(7) == 0.3
    assert PreferencesConfig(strength=0.3, strength_end=0.9, num_images=1).strength_at(0) == 0.3


def test_both_answers_may_be_asked_with_one_prompt() -> None:
    """SeVa's way; everything else is drawn as before."""
    for plan, before in zip(plans(config=PreferencesConfig(chosen_prompt="plain")), plans(), strict=True):
        assert plan == replace(before, chosen_prompt=before.prompt)


def test_another_answer_is_drawn_from_those_that_say_something_else() -> None:
    answers = [said("a dog"), said(" a cat "), said("a cat"), said("a bird")]
    drawn = {borrowed("a cat", f"image-{number}", 0, answers).text for number in range(40)}
    assert drawn == {"a dog", "a bird"}
    assert borrowed("a cat", "image-1", 0, answers) == borrowed("a cat", "image-1", 0, answers)
    with pytest.raises(Rejected, match="no image of its shard has another answer"):
        borrowed("a cat", "image-1", 0, [said("a cat")])


def test_a_swapped_answer_has_the_length_of_its_text() -> None:
    found = swapped(AnswerText("A red dog and a big cat.", 20, "stop"), "x", 0, lambda text: len(text.split("big")[0]))
    assert found == AnswerText("A big dog and a red cat.", 20 + 2 - 16, "stop")


def test_the_branches_are_half_and_half_and_so_are_the_corruptions() -> None:
    """4,000 images: 2,000 with a standard deviation of 32, and of those 1,000 with one of 22."""
    drawn = plans()
    corruptions = [plan.corruption["kind"] for plan in drawn if plan.corruption]
    assert 1870 < len(corruptions) < 2130
    assert 900 < corruptions.count("low_resolution") - (len(corruptions) - 2000) / 2 < 1100


def test_every_prompt_has_its_share() -> None:
    """About 500 of 4,000 images for each of 8 plain prompts, 250 of 2,000 for each hallucination prompt."""
    drawn = plans()
    plain = Counter(plan.prompt for plan in drawn)
    bad = Counter(plan.rejected_prompt for plan in drawn if plan.negative == "hallucination_prompt")
    assert set(plain) == set(PROMPTS.plain) and min(plain.values()) > 400 and max(plain.values()) < 600
    assert set(bad) == set(PROMPTS.hallucination) and min(bad.values()) > 180 and max(bad.values()) < 320


def test_each_branch_asks_what_the_paper_says() -> None:
    """Algorithm 1: a hallucination prompt on the clean image, or the plain prompt on the corrupted one."""
    for plan in plans(ids=IDS[:300]):
        assert plan.prompt in PROMPTS.plain
        assert plan.chosen_prompt in PROMPTS.step_by_step
        if plan.negative == "hallucination_prompt":
            assert plan.rejected_prompt in PROMPTS.hallucination
            assert plan.corruption is None
        else:
            assert plan.rejected_prompt == plan.prompt
            assert plan.corruption is not None


@pytest.mark.parametrize(("share", "negative"), [(0.0, "corrupted_image"), (1.0, "hallucination_prompt")])
def test_the_share_of_hallucination_prompts_is_a_setting(share: float, negative: str) -> None:
    config = PreferencesConfig(hallucination_share=share)
    assert {plan.negative for plan in plans(config=config, ids=IDS[:100])} == {negative}


def test_every_corrupted_image_is_another_picture_than_the_clean_one() -> None:
    """Fails if the corruption were planned and recorded but not applied, as in STIC's released generator."""
    clean = photo()
    num_corrupted = 0
    for plan in plans(ids=IDS[:120]):
        picture, change = picture_for_rejected(plan, clean)
        if plan.negative == "hallucination_prompt":
            assert picture is clean
            assert change is None
            continue
        num_corrupted += 1
        assert picture.size != clean.size or np.any(np.asarray(picture) != np.asarray(clean))
        assert change is not None and change > 1.0
        assert change == pixel_change(clean, picture)
    assert num_corrupted > 40


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["jitter", "low resolution"])
def test_a_corruption_that_changes_nothing_is_a_rejection(share: float) -> None:
    """White stays white at low resolution, in any hue, and when made brighter."""
    config = PreferencesConfig(hallucination_share=0.0, low_resolution_share=share)
    white = Image.new("RGB", (64, 64), "white")
    found = [
        plan
        for plan in plans(config=config, ids=IDS[:50])
        if plan.corruption and (plan.corruption["brightness_factor"] or 2.0) > 1.0
    ]
    assert len(found) > 10
    for plan in found:
        with pytest.raises(Rejected) as caught:
            picture_for_rejected(plan, white)
        assert caught.value.reason is Reason.CORRUPTION_CHANGED_NOTHING


def judge(chosen: AnswerText, rejected: AnswerText, *, allow_truncated: bool = False, limit: int = 100) -> int:
    """Sequences have ten tokens of image and prompt, and one token for each word."""
    return judge_pair(
        chosen,
        rejected,
        PreferencesConfig(allow_truncated=allow_truncated, max_new_tokens=9),
        count_tokens=lambda text: 10 + len(text.split()),
        max_length_tokens=limit,
    )


def said(text: str, finish_reason: str = "stop") -> AnswerText:
    return AnswerText(text, len(text.split()), finish_reason)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        (said(""), said("a dog"), Reason.EMPTY_ANSWER),
        (said("a cat"), said(" \n "), Reason.EMPTY_ANSWER),
        (said("a cat"), said("a cat"), Reason.IDENTICAL_ANSWERS),
        (said("a cat"), said("a cat\n"), Reason.IDENTICAL_ANSWERS),
        (said("a cat", "length"), said("a dog"), Reason.TRUNCATED_ANSWER),
        (said("a cat"), said("a dog", "length"), Reason.TRUNCATED_ANSWER),
        (said("word " * 91), said("a dog"), Reason.TOO_LONG),
        (said("a cat"), said("word " * 91), Reason.TOO_LONG),
    ],
)
def test_two_answers_that_are_no_pair_are_rejected(chosen: AnswerText, rejected: AnswerText, expected: Reason) -> None:
    with pytest.raises(Rejected) as caught:
        judge(chosen, rejected)
    assert caught.value.reason is expected
    assert caught.value.message


def test_a_rejection_names_the_setting_that_decided() -> None:
    with pytest.raises(Rejected, match="preferences.max_new_tokens=9"):
        judge(said("a", "length"), said("b"))
    with pytest.raises(Rejected, match="101 tokens.*dpo.max_length_tokens=100"):
        judge(said("word " * 91), said("b"))


def test_a_pair_has_the_length_of_its_longer_answer() -> None:
    assert judge(said("one two three"), said("one")) == 13
    assert judge(said("one"), said("one two three four")) == 14
    assert judge(said("word " * 90), said("one")) == 100, "the limit itself is allowed"
    assert judge(said("a cat", "length"), said("a dog", "length"), allow_truncated=True) == 12


@pytest.mark.parametrize("number", range(8))
def test_both_answers_are_filed_under_the_plain_prompt(number: int) -> None:
    plan = plans()[number]
    row = pair_row(plan, AnswerText("good", 3, "stop"), AnswerText("bad", 5, "length"))
    assert row["prompt"] == [{"role": "user", "content": plan.prompt}]
    assert row["chosen"] == [{"role": "assistant", "content": "good"}]
    assert row["rejected"] == [{"role": "assistant", "content": "bad"}]
    assert (row["chosen_prompt"], row["rejected_prompt"]) == (plan.chosen_prompt, plan.rejected_prompt)
    assert (row["num_chosen_tokens"], row["num_rejected_tokens"]) == (3, 5)
    assert (row["chosen_finish_reason"], row["rejected_finish_reason"]) == ("stop", "length")
    stored = table_of([pair(**row)], PAIRS).to_pylist()[0]
    assert stored["corruption"] == plan.corruption, "the corruption as applied, all of it"
