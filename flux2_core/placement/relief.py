"""Relief: what there is to do where a card's memory is short or full, beside what was planned."""

from __future__ import annotations

from dataclasses import replace

from flux2_core.placement import planner
from flux2_core.placement.planner import BYTES, LOOK, WORK, Job, Placement


def levels_at_once(job: Job, now: Placement, levels: int) -> int:
    """Of a held-out picture's noise levels, as many as one pass takes in what a training step takes; one at least."""
    block = max(planner.block_costs(job, now.precision.removesuffix("-matmul"))["none"])
    step = now.activations + WORK * block * job.tokens - BYTES["fp32"] * job.adapter
    return max(1, min(levels, int(step * job.pictures // (LOOK * block * job.tokens))))


def next_smaller(job: Job, now: Placement) -> str:
    """What to set after running out of memory: the best placement that takes less, or what else there is."""
    free = planner.altered(job.config, train={"precision": "auto", "recompute": "auto"}, cluster={"strategy": "auto"})
    now = planner.place(job, now.strategy, now.precision, now.recompute)  # a CPU's placement carries no bytes
    goal = 0.95 * now.total
    for placement in planner.candidates(replace(job, config=free), goal):
        if planner.fits(job, placement, goal):
            return f"set {placement.settings()}: {placement.total / 1e9:.1f} GB instead of {now.total / 1e9:.1f}"
    return planner.ways_out(job, now)
