"""The course of the learning rate: a warm-up, then one of five curves, as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from flux2_core.config.sections import Train
from flux2_core.errors import choose

RESTARTS = 4  # cycles of `cosine-restarts`
POWER = 2.0  # of `polynomial`

# share of the steps after the warm-up that are done (0..1, 1 excluded) -> factor on `train.learning_rate`
CURVES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "cosine-restarts": lambda done: (1 + math.cos(math.pi * (RESTARTS * done % 1))) / 2,
    "polynomial": lambda done: (1 - done) ** POWER,
}


def rate(train: Train, step: int) -> float:
    """Learning rate of step `step` (from 0): a linear warm-up, at the peak in its last step, then the curve."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return train.learning_rate * choose(CURVES, train.schedule, setting="train.schedule")(done)
