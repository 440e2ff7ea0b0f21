"""Randomness that follows from a seed and a name alone, whatever the number of processes."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator that depends on (seed, key) alone, so that draws do not depend on the number of workers."""
    text = "/".join(str(part) for part in (seed, *key))
    value = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(value)
