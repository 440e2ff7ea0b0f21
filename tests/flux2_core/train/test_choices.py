"""One table per choice (see also `test_tables.py`): a value without an entry is refused by name, where it is used."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flux2_core import noise
from flux2_core.config.objective import Loss, Noise
from flux2_core.config.sections import Train
from flux2_core.data import needs
from flux2_core.errors import UsageError, choose
from flux2_core.train import losses, optimizers, schedules
from flux2_core.train.methods import table as methods

TABLES: dict[str, Mapping[str, Any]] = {
    "train.optimizer": optimizers.OPTIMIZERS,
    "train.schedule": schedules.CURVES,
    "noise.distribution": noise.DISTRIBUTIONS,
    "loss.kind": losses.LOSSES,
    "loss.delta_schedule": losses.DELTAS,
    "loss.weighting": losses.WEIGHTINGS,
}


def test_every_method_has_both_halves() -> None:
    """A method that computes says what it needs, and the other way round; a made-up one is refused by either."""
    assert needs.NEEDS.keys() == methods.METHODS.keys()
    asked: Any = SimpleNamespace(methods=("magic",))
    for half in (needs, methods):
        with pytest.raises(UsageError, match=r"method='magic'.* of flow, preference, rollout, slider, dop, blank"):
            half.of(asked)


def unchecked(**train: Any) -> Train:
    """Settings as they would come from a configuration that allows more than the table has."""
    return Train().model_copy(update=train)


def off(**loss: Any) -> torch.Tensor:
    """A loss as it would be asked for by a configuration that allows more than the table has."""
    one = torch.ones(1, 4, 128)
    return losses.loss_B(Loss().model_copy(update=loss), one, -one, sigma_B=torch.ones(1), height=2)


UNKNOWN = Loss().model_copy(update={"weighting": "sum"})
USES: dict[str, Callable[[], Any]] = {
    "noise.distribution='bimodal'": lambda: noise.Levels(Noise().model_copy(update={"distribution": "bimodal"})),
    "loss.kind='lpips'": lambda: off(kind="lpips"),
    "loss.delta_schedule='cosine'": lambda: off(delta_schedule="cosine"),
    "loss.weighting='sum'": lambda: losses.Weights(UNKNOWN, noise.Levels(Noise())),
    "train.schedule='sawtooth'": lambda: schedules.rate(unchecked(schedule="sawtooth"), 3),
    "train.optimizer='sgd'": lambda: optimizers.build(unchecked(optimizer="sgd"), {}),
}


@pytest.mark.parametrize("given", USES)
def test_another_value_is_refused(given: str) -> None:
    """A value without an entry ends loudly, with the setting, the value and all there are: none is taken instead."""
    setting = given.split("'")[0].rstrip("=")
    with pytest.raises(UsageError) as refused:
        USES[given]()
    assert str(refused.value).startswith(given)
    assert str(refused.value).endswith(", ".join(TABLES[setting]))


def test_an_entry_is_found() -> None:
    """A value with an entry gives that entry, whatever stands in it."""
    assert choose({"a": 1, "b": None}, "b", setting="s") is None
