"""Captions of realistic lengths, and text to fill them: what the other benchmarks encode and store.

Lengths are token counts of whole prompts (template included), log-normal like those of real captioned sets.
"""

from __future__ import annotations

import random
from collections.abc import Callable

MEAN_TOKENS = 163  # of captions as vision models write them (performance.md)
SHORTEST, LONGEST = 60, 480
SENTENCE = (
    "a photo of the red square on white background painting two small blue circles in style large green triangle at "
    "top left black tiny yellow star bottom right quick brown fox jumps over lazy dog with and without its shadow in "
    "evening light soft focus wooden table window rain street portrait smiling woman old harbour mountain lake snow"
)


def lengths(count: int, *, seed: int = 0, mean: float = MEAN_TOKENS) -> list[int]:
    """Token counts with about this mean."""
    rng = random.Random(seed)
    drawn = [min(LONGEST, max(SHORTEST, rng.lognormvariate(0.0, 0.45) * mean)) for _ in range(count)]
    factor = mean * count / sum(drawn)
    return [min(LONGEST, max(SHORTEST, round(value * factor))) for value in drawn]


def texts(wanted: list[int], *, count_tokens: Callable[[str], int], seed: int = 0) -> list[str]:
    """Captions whose prompts have at least the wanted numbers of tokens, and hardly more."""
    rng = random.Random(seed)
    vocabulary = SENTENCE.split()
    made = []
    for tokens in wanted:
        words = [rng.choice(vocabulary)]
        while count_tokens(" ".join(words)) < tokens:
            words.append(rng.choice(vocabulary))
        made.append(" ".join(words))
    return made
