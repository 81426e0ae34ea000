"""Near-duplicates among perceptual hashes, without comparing each with each.

Hashes that differ in at most d of 64 bits agree in at least m - d of m blocks of bits (Manku, Jain and Das Sarma,
"Detecting near-duplicates for web crawling", WWW 2007). For every choice of m - d blocks the hashes are sorted by
these blocks' bits, and only those that agree there are compared.
"""

import math
from itertools import combinations
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

NUM_BITS = 64


def block_masks(max_bits: int, num_hashes: int) -> list[int]:
    """Return the bit masks to sort by, so that any two hashes within `max_bits` agree under at least one of them.

    Each mask has so many bits that random hashes seldom agree by chance: the work then grows with their number and
    not with its square.
    """
    wanted_bits = math.log2(max(num_hashes, 2))
    num_blocks = max_bits + 1
    while NUM_BITS * (num_blocks - max_bits) / num_blocks < wanted_bits:
        num_blocks += 1
    edges = [block * NUM_BITS // num_blocks for block in range(num_blocks + 1)]
    blocks = [(1 << edges[i + 1]) - (1 << edges[i]) for i in range(num_blocks)]
    return [sum(chosen) for chosen in combinations(blocks, num_blocks - max_bits)]


def earlier_neighbours(hashes: Array, mask: int, max_bits: int) -> tuple[Array, Array]:
    """Return the places of hashes that agree under `mask` with an earlier one within `max_bits`, and that one's place.

    `hashes` are distinct, of type uint64, in the pool's order. Of several neighbours it is the last before the hash.
    """
    keys = hashes & np.uint64(mask)
    order = np.argsort(keys, kind="stable")
    keys, ordered = keys[order], hashes[order]
    begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    depth = np.arange(len(keys)) - np.repeat(begins, np.diff(np.append(begins, len(keys))))
    active = np.flatnonzero(depth)
    found: list[Array] = []
    neighbours: list[Array] = []
    step = 0
    while len(active):
        step += 1
        active = active[depth[active] >= step]
        near = np.bitwise_count(ordered[active] ^ ordered[active - step]) <= max_bits
        found.append(active[near])
        neighbours.append(active[near] - step)
        active = active[~near]
    places = np.concatenate([np.empty(0, np.int64), *found])
    return order[places], order[np.concatenate([np.empty(0, np.int64), *neighbours])]
