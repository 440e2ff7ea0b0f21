"""A model larger than the card: blocks wait in host memory, and each is copied to the device just ahead of its use.

Both passes walk the blocks in a line, so the next one is known: its weights travel on a stream of their own while this
one computes. Without gradients no pass goes back: behind the last block comes the first. They take turns in two
buffers, and a copy waits until the card is done with what lay there. The backward pass computes every block again and
so asks for its weights again; otherwise autograd would hold all of them on the card. What it keeps of a block until
then are the Parameters of a buffer, never those of the host (decisions/0031).
On a CPU the copies are real and only the overlap is missing, so that tests see the same moves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from flux2_core.accelerator import Lane
from flux2_core.lora.told import Told
from flux2_core.placement.recompute import again

APART = 256  # bytes from which a tensor may begin: whole elements of every dtype, and all that kernels load at once


class Stream:
    """The blocks' frozen weights on the host, and of two blocks at a time in the buffers on the device."""

    def __init__(self, blocks: Sequence[Any], device: torch.device, *, told: Told | None = None) -> None:
        self.lane = Lane(device)
        self.blocks = [Waiting(block, self.lane) for block in blocks]
        most = max(block.memory.nbytes for block in self.blocks)
        self.buffers = [torch.empty(most, dtype=torch.uint8, device=device) for _ in range(2)]
        self.there = [-1, -1]  # the block in each buffer
        self.copied: list[Any] = [None, None]
        self.last = -1
        for place, block in enumerate(blocks):
            block.forward = again(self._streamed(block.forward, place), "full", told=told)

    def _streamed(self, forward: Callable[..., Any], place: int) -> Callable[..., Any]:
        on_card = [cut(buffer, self.blocks[place].homes) for buffer in self.buffers]

        def with_weights(*args: Any, **kwargs: Any) -> Any:
            self.blocks[place].lay(on_card[self._enter(place)])
            try:
                return forward(*args, **kwargs)
            finally:  # recomputing stops in the middle of a block by raising
                self.blocks[place].lay(self.blocks[place].homes)

        return with_weights

    def _enter(self, place: int) -> int:
        """The buffer in which a block's weights are from now on; those of the next one set out for the other."""
        buffer = self._fetch(place, keep=self.last)
        self.lane.wait(self.copied[buffer])
        learns, count = torch.is_grad_enabled(), len(self.blocks)
        back = learns and (place == count - 1 or 0 < place <= self.last)
        ahead = place - 1 if back else place + 1 if learns else (place + 1) % count
        if 0 <= ahead < count:
            self._fetch(ahead, keep=place)
        self.last = place
        return buffer

    def _fetch(self, place: int, *, keep: int) -> int:
        if place not in self.there:
            buffer = 1 if self.there[0] == keep else 0
            self.copied[buffer] = self.lane.bring(self.blocks[place].memory, self.buffers[buffer])
            self.there[buffer] = place
        return self.there.index(place)


class Waiting:
    """A block's frozen weights, one behind the other in host memory of just their size."""

    def __init__(self, block: nn.Module, lane: Lane) -> None:
        frozen = {name: weight for name, weight in block.named_parameters() if not weight.requires_grad}
        self.owners = [(block.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in frozen]
        self.memory = lane.home(sum(room(weight) for weight in frozen.values()))
        self.homes = cut(self.memory, frozen.values())
        for home, weight in zip(self.homes, frozen.values(), strict=True):
            home.copy_(weight)
        self.lay(self.homes)  # and let go of what was read

    def lay(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put other Parameters into the block; the ones that stood there stay what they were to those who kept them."""
        for (owner, leaf), parameter in zip(self.owners, parameters, strict=True):
            setattr(owner, leaf, parameter)


def room(weight: torch.Tensor) -> int:
    """Bytes of a weight and of the gap behind it."""
    return -(-weight.nbytes // APART) * APART


def cut(memory: torch.Tensor, like: Iterable[torch.Tensor]) -> list[nn.Parameter]:
    """Frozen Parameters of these shapes and dtypes, one behind the other in `memory` (uint8)."""
    found, start = [], 0
    for weight in like:
        part = memory[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
        found.append(nn.Parameter(part, requires_grad=False))
        start += room(weight)
    return found
