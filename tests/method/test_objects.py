"""Objects that a response names, and the three scores made of them."""

import time

import pytest

from stic_ray.method.scoring import METRICS, any_hallucination, hallucinated_share, named_objects, object_f1

WORLD = (
    "dog|puppy|puppies",
    "cat",
    "hot dog",
    "person|man|woman|people",
    "bus",
    "car",
    "bench",
    "couch|Sofa",
    "dining table|table",
    "table tennis bat",
    "fire truck",
    "truck",
    "T-shirt",
    "wine glass",
    "glasses",
    "potato",
    "TV",
)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("A dog and a cat.", ["dog", "cat"]),
        ("DOG! (Cat?)", ["dog", "cat"]),
        ("dogs, cats; buses/cars", ["dog", "cat", "bus", "car"]),
        ("benches and potatoes", ["bench", "potato"]),
        ("The dog's bowl, the cats' bowl", ["dog", "cat"]),
        ("A dog, another dog and two dogs", ["dog"]),
        ("A puppy beside a dog", ["dog"]),
        ("Puppies", ["dog"]),
        ("a sofa, no: a couch", ["couch"]),
        ("cat, dog, cat", ["cat", "dog"]),
        ("There is no dog.", ["dog"]),
        ("A hot dog", ["hot dog"]),
        ("Hot-dogs", ["hot dog"]),
        ("a hot\n  dog", ["hot dog"]),
        ("A hot dog for the dog", ["hot dog", "dog"]),
        ("It is hot. Dogs sleep.", ["dog"]),
        ("a hot, tired dog", ["dog"]),
        ("dining tables", ["dining table"]),
        ("a table with a table tennis bat", ["dining table", "table tennis bat"]),
        ("a fire truck and trucks", ["fire truck", "truck"]),
        ("a t-shirt, a T shirt", ["T-shirt"]),
        ("a wine glass, wine glasses", ["wine glass"]),
        ("glasses", ["glasses"]),
        ("a tv", ["TV"]),
        ('**dog**, "cat"', ["dog", "cat"]),
        ("dog--a brown one", ["dog"]),
        ("dog - brown", ["dog"]),
        ("a dog\u2014brown", ["dog"]),
        ("men", []),
        ("dogma, hotdog, category, carpet, scar", []),
        ("a dog-friendly cafe, a sheep-dog, an on-bench seat", []),
        ("someone cares", []),
        ("2dogs", []),
        ("", []),
        (" \n", []),
        ("...", []),
    ],
)
def test_named_objects(response: str, expected: list[str]) -> None:
    assert named_objects(response, WORLD) == expected
    assert named_objects(", ".join(expected), WORLD) == expected, "what was read out reads the same again"


@pytest.mark.parametrize(
    ("response", "there", "f1", "share", "any_wrong"),
    [
        ("A dog and a cat.", ["dog", "cat"], 1.0, 0.0, 0.0),
        ("A dog.", ["dog", "cat"], 2 / 3, 0.0, 0.0),
        ("A dog and a bus.", ["dog", "cat"], 0.5, 0.5, 1.0),
        ("A bus.", ["dog", "cat"], 0.0, 1.0, 1.0),
        ("A bus, a bus, a bus and a dog", ["dog"], 2 / 3, 0.5, 1.0),
        ("Two puppies.", ["dog"], 1.0, 0.0, 0.0),
        ("A hot dog.", ["dog"], 0.0, 1.0, 1.0),
        ("A hot dog.", ["hot dog"], 1.0, 0.0, 0.0),
        ("", ["dog"], 0.0, 0.0, 0.0),
        ("Nothing.", ["dog"], 0.0, 0.0, 0.0),
        ("Nothing.", [], 1.0, 0.0, 0.0),
        ("", [], 1.0, 0.0, 0.0),
        ("A dog.", [], 0.0, 1.0, 1.0),
        ("A dog, a cat, a bus and a car.", ["dog", "cat", "car"], 6 / 7, 0.25, 1.0),
    ],
)
def test_scores_of_objects(response: str, there: list[str], f1: float, share: float, any_wrong: float) -> None:
    found = [score(response, there, WORLD) for score in (object_f1, hallucinated_share, any_hallucination)]
    assert found == pytest.approx([f1, share, any_wrong])
    for name in ("object_f1", "hallucinated_share", "any_hallucination"):
        read = METRICS[name].read(response, WORLD)
        assert METRICS[name].score(read, there, WORLD) == METRICS[name].score(response, there, WORLD)


@pytest.mark.parametrize("name", ["c++", "(dog)", "a.b", "na\u00efve caf\u00e9", "Stra\u00dfe"])
def test_a_name_is_no_pattern(name: str) -> None:
    assert named_objects(f"Here: {name.upper()}, there.", (name, "other")) == [name]
    assert named_objects("aab cc (dogs)", ("c++", "a.b")) == []


def test_a_large_vocabulary_is_fast() -> None:
    """COCO has 80 objects, their synonyms make some 400 phrases; a description has some 150 words."""
    vocabulary = [f"thing{number}|object {number}|item of kind {number}" for number in range(400)]
    text = "There stands a wooden object 7 beside item of kind 399 and some thing. " * 12
    named_objects(text, vocabulary)
    start = time.perf_counter()
    for _ in range(20):
        assert named_objects(text, vocabulary) == ["thing7", "thing399"]
    assert time.perf_counter() - start < 2.0
