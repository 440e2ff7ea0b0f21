"""The course of the learning rate, against the formula of each curve."""

import math

import pytest

from flux2_core.config.sections import Train
from flux2_core.train.schedules import CURVES, rate

FORMULAS = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 0.5 + 0.5 * math.cos(math.pi * t),
    "cosine-restarts": lambda t: 0.5 + 0.5 * math.cos(math.pi * (4 * t - math.floor(4 * t))),
    "polynomial": lambda t: (1 - t) * (1 - t),
}


@pytest.mark.parametrize("schedule", FORMULAS)
@pytest.mark.parametrize(("steps", "warm"), [(1, 0), (10, 0), (10, 2), (100, 7), (4, 8)])
def test_every_step_follows_the_formula(schedule: str, steps: int, warm: int) -> None:
    """A warm-up rises to the peak in equal parts; what follows is the curve over the steps that are left."""
    train = Train(steps=steps, warmup_steps=warm, schedule=schedule, learning_rate=3e-4)
    for step in range(steps):
        factor = (step + 1) / warm if step < warm else FORMULAS[schedule]((step - warm) / (steps - warm))
        assert rate(train, step) == pytest.approx(3e-4 * factor, rel=1e-12, abs=1e-18)


def test_ends() -> None:
    """All curves begin at the peak; all but constant end near zero, and restarts go back to the peak three times."""
    assert CURVES.keys() == FORMULAS.keys()
    for name, curve in CURVES.items():
        assert curve(0.0) == 1
        assert curve(1 - 1e-9) == pytest.approx(float(name == "constant"), abs=1e-6)
    restarts = [CURVES["cosine-restarts"](n / 4) for n in range(4)]
    assert restarts == [1, 1, 1, 1]
