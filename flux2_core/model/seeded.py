"""Randomness that follows from a seed and a name alone, whatever the number of processes; and fixed weights."""

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


def fixed(name: str, shape: torch.Size, number: int) -> torch.Tensor:
    """Values for a weight of a self-test: arithmetic alone, since a generator's stream may change with its version.

    Matrices have variance 1 / fan in, scales of norms lie around one.
    """
    place = torch.arange(shape.numel(), dtype=torch.float64)
    wave = torch.sin(0.37 * (place * place % 7919) + number).view(shape)
    if len(shape) > 1:
        return (wave * (2 / shape[1:].numel()) ** 0.5).float()
    return ((1 if name.endswith("weight") else 0) + 0.1 * wave).float()


def _hash(*key: int | str) -> bytes:
    return hashlib.sha256("/".join(map(str, key)).encode()).digest()
