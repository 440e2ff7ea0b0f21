"""Relief: what there is to do where a card's memory is short or full, beside what was planned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from flux2_core.errors import SetupError
from flux2_core.placement import planner
from flux2_core.placement.planner import BYTES, LOOK, WORK, Job, Placement

LOG = logging.getLogger(__name__)


class Portions:
    """How much of an item one pass takes: up to `most`, and half of what a card was too full for from then on."""

    def __init__(self, most: float, *, size: Callable[[Any], int], alone: str) -> None:
        """Begin.

        Args:
            most: what a pass may hold; a pass of several things counts as so many of its largest.
            size: of a thing, in tokens or pixels.
            alone: what to do where one thing alone is too much, in words.
        """
        self.most, self.size, self.alone = most, size, alone

    def passes(self, things: list[Any], run: Callable[[list[Any]], Any]) -> Iterator[tuple[list[Any], Any]]:
        """All things in their order, by pass, with what `run` makes of each pass.

        Raises:
            SetupError: the card's memory is full with one of them.
        """
        waiting = [things]
        while waiting:
            part = waiting.pop()
            weight = len(part) * max(map(self.size, part))
            if len(part) == 1 or weight <= self.most:
                try:
                    made = run(part)
                except torch.OutOfMemoryError as error:
                    said = str(error).split(". ")[0]
                    if len(part) == 1:
                        raise SetupError(
                            f"the GPU's memory is full with a single one ({said}): {self.alone}"
                        ) from error
                    self.most = weight // 2
                    LOG.warning("the GPU's memory is full (%s): on with half as much a pass", said)
                else:
                    yield part, made
                    continue
            middle = len(part) // 2  # tried again here, where the error no longer holds what it was computing with
            waiting += [part[middle:], part[:middle]]


def levels_at_once(job: Job, now: Placement, levels: int) -> int:
    """Of a held-out picture's noise levels, as many as one pass takes in what a training step takes; one at least."""
    block = max(planner.block_costs(job, now.precision.removesuffix("-matmul"))["none"])
    step = now.activations + WORK * block * job.tokens - BYTES["fp32"] * job.adapter
    return max(1, min(levels, int(step * job.pictures // (LOOK * block * job.tokens))))


def next_smaller(job: Job, now: Placement) -> str:
    """What to set after running out of memory: the best placement that takes less, or what else there is."""
    free = planner.altered(job.config, train={"precision": "auto", "recompute": "auto"}, cluster={"strategy": "auto"})
    where = now.strategy, now.precision, now.recompute
    now = planner.place(job, *where, decodes=now.decodes)  # a CPU's placement carries no bytes
    goal = 0.95 * now.total
    for placement in planner.candidates(replace(job, config=free), goal):
        if planner.fits(job, placement, goal):
            return f"set {placement.settings()}: {placement.total / 1e9:.1f} GB instead of {now.total / 1e9:.1f}"
    return planner.ways_out(job, now)
