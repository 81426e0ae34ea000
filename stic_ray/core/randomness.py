"""Randomness that depends on what is drawn, never on order, time or worker."""

import hashlib
import random


def seed_for(seed: int, item_id: str, purpose: str) -> int:
    """Return a 63-bit seed that is a function of (seed, item id, purpose) alone.

    One machine and a hundred thus draw the same branch, prompt and corruption for the same image, in whatever
    order the images come.
    """
    digest = hashlib.blake2b(f"{seed}\x1f{item_id}\x1f{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def random_for(seed: int, item_id: str, purpose: str) -> random.Random:
    """Return a generator of its own for (seed, item id, purpose)."""
    return random.Random(seed_for(seed, item_id, purpose))


def is_drawn(seed: int, item_id: str, purpose: str, share: float) -> bool:
    """Return whether an item is among a share of all that is drawn by (seed, item id, purpose)."""
    return share >= 1.0 or random_for(seed, item_id, purpose).random() < share
