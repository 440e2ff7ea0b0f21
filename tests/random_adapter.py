"""An adapter that does something: one factor begins at zero, and then the others have no gradient to compare."""

from typing import Any

import torch

from flux2_core.config.sections import Config
from flux2_core.lora import adapter
from flux2_core.lora.kinds import KINDS
from flux2_core.train.trainer import Trainer
from tests.in_process import fill_cache

ZERO = tuple(f".{leaf}" for kind in KINDS.values() for leaf in kind.zero)


def randomised(trainer: Trainer) -> None:
    """Give what begins at zero values, so that the others have a gradient too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.adapter.items():
            if name.endswith(ZERO):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def prepared(config: Config) -> Trainer:
    """A trainer whose caches are filled and whose adapter does something."""
    fill_cache(config)
    trainer = Trainer(config)
    randomised(trainer)
    return trainer


def state(transformer: Any) -> dict[str, torch.Tensor]:
    """Copies of an adapter's weights."""
    return {name: parameter.detach().clone() for name, parameter in adapter.parameters(transformer)}
