"""Instruction rows in LLaVA's format, and the description in front of the first question."""

from typing import Any

import pytest

from stic_ray.core.config import InfusionConfig
from stic_ray.core.errors import Rejected
from stic_ray.core.schemas import Reason
from stic_ray.method.infusion import description_prompt, infuse, read_conversation
from stic_ray.method.prompts import load_prompts

Turn = dict[str, Any]


def human(text: Any) -> Turn:
    return {"from": "human", "value": text}


def gpt(text: Any) -> Turn:
    return {"from": "gpt", "value": text}


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def assistant(text: str) -> Turn:
    return {"role": "assistant", "content": text}


def system(text: str) -> Turn:
    return {"role": "system", "content": text}


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([human("<image>\nWhat?"), gpt("A cat.")], [user("What?"), assistant("A cat.")]),
        ([human("What?\n<image>"), gpt("A cat.")], [user("What?"), assistant("A cat.")]),
        ([human("What?"), gpt("A cat.")], [user("What?"), assistant("A cat.")]),
        (
            [human("<image>\nWhat?"), gpt("A cat."), human("Colour?"), gpt("Red.")],
            [user("What?"), assistant("A cat."), user("Colour?"), assistant("Red.")],
        ),
        (
            [{"from": "system", "value": "Be brief."}, human("<image>\nWhat?"), gpt("A cat.")],
            [system("Be brief."), user("What?"), assistant("A cat.")],
        ),
        ([user("What?"), assistant("A cat.")], [user("What?"), assistant("A cat.")]),
        ([human("a < b > c <img>"), gpt(" Yes.\n")], [user("a < b > c <img>"), assistant("Yes.")]),
    ],
    ids=["image first", "image last", "no image", "several turns", "system", "role/content", "other brackets"],
)
def test_a_conversation_is_read(turns: list[Turn], expected: list[Turn]) -> None:
    assert read_conversation(turns, has_image=True) == expected


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([], Reason.BAD_CONVERSATION),
        (None, Reason.BAD_CONVERSATION),
        ("human: hello", Reason.BAD_CONVERSATION),
        (5, Reason.BAD_CONVERSATION),
        ([gpt("A cat."), human("What?")], Reason.BAD_CONVERSATION),
        ([human("What?")], Reason.BAD_CONVERSATION),
        ([human("What?"), gpt("A cat."), human("Colour?")], Reason.BAD_CONVERSATION),
        ([human("What?"), human("Well?"), gpt("A cat.")], Reason.BAD_CONVERSATION),
        ([human("What?"), gpt("A"), gpt("cat.")], Reason.BAD_CONVERSATION),
        ([system("Be brief.")], Reason.BAD_CONVERSATION),
        ([human("What?"), system("Be brief."), gpt("A cat.")], Reason.BAD_CONVERSATION),
        ([{"from": "observer", "value": "x"}, gpt("y")], Reason.BAD_CONVERSATION),
        ([human(None), gpt("y")], Reason.BAD_CONVERSATION),
        ([human(["a", "b"]), gpt("y")], Reason.BAD_CONVERSATION),
        ([{"value": "no speaker"}, gpt("y")], Reason.BAD_CONVERSATION),
        (["What?", "A cat."], Reason.BAD_CONVERSATION),
        ([human("<image>\n<image>\nDifferences?"), gpt("None.")], Reason.SEVERAL_IMAGES),
        ([human("<image>\nA?"), gpt("a"), human("<image>\nB?"), gpt("b")], Reason.SEVERAL_IMAGES),
        ([human("What?"), gpt("")], Reason.EMPTY_ANSWER),
        ([human("What?"), gpt(" \n")], Reason.EMPTY_ANSWER),
        ([human("What?"), gpt("A cat."), human("Colour?"), gpt("<image>")], Reason.EMPTY_ANSWER),
    ],
)
def test_a_conversation_from_which_nothing_can_be_learned_is_rejected(turns: Any, expected: Reason) -> None:
    with pytest.raises(Rejected) as caught:
        read_conversation(turns, has_image=True)
    assert caught.value.reason is expected and caught.value.message


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("<image>\nHow many people are there?", Reason.NO_IMAGE),
        ("What is in <image 1>?", Reason.NO_IMAGE),
        ("<|image_pad|>What?", Reason.NO_IMAGE),
        ("Picture 1: <img>a/b.jpg</img>What?", Reason.NO_IMAGE),
        ("<ImageHere>What?", Reason.NO_IMAGE),
        ("[IMG]What?", Reason.NO_IMAGE),
        ("<video>\nWhat happens?", Reason.VIDEO),
        ("<|video_pad|>What happens?", Reason.VIDEO),
        ("<audio>What is said?", Reason.AUDIO),
    ],
)
def test_a_text_that_asks_for_what_is_not_there_is_rejected(question: str, expected: Reason) -> None:
    for texts in ([question, "a"], ["q", question]):
        with pytest.raises(Rejected) as caught:
            read_conversation([human(texts[0]), gpt(texts[1])], has_image=False)
        assert caught.value.reason is expected


def test_a_placeholder_inside_a_placeholder_is_removed() -> None:
    messages = read_conversation([human("What does <im<im<image>age>age> mean?"), gpt("A tag.")], has_image=True)
    assert messages[0]["content"] == "What does  mean?"


def test_speakers_are_known_in_any_case() -> None:
    turns = [{"from": "Human", "value": "What?"}, {"from": " GPT", "value": "A cat."}]
    assert read_conversation(turns, has_image=False) == [user("What?"), assistant("A cat.")]


def test_a_plain_prompt_is_drawn_for_each_row() -> None:
    prompts, config = load_prompts(None), InfusionConfig()
    drawn = [description_prompt(str(number), 3, config, prompts) for number in range(100)]
    assert set(drawn) == set(prompts.plain)
    assert drawn == [description_prompt(str(number), 3, config, prompts) for number in range(100)]
    assert drawn != [description_prompt(str(number), 4, config, prompts) for number in range(100)]
    assert description_prompt("1", 3, InfusionConfig(prompt="describe"), prompts) == prompts.describe


def test_the_description_goes_in_front_of_the_first_question_only() -> None:
    messages = [system("Be brief."), user("What?"), assistant("A cat."), user("Colour?"), assistant("Red.")]
    before = [dict(message) for message in messages]
    prompts = load_prompts(None)
    infused = infuse(messages, "A red cat {asleep}.", prompts)
    assert infused[1] == user(prompts.infused("A red cat {asleep}.", "What?"))
    assert infused[:1] + infused[2:] == messages[:1] + messages[2:]
    assert messages == before, "the conversation that was given is left alone"
