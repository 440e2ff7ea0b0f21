"""An adapter that does something: `lora_B` begins at zero, and then `lora_A` has no gradient to compare."""

from typing import Any

import torch

from flux2_core.lora import adapter
from flux2_core.train.trainer import Trainer


def randomised(trainer: Trainer) -> None:
    """Give lora_B values, so that lora_A has a gradient too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in trainer.adapter.items():
            if name.endswith("lora_B.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


def state(transformer: Any) -> dict[str, torch.Tensor]:
    """Copies of an adapter's weights."""
    return {name: parameter.detach().clone() for name, parameter in adapter.parameters(transformer)}
