"""A base larger than the card: blocks wait in host memory, and each is copied to the device just ahead of its use.

Both passes walk the blocks in a line, so the next one is known: its weights travel on a stream of their own while this
one computes. Weights of two blocks are on the card at a time. The backward pass computes every block again and so asks
for its weights again; otherwise autograd would hold all of them on the card.
On a CPU the copies are real and only the overlap is missing, so that tests see the same moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flux2_core.accelerator import Lane
from flux2_core.model.transformer import blocks
from flux2_core.placement.recompute import again


class Stream:
    """The blocks' frozen weights on the host, and of at most two blocks on the device."""

    def __init__(self, transformer: Any, device: torch.device) -> None:
        self.lane = Lane(device)
        self.host: list[list[tuple[torch.nn.Parameter, torch.Tensor]]] = []
        self.there: dict[int, tuple[list[torch.Tensor], Any]] = {}
        self.last = -1
        for place, block in enumerate(blocks(transformer)):
            frozen = [parameter for parameter in block.parameters() if not parameter.requires_grad]
            self.host.append([(parameter, self.lane.home(parameter.data)) for parameter in frozen])
            block.forward = again(self._streamed(block.forward, place), "full")

    def _streamed(self, forward: Callable[..., Any], place: int) -> Callable[..., Any]:
        def with_weights(*args: Any, **kwargs: Any) -> Any:
            self._enter(place)
            try:
                return forward(*args, **kwargs)
            finally:  # recomputing stops in the middle of a block by raising
                self._leave(place)

        return with_weights

    def _enter(self, place: int) -> None:
        self._fetch(place)
        weights, copied = self.there[place]
        self.lane.wait(copied)
        for (parameter, _), weight in zip(self.host[place], weights, strict=True):
            parameter.data = weight
        ahead = place + (1 if place == 0 or place > self.last else -1)
        self.last = place
        for other in self.there.keys() - {place, ahead}:
            del self.there[other]
        if 0 <= ahead < len(self.host):
            self._fetch(ahead)

    def _leave(self, place: int) -> None:
        for parameter, home in self.host[place]:
            parameter.data = home  # autograd holds what it still needs of the copy, and lets go of it with the block
        if place < len(self.host) - 1:  # the last block is the first that the backward pass asks for
            del self.there[place]

    def _fetch(self, place: int) -> None:
        if place not in self.there:
            self.there[place] = self.lane.bring([home for _, home in self.host[place]])
