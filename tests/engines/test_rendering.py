"""Conversations in each family's chat template, and which parts of them are answers."""

from collections.abc import Callable

import pytest
from transformers import ProcessorMixin

from stic_ray.core.config import ModelConfig
from stic_ray.core.errors import ModelError
from stic_ray.engines.loading import load_processor
from stic_ray.engines.rendering import Message, render, split_answers, turn_end
from tests.engines.conftest import Checkpoints
from tests.engines.families import EMBEDDED

Processors = Callable[[str], ProcessorMixin]

ENDS = {"llava": "</s>", "llava_next": "</s>", "idefics3": "<end_of_utterance>", "toyworld": "</s>"}
"""The token that ends an assistant's turn; LLaVA's template leaves it out."""


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


CONVERSATIONS = {
    "one turn": [user("What is it?"), assistant("A red square.")],
    "two turns": [user("What is it?"), assistant("A red square."), user("And where?"), assistant("Top left.")],
    "the same answer twice": [user("Red?"), assistant("Yes."), user("Square?"), assistant("Yes.")],
    "an answer that repeats the question": [user("Say yes."), assistant("Say yes.")],
    "an answer of several lines": [user("List."), assistant("1. red\n\n2. blue {x}"), user("More?"), assistant("No")],
    "an answer in spaces": [user("What?"), assistant("  A cat. \n"), user("Sure?"), assistant(" Yes ")],
    "an answer with the words of the template": [user("Who speaks?"), assistant("USER: me. ASSISTANT: you.")],
    "one letter": [user("A or B?"), assistant("A")],
}


@pytest.fixture(scope="session")
def processor(checkpoint: Checkpoints) -> Processors:
    found: dict[str, ProcessorMixin] = {}

    def load(family: str) -> ProcessorMixin:
        if family not in found:
            found[family] = load_processor(ModelConfig(path=str(checkpoint(family))))
        return found[family]

    return load


def closed(processor: ProcessorMixin, messages: list[Message]) -> list[Message]:
    """The conversation with the token that a template leaves out at the end of an answer."""
    end = turn_end(processor)
    return [{**m, "content": m["content"] + end} if m["role"] == "assistant" else m for m in messages]


@pytest.mark.parametrize("with_image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("family", EMBEDDED)
def test_the_pieces_are_the_whole_text_and_the_answers_the_assistants_words(
    family: str, name: str, with_image: bool, processor: Processors
) -> None:
    messages = CONVERSATIONS[name]
    pieces = split_answers(processor(family), messages, with_image=with_image)
    whole = render(
        processor(family), closed(processor(family), messages), with_image=with_image, add_generation_prompt=False
    )
    assert whole.startswith("".join(text for text, _ in pieces)) and pieces[-1][1], "up to the end of the last answer"
    answers = [text for text, is_answer in pieces if is_answer]
    words = [message["content"] for message in messages if message["role"] == "assistant"]
    assert len(answers) == len(words)
    for answer, expected in zip(answers, words, strict=True):
        assert answer.endswith(ENDS[family])
        assert answer.removesuffix(ENDS[family]).strip() == expected.strip()
    questions = "".join(text for text, is_answer in pieces if not is_answer)
    assert all(message["content"] in questions for message in messages if message["role"] == "user")


@pytest.mark.parametrize("family", EMBEDDED)
def test_an_answer_begins_where_generation_begins(family: str, processor: Processors) -> None:
    """What is learned is what will be asked for: the text before an answer is the prompt of that answer."""
    messages = CONVERSATIONS["two turns"]
    pieces = split_answers(processor(family), messages, with_image=True)
    before = ""
    starts = []
    for text, is_answer in pieces:
        starts += [before] if is_answer else []
        before += text
    asked = closed(processor(family), messages)
    prompts = [
        render(processor(family), asked[:number], with_image=True, add_generation_prompt=True) for number in (1, 3)
    ]
    assert starts == prompts


@pytest.mark.parametrize("family", [name for name in EMBEDDED if name != "llava_next"])
def test_a_system_turn_is_no_answer(family: str, processor: Processors) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *CONVERSATIONS["one turn"]]
    pieces = split_answers(processor(family), messages, with_image=True)
    assert [text for text, is_answer in pieces if is_answer][0].strip() == f"A red square.{ENDS[family]}"
    assert "Be brief." in "".join(text for text, is_answer in pieces if not is_answer)


def test_a_turn_that_the_template_refuses_is_an_error_of_ours(processor: Processors) -> None:
    """LLaVA-NeXT's raises on a system turn: one such row of instruction data must not look like a defect."""
    messages = [{"role": "system", "content": "Be brief."}, *CONVERSATIONS["one turn"]]
    with pytest.raises(ModelError, match="Only user and assistant roles"):
        render(processor("llava_next"), messages, with_image=True, add_generation_prompt=False)


@pytest.mark.parametrize("family", EMBEDDED)
def test_the_image_is_beside_the_first_question_and_nowhere_else(family: str, processor: Processors) -> None:
    messages = CONVERSATIONS["two turns"]
    text = render(processor(family), messages, with_image=True, add_generation_prompt=False)
    assert text.count("<image>") == 1
    is_in_front = text.index("<image>") < text.index("What is it?")
    assert is_in_front == (family != "toyworld"), "whose template has it behind"
    assert text.index("<image>") < text.index("A red square.")
    assert "<image>" not in render(processor(family), messages, with_image=False, add_generation_prompt=False)


@pytest.mark.parametrize("family", EMBEDDED)
def test_the_end_of_a_turn_is_written_once(family: str, processor: Processors) -> None:
    messages = closed(processor(family), [user("What is it?"), assistant("A red square.")])
    text = render(processor(family), messages, with_image=False, add_generation_prompt=False)
    assert text.split("A red square.")[1].count(ENDS[family]) == 1
    assert turn_end(processor(family)) == ("</s>" if family == "llava" else "")


def test_a_template_that_rewrites_earlier_turns_is_refused(checkpoint: Checkpoints) -> None:
    """Some templates leave out the reasoning of all but the last answer: answers cannot be told by position."""
    parts = "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    template = (
        f"{{% for message in messages[-2:] %}}{{{{ message.role }}}}: {parts} {{% endfor %}}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    model = ModelConfig(path=str(checkpoint("llava")), chat_template=template)
    with pytest.raises(ModelError, match=r"model\.chat_template"):
        split_answers(load_processor(model), CONVERSATIONS["two turns"], with_image=False)
