"""What asks for captions, and what of them an image is trained on."""

from collections import Counter
from typing import Any

import pytest

from stic_ray.core.config import CaptionsConfig, CorpusConfig
from stic_ray.core.errors import Rejected
from stic_ray.core.schemas import Reason
from stic_ray.method.captions import caption_prompts, newest, recaptions_of, target_of
from stic_ray.method.prompts import load_prompts

PROMPTS = load_prompts(None)


def caption(kind: str, round: int, text: str) -> dict[str, Any]:
    return {"kind": kind, "round": round, "text": text}


def test_one_prompt_of_all_the_parts_is_drawn_for_an_image_and_anew_in_each_round() -> None:
    config = CaptionsConfig(prompts=("plain", "describe"))
    drawn = [caption_prompts(f"image {n}", 0, config, PROMPTS) for n in range(300)]
    assert {*drawn} == {(prompt,) for prompt in [*PROMPTS.plain, PROMPTS.describe]}
    assert drawn == [caption_prompts(f"image {n}", 0, config, PROMPTS) for n in range(300)]
    later = config.model_copy(update={"round": 2})
    assert drawn != [caption_prompts(f"image {n}", 0, later, PROMPTS) for n in range(300)]


def test_a_specialist_is_asked_all_of_its_questions() -> None:
    config = CaptionsConfig(kind="specialist:counts", questions=("How many?", "Which?"))
    assert caption_prompts("any", 0, config, PROMPTS) == ("How many?", "Which?")


@pytest.mark.parametrize(
    ("template", "text", "source"),
    [
        ("side_by_side", "A cat. A cat on a mat.", "both"),
        ("recaption", "A cat on a mat.", "recaption"),
        ("original", "A cat.", "original"),
    ],
)
def test_a_template_says_what_is_learnt(template: Any, text: str, source: str) -> None:
    assert target_of("a", " A cat.\n", "A cat on a mat.", CorpusConfig(template=template), 0) == (text, source)


@pytest.mark.parametrize("template", ["side_by_side", "recaption", "original", "sample"])
def test_an_image_with_one_caption_has_that_one_and_is_counted_as_such(template: Any) -> None:
    config = CorpusConfig(template=template)
    assert target_of("a", None, "new", config, 0) == ("new", "recaption")
    assert target_of("a", "old", " ", config, 0) == ("old", "original")
    with pytest.raises(Rejected) as rejected:
        target_of("a", " ", None, config, 0)
    assert rejected.value.reason == Reason.NO_CAPTION


def test_a_sample_takes_each_caption_of_half_of_the_images() -> None:
    config = CorpusConfig(template="sample")
    counts = Counter(target_of(f"image {n}", "old", "new", config, 0).source for n in range(2000))
    assert counts["both"] == 0 and abs(counts["original"] - 1000) < 100


def test_the_last_round_of_each_kind_counts() -> None:
    captions = [caption("self", 1, "one"), caption("specialist:ocr", 3, "text"), caption("self", 2, "two")]
    assert newest(captions, "self") == [captions[2]] and newest(captions, "specialist:ocr") == [captions[1]]
    assert newest(captions, "specialist:other") == []


def test_shuffled_captions_are_those_of_other_images() -> None:
    captions = {name: [caption("self", 1, f"of {name}")] for name in "abc"} | {"d": []}
    assert recaptions_of(captions, shuffle=False) == {name: f"of {name}" for name in "abc"}
    assert recaptions_of(captions, shuffle=True) == {"a": "of b", "b": "of c", "c": "of a"}
    assert recaptions_of({"a": captions["a"], "d": []}, shuffle=True) == {}, "there is no other"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"kind": "other"}, "valid are self, and specialist:NAME"),
        ({"kind": "specialist:a b"}, "valid are self, and specialist:NAME"),
        ({"kind": "specialist:ocr"}, "needs questions"),
        ({"questions": ["What?"]}, "questions are a specialist's"),
        ({"num_answers": 2, "temperature": 0.0}, "set a temperature"),
        ({"pattern": "("}, "no regular expression"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        CaptionsConfig(**settings)
