"""What a pass tells the adapter: a factor for each sample and rank, on the thin products of its Linears.

`t-lora` keeps fewer ranks the noisier a sample is, each sample its own number; the model's own input says how noisy it
is, so training, validation and previews agree. Dropout leaves ranks out that were drawn with the batch, from (seed,
step, place of the sample) alone, while the model trains. A block that is computed again is told what it was told.

Legend: B samples, R ranks of all Linears one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flux2_core.lora.layer import AdaptedLinear


class Told:
    """What the Linears of one model are told."""

    def __init__(self, layers: Sequence[AdaptedLinear], ranks: Sequence[int], least: Sequence[int] | None) -> None:
        self.layers, self.ranks = layers, list(ranks)
        self.nothing: list[Tensor | None] = [None] * len(layers)
        self.now = self.nothing
        self.dropped_BR: Tensor | None = None
        """Factors of what is left in while the model trains; 0 for what is left out."""
        self.number_3R: Tensor | None = None
        if least is not None:
            each = zip(self.ranks, least, strict=True)
            self.number_3R = torch.tensor([(number, rank, few) for rank, few in each for number in range(rank)]).t()

    def listen(self, transformer: Any) -> None:
        """Have every pass of the model begin with this."""
        transformer.register_forward_pre_hook(self._begin, with_kwargs=True)

    def again(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The function, told later what is told now."""
        now = self.now

        def told(*args: Any, **kwargs: Any) -> Any:
            self._lay(now)
            return forward(*args, **kwargs)

        return told

    def _begin(self, transformer: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        factors_BR = None if self.number_3R is None else self._awake(self.number_3R, kwargs["timestep"])
        if transformer.training and self.dropped_BR is not None:
            dropped_BR = self.dropped_BR.repeat(len(kwargs["timestep"]) // len(self.dropped_BR), 1)  # a pair has one
            factors_BR = dropped_BR if factors_BR is None else factors_BR * dropped_BR
        self._lay(self.nothing if factors_BR is None else list(factors_BR.unsqueeze(1).split(self.ranks, dim=2)))

    def _lay(self, parts: list[Tensor | None]) -> None:
        """Tell each Linear its own part; no operator is run, since a policy of recomputing would count it."""
        if parts is not self.now:
            self.now = parts
            for layer, part_B1R in zip(self.layers, parts, strict=True):
                layer.told_B1R = part_B1R

    def _awake(self, number_3R: Tensor, sigma_B: Tensor) -> Tensor:
        """1 for the first floor((1 - sigma) (rank - least)) + least ranks of each Linear, 0 for others."""
        self.number_3R = number_3R.to(sigma_B.device)
        number_R, rank_R, least_R = self.number_3R
        awake_BR = ((1 - sigma_B.float())[:, None] * (rank_R - least_R)).floor() + least_R
        return (number_R < awake_BR).float()


def drop(share: float, ranks: int, generator: torch.Generator) -> Tensor:
    """Factors (R,) of one sample: 0 for that share of all ranks, on average, and more than 1 for the others."""
    return (torch.rand(ranks, generator=generator) >= share).float() / (1 - share)
