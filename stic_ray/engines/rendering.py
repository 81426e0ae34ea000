"""Conversations in a model's chat template, and answers out of its tokens."""

from collections.abc import Sequence

import jinja2
from transformers import GenerationConfig, ProcessorMixin

from stic_ray.core.errors import ModelError, one_line
from stic_ray.engines.base import Answer
from stic_ray.method.media import without_placeholder

Message = dict[str, str]
Pieces = list[tuple[str, bool]]
"""Consecutive pieces of a rendered conversation, each with whether it is an answer."""


def render(
    processor: ProcessorMixin, messages: Sequence[Message], *, with_image: bool, add_generation_prompt: bool
) -> str:
    """Return a conversation as text, the image's placeholder in front of the first question.

    Placeholders inside the texts are removed: they would ask for images that are not there. Raises ModelError when
    the template refuses the conversation.
    """
    structured = []
    image_placed = not with_image
    for message in messages:
        text = remove_placeholders(processor, message["content"])
        content: list[dict[str, str]] = [{"type": "text", "text": text}]
        if message["role"] == "user" and not image_placed:
            content.insert(0, {"type": "image"})
            image_placed = True
        structured.append({"role": message["role"], "content": content})
    try:
        return str(
            processor.apply_chat_template(structured, tokenize=False, add_generation_prompt=add_generation_prompt)
        )
    except (jinja2.TemplateError, TypeError) as error:
        raise ModelError(f"The chat template refuses the conversation: {one_line(error)}") from error


def remove_placeholders(processor: ProcessorMixin, text: str) -> str:
    """Return a text without placeholders of images, those that appear when another is removed included."""
    placeholder = getattr(processor, "image_token", None)
    return without_placeholder(text, placeholder) if placeholder else text


def turn_end(processor: ProcessorMixin) -> str:
    """Return what must be added to an answer so that the model learns to stop: "" or the end-of-text token.

    Many templates close an assistant's turn with a special token; LLaVA's leave it open. Raises ModelError for a
    template that does not show the turn.
    """
    probe = "answer"
    conversation = [{"role": "user", "content": "question"}, {"role": "assistant", "content": probe}]
    text = render(processor, conversation, with_image=False, add_generation_prompt=False)
    _, found, tail = text.rpartition(probe)
    if not found:
        raise ModelError(
            "The chat template changes or drops what an assistant says; give another with model.chat_template=FILE."
        )
    closed = any(token in tail for token in processor.tokenizer.all_special_tokens)
    return "" if closed else str(processor.tokenizer.eos_token)


def split_answers(
    processor: ProcessorMixin,
    messages: Sequence[Message],
    *,
    with_image: bool,
    cut_off: bool = False,
    end: str | None = None,
) -> Pieces:
    """Return the rendered conversation up to its last answer in pieces, each with whether it is an answer.

    An answer piece ends with the token that ends the turn; what a template puts behind it is no answer. A last answer
    that was `cut_off` ends with its own text. `end` is what `turn_end` returns. Raises ModelError for a template whose
    text up to a turn is not the beginning of the text with that turn.
    """
    end = turn_end(processor) if end is None else end
    answered = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    ended = answered[:-1] if cut_off else answered
    closed = [{**m, "content": m["content"] + end} if n in ended else m for n, m in enumerate(messages)]
    whole = render(processor, closed, with_image=with_image, add_generation_prompt=False)
    pieces: Pieces = []
    done = 0
    for number in answered:
        before = render(processor, closed[:number], with_image=with_image, add_generation_prompt=True)
        start, text = len(before), closed[number]["content"].strip()
        found = whole.find(text, start)
        if not whole.startswith(before) or found < 0 or whole[start:found].strip():
            raise ModelError(
                "The chat template does not keep earlier turns as they are when a turn is added, so answers cannot "
                "be separated from questions; give another with model.chat_template=FILE."
            )
        stop = found + len(text)
        if not end and number in ended:
            tail, marks = whole[stop:], processor.tokenizer.all_special_tokens
            place, length = min((tail.index(mark), len(mark)) for mark in marks if mark and mark in tail)
            stop += place + length
        pieces += [(whole[done:start], False), (whole[start:stop], True)]
        done = stop
    pieces += [] if answered else [(whole, False)]
    return [(text, is_answer) for text, is_answer in pieces if text]


def end_token_ids(processor: ProcessorMixin, generation_config: GenerationConfig) -> list[int]:
    """Return the tokens that end an answer: those of the generation configuration, and the tokenizer's own."""
    ends = generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    return sorted({*ends, processor.tokenizer.eos_token_id} - {None})


def read_answer(
    processor: ProcessorMixin,
    ids: Sequence[int],
    end_ids: Sequence[int],
    num_image_tokens: int,
    num_added_tokens: int,
) -> Answer:
    """Return what the tokens `ids` behind a prompt say, up to the first one that ends an answer."""
    end = next((place for place, token in enumerate(ids) if token in end_ids), None)
    kept = list(ids[:end])
    text = processor.tokenizer.decode(kept, skip_special_tokens=True)
    # A placeholder that the model spelled out would ask for an image when the answer is trained on.
    text = remove_placeholders(processor, text).strip()
    return Answer(text, len(kept), "length" if end is None else "stop", num_image_tokens, num_added_tokens)
