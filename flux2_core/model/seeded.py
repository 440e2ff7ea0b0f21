"""Randomness that follows from a seed and a name alone, whatever the number of processes."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator that depends on (seed, key) alone, so that draws do not depend on the number of workers."""
    return torch.Generator().manual_seed(int.from_bytes(_hash(seed, *key)[:8], "little") >> 1)


def numpy_generator(seed: int, *key: int | str) -> np.random.Generator:
    """The same for NumPy, which permutes what has an order."""
    return np.random.default_rng(np.frombuffer(_hash(seed, *key), dtype=np.uint64))


def _hash(*key: int | str) -> bytes:
    return hashlib.sha256("/".join(map(str, key)).encode()).digest()
