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


def bend(train: Train, before: int) -> str | None:
    """What more than `before` steps, which a run was to have, do to its rate; None where it runs straight on."""
    if train.schedule == "constant":
        return None
    then, now = rate(train.model_copy(update={"steps": before}), before - 1), rate(train, before)
    return (
        f'train.steps={train.steps}, {before} before: train.schedule="{train.schedule}" is over all steps, so after a '
        f"rate of {then:.3g} in step {before} it is {now:.3g} in the next one"
    )


def rate(train: Train, step: int) -> float:
    """Learning rate of step `step` (from 0): a linear warm-up, at the peak in its last step, then the curve."""
    if step < train.warmup_steps:
        return train.learning_rate * (step + 1) / train.warmup_steps
    done = (step - train.warmup_steps) / max(1, train.steps - train.warmup_steps)
    return train.learning_rate * choose(CURVES, train.schedule, setting="train.schedule")(done)
