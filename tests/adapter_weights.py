"""The weights of an adapter as they are now, to compare."""

from typing import Any

import torch

from flux2_core.lora.adapter import parameters


def adapter_weights(transformer: Any) -> dict[str, torch.Tensor]:
    """A copy of the adapter's weights on the CPU, fp32."""
    return {name: parameter.detach().float().cpu().clone() for name, parameter in parameters(transformer)}
