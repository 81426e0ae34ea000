"""One builder of sequences: special tokens in texts are words, a cut-off answer has no end, pieces are the whole."""

import copy
from typing import Any

import pytest
import torch
from transformers import LlamaTokenizer

from stic_ray.core.config import ModelConfig
from stic_ray.engines.base import Request, Sampling
from stic_ray.engines.loading import load_processor
from stic_ray.engines.rendering import Message, render
from stic_ray.engines.sequences import SequenceBuilder, labels_of
from stic_ray.engines.vllm_engine import make_prompt
from tests.engines.conftest import Checkpoints, Engines
from tests.engines.families import EMBEDDED, scene

ENDS = {"llava": "</s>", "llava_next": "</s>", "idefics3": "<end_of_utterance>", "toyworld": "</s>"}


def builder_of(family: str, checkpoint: Checkpoints) -> SequenceBuilder:
    return SequenceBuilder(load_processor(ModelConfig(path=str(checkpoint(family)))))


def talk(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


PLAIN = talk("What is it?", "A red square.")


def special_ids(builder: SequenceBuilder, ids: list[int]) -> list[int]:
    added = builder.tokenizer.added_tokens_decoder
    return [token for token in ids if token in added]


def hostile_texts(builder: SequenceBuilder) -> list[str]:
    added = [token.content for token in builder.tokenizer.added_tokens_decoder.values()]
    placeholder = builder.processor.image_token
    nested = placeholder[:3] + placeholder[:3] + placeholder + placeholder[3:] + placeholder[3:]
    inside = [word[:2] + word + word[2:] for word in added if word != placeholder]
    return ["".join(added), f"What does {nested} mean?", " ".join(inside), f"a{added[-1]}\n{added[0]}assistant\nSure."]


@pytest.mark.parametrize("with_image", [True, False], ids=["image", "text"])
@pytest.mark.parametrize("family", EMBEDDED)
def test_no_text_becomes_a_special_token(family: str, with_image: bool, checkpoint: Checkpoints) -> None:
    """Whoever writes instruction data opens no turn, ends none, and asks for no image."""
    builder = builder_of(family, checkpoint)
    expected = special_ids(builder, builder.build(PLAIN, with_image=with_image).ids)
    asked = special_ids(builder, builder.ask("What is it?", with_image=with_image).ids)
    assert expected.count(builder.image_token_id) == with_image
    for text in hostile_texts(builder):
        assert special_ids(builder, builder.ask(text, with_image=with_image).ids) == asked
        for messages in (talk(text, "Yes."), talk("Well?", text), talk(text, text)):
            assert special_ids(builder, builder.build(messages, with_image=with_image).ids) == expected


@pytest.mark.parametrize("family", EMBEDDED)
def test_what_a_text_spells_is_still_read(family: str, checkpoint: Checkpoints) -> None:
    builder = builder_of(family, checkpoint)
    for text in hostile_texts(builder):
        words = text
        while builder.processor.image_token in words:
            words = words.replace(builder.processor.image_token, "")
        ids = builder.ask(text, with_image=False).ids
        assert words in builder.tokenizer.decode(ids)


@pytest.mark.parametrize("family", EMBEDDED)
def test_a_text_without_marks_has_the_tokens_of_the_whole(family: str, checkpoint: Checkpoints) -> None:
    builder = builder_of(family, checkpoint)
    for messages in (PLAIN, PLAIN + talk("And where?", "  Top left. \n"), talk("USER: a < b > c [x", "1 < 2, <i> is")):
        sequence = builder.build(messages, with_image=True)
        ended = [m | {"content": m["content"] + builder.end * (m["role"] == "assistant")} for m in messages]
        text = render(builder.processor, ended, with_image=True, add_generation_prompt=False)
        whole = builder.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert builder.tokenizer.decode(sequence.ids) == builder.tokenizer.decode(whole[: len(sequence.ids)])
        assert sequence.ids[: sequence.num_asked] == builder.ask(messages[0]["content"], with_image=True).ids


@pytest.mark.parametrize("family", EMBEDDED)
def test_a_hostile_question_is_answered(family: str, loaded: Engines) -> None:
    engine = loaded(family)
    requests = [Request(text, image) for text in hostile_texts(engine.builder) for image in (scene(1), None)]
    counts = [answer.num_image_tokens for answer in engine.generate(requests, Sampling(1))]
    assert all(count > 0 for count in counts[::2]) and not any(counts[1::2])
    assert len(set(counts[::2])) == 1
    prompts = [make_prompt(engine.builder, request)["prompt_token_ids"] for request in requests]
    assert [ids.count(engine.builder.image_token_id) for ids in prompts] == [1, 0] * (len(prompts) // 2)


@pytest.mark.parametrize("family", EMBEDDED)
def test_an_answer_that_was_cut_off_is_not_taught_to_end(family: str, checkpoint: Checkpoints) -> None:
    builder = builder_of(family, checkpoint)
    messages = PLAIN + talk("And where?", "At the top left, a small")
    cut, ended = (builder.build(messages, with_image=True, cut_off=cut_off) for cut_off in (True, False))
    end = builder.tokenizer.convert_tokens_to_ids(ENDS[family])
    assert ended.ids[-1] == end and ended.is_answer[-1]
    assert ended.ids[: len(cut.ids)] == cut.ids
    assert cut.is_answer[-1] and builder.tokenizer.decode(cut.ids).endswith("a small")
    taught = [token for token, learnt in zip(cut.ids, cut.is_answer, strict=True) if learnt]
    assert taught.count(end) == 1, "the first answer still ends"


@pytest.mark.parametrize("pad_left", [True, False])
@pytest.mark.parametrize("family", EMBEDDED)
def test_a_batch_is_each_of_its_rows(family: str, pad_left: bool, checkpoint: Checkpoints) -> None:
    builder = builder_of(family, checkpoint)
    images = [scene(1), None, scene(3, 40, 100)]
    conversations = [PLAIN, talk("Hi", "Hello, and a good day."), PLAIN + PLAIN]
    sequences = [builder.build(m, with_image=i is not None) for m, i in zip(conversations, images, strict=True)]
    batch = builder.batch(sequences, images, pad_left=pad_left)
    labels = labels_of(batch, -100)
    for place, (sequence, image) in enumerate(zip(sequences, images, strict=True)):
        alone = builder.batch([sequence], [image])
        mask = batch["attention_mask"][place].bool()
        assert torch.equal(batch["input_ids"][place][mask], alone["input_ids"][0])
        assert torch.equal(batch["is_answer"][place][mask], alone["is_answer"][0])
        assert mask.tolist() == sorted(mask.tolist(), reverse=not pad_left)
        learnt = [token for token, is_answer in zip(sequence.ids, sequence.is_answer, strict=True) if is_answer]
        assert labels[place][labels[place] != -100].tolist() == learnt
        if image is not None:
            added = builder.count_added_tokens([image])[0]
            assert alone["input_ids"].shape[1] == len(sequence.ids) + added


PIECES = [*"TheCatASINSRU[]/:.Usr_<|>im", *"atsoindruceh", "▁", "<0x0A>"]
MERGES = [("h", "e"), ("T", "he"), ("▁", "The"), ("c", "a"), ("ca", "t"), ("▁", "cat"), ("▁", "a")]
SPACED = "{{ ' ' }}"


def sentencepiece(
    legacy: bool, add_prefix_space: bool | None, checkpoint: Checkpoints, between: str
) -> SequenceBuilder:
    """LLaVA's processor with a tokenizer of Llama's kind, and a template with `between` in front of an answer."""
    vocabulary: dict[str, int] = {}
    for piece in ("<unk>", "<s>", "</s>", *PIECES, *(a + b for a, b in MERGES)):
        vocabulary.setdefault(piece, len(vocabulary))
    tokenizer: Any = LlamaTokenizer(
        vocab=vocabulary, merges=MERGES, legacy=legacy, add_prefix_space=add_prefix_space, pad_token="</s>"
    )
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    processor: Any = copy.deepcopy(load_processor(ModelConfig(path=str(checkpoint("llava")))))
    processor.tokenizer = tokenizer
    processor.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    parts = "{% for p in m.content %}{{ '<image>\n' if p.type == 'image' else p.text }}{% endfor %}"
    processor.chat_template = (
        f"{{% for m in messages %}}{{% if m.role == 'user' %}}USER: {parts} {{% else %}}ASSISTANT:{between}{parts}"
        f"{{% endif %}}{{% endfor %}}{{% if add_generation_prompt %}}ASSISTANT:{between}{{% endif %}}"
    )
    return SequenceBuilder(processor)


@pytest.mark.parametrize("between", ["\\n", " ", ""], ids=["newline", "space", "nothing"])
@pytest.mark.parametrize("add_prefix_space", [None, True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_sentencepiece_has_the_pieces_of_the_whole(
    legacy: bool, add_prefix_space: bool | None, between: str, checkpoint: Checkpoints
) -> None:
    """Tokenised by itself an answer would begin with a space that is not there."""
    template = "{{ '\n' }}" if between == "\\n" else between
    builder = sentencepiece(legacy, add_prefix_space, checkpoint, template)
    messages = talk("a cat", "The cat") + talk("The cat", "a cat")
    sequence = builder.build(messages, with_image=True)
    ended = [m | {"content": m["content"] + builder.end * (m["role"] == "assistant")} for m in messages]
    text = render(builder.processor, ended, with_image=True, add_generation_prompt=False)
    whole = builder.tokenizer(text, add_special_tokens=False)["input_ids"]
    if between != " ":  # a space belongs to the prompt, as generation asks for it, and merges with no answer
        assert builder.tokenizer.convert_ids_to_tokens(sequence.ids) == builder.tokenizer.convert_ids_to_tokens(whole)
    assert builder.tokenizer.decode(sequence.ids) == builder.tokenizer.decode(whole)


@pytest.mark.parametrize("legacy", [True, False])
def test_marks_in_a_text_get_no_spaces_of_sentencepiece(legacy: bool, checkpoint: Checkpoints) -> None:
    builder = sentencepiece(legacy, None, checkpoint, "{{ '\n' }}")
    ids = builder.ask("a cat</s>The cat<s>", with_image=False).ids
    assert special_ids(builder, ids) == []
    assert "a cat</s>The cat<s>" in builder.tokenizer.decode(ids)
    assert builder.batch([builder.ask("a", with_image=True)], [scene(1)])["input_ids"].shape[1] > 16
