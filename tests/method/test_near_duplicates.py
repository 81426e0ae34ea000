"""Near-duplicates found without comparing each with each are those that comparing each with each finds."""

import numpy as np
import pytest

from stic_ray.method.near_duplicates import block_masks, earlier_neighbours


def hashes_with_relatives(number: int, max_bits: int, seed: int) -> np.ndarray:
    """Random hashes, and for many of them others that differ in up to two bits more than allowed."""
    generator = np.random.default_rng(seed)
    values = [int(value) for value in generator.integers(0, 2**63, number)]
    for value in values[: number // 2]:
        flips = generator.choice(64, generator.integers(1, max_bits + 3), replace=False)
        values.append(value ^ sum(1 << int(bit) for bit in flips))
    distinct = np.unique(np.array(values, np.uint64))
    return generator.permutation(distinct)


def all_pairs(hashes: np.ndarray, max_bits: int) -> set[int]:
    """Places of hashes with an earlier one within so many bits."""
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    return set(np.flatnonzero((np.tril(distances <= max_bits, k=-1)).any(axis=1)).tolist())


@pytest.mark.parametrize("max_bits", [0, 1, 3, 4, 6])
def test_the_same_are_found_as_by_comparing_all(max_bits: int) -> None:
    hashes = hashes_with_relatives(300, max_bits, seed=max_bits)
    found: set[int] = set()
    for mask in block_masks(max_bits, len(hashes)):
        places, neighbours = earlier_neighbours(hashes, mask, max_bits)
        assert (neighbours < places).all()
        assert (np.bitwise_count(hashes[places] ^ hashes[neighbours]) <= max_bits).all()
        assert len(set(places.tolist())) == len(places)
        found |= set(places.tolist())
    expected = all_pairs(hashes, max_bits)
    assert found == expected
    assert expected or max_bits == 0


def test_hashes_that_are_much_alike_are_found_too() -> None:
    """All in one cell of many masks: pages of text, skies."""
    generator = np.random.default_rng(0)
    values = {sum(1 << int(bit) for bit in generator.choice(24, 8, replace=False)) for _ in range(500)}
    hashes = generator.permutation(np.array(sorted(values), np.uint64))
    found: set[int] = set()
    for mask in block_masks(2, len(hashes)):
        found |= set(earlier_neighbours(hashes, mask, 2)[0].tolist())
    assert found == all_pairs(hashes, 2)


@pytest.mark.parametrize("max_bits", [0, 1, 4, 6])
@pytest.mark.parametrize("num_hashes", [1, 1000, 10**6, 10**8])
def test_masks_have_bits_enough_to_keep_strangers_apart(max_bits: int, num_hashes: int) -> None:
    masks = block_masks(max_bits, num_hashes)
    assert min(mask.bit_count() for mask in masks) >= np.log2(num_hashes) - 3
    assert len(set(masks)) == len(masks)
    assert len(masks) < 1000


def test_no_hash_has_no_neighbour() -> None:
    places, neighbours = earlier_neighbours(np.empty(0, np.uint64), 2**64 - 1, 0)
    assert len(places) == len(neighbours) == 0
