"""Instruction rows in LLaVA's format, and the description in front of the first question."""

from typing import Any

import pytest

from stic_ray.core.schemas import Reason
from stic_ray.method.infusion import infuse, read_conversation
from stic_ray.method.preferences import Rejection
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
    assert read_conversation(turns) == expected


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
    result = read_conversation(turns)
    assert isinstance(result, Rejection)
    assert result.reason is expected
    assert result.message


def test_the_description_goes_in_front_of_the_first_question_only() -> None:
    messages = [system("Be brief."), user("What?"), assistant("A cat."), user("Colour?"), assistant("Red.")]
    before = [dict(message) for message in messages]
    prompts = load_prompts(None)
    infused = infuse(messages, "A red cat {asleep}.", prompts)
    assert infused[1] == user(prompts.infused("A red cat {asleep}.", "What?"))
    assert infused[:1] + infused[2:] == messages[:1] + messages[2:]
    assert messages == before, "the conversation that was given is left alone"
