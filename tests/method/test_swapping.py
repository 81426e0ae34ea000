"""Two words of an answer change places: the text says something else, in the same words."""

import random
from collections import Counter

import pytest

from stic_ray.core.errors import Rejected
from stic_ray.core.schemas import Reason
from stic_ray.method.swapping import swap_words


def swaps(text: str) -> set[str]:
    return {swap_words(text, random.Random(seed)) for seed in range(60)}


def test_words_behind_the_same_word_change_places() -> None:
    assert swaps("There is a red circle at the left side and a blue square below it.") == {
        "There is a blue circle at the left side and a red square below it."
    }


def test_of_nothing_alike_any_two_words_change_places_but_neighbours() -> None:
    assert swaps("Two dogs chase one cat.") == {
        "Two cat chase one dogs.",
        "Two one chase dogs cat.",
        "Two dogs cat one chase.",
    }


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A dog.",
        "A cat and a dog.",
        "Dogs. Cats. Birds.",
        "It is here, and she was there.",
        "Red: a dog",
        "dog dog Dog",
        "一只狗在桌子上。",
    ],
)
def test_what_cannot_be_swapped_is_rejected(text: str) -> None:
    """Nothing to say, one word, a list where order says nothing, first words, small words, equal words, no spaces."""
    with pytest.raises(Rejected) as caught:
        swap_words(text, random.Random(0))
    assert caught.value.reason is Reason.IDENTICAL_ANSWERS


def test_first_words_of_sentences_and_everything_between_words_stay() -> None:
    text = "The man's hat is green.\n\n- The woman-like figure holds a  kite (yellow)!"
    for found in swaps(text):
        assert found != text and Counter(found) == Counter(text)
        assert found.startswith("The ") and ".\n\n- The " in found and found.endswith(")!")


def test_the_seed_decides() -> None:
    text = "A big dog and a small cat look at a brown door near a green tree."
    assert swap_words(text, random.Random(5)) == swap_words(text, random.Random(5))
    assert len(swaps(text)) > 3
