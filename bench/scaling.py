"""FLUX.2-dev's step on 1, 8, 16 and 64 GPUs, on paper: time, traffic, memory and efficiency, and what limits it.

Nothing is run: rows come from the formulas of `plan` (`flux2_core.plan.roofline`) and go into docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench import sizes
from flux2_core.config.reading import parse
from flux2_core.placement import planner
from flux2_core.placement.planner import Job
from flux2_core.plan import flops, roofline
from flux2_core.plan.memory import GPUS_PER_NODE
from flux2_core.plan.roofline import PACES, Card

GPUS = (1, 8, 16, 64)
IMAGE = 4096  # tokens of 1024 px
CASES = {  # card and precision of the base, to the strategies that are shown; the first one on one GPU too
    ("H200", "bf16"): ("ddp",),
    ("H100", "bf16"): ("ddp", "hsdp", "fsdp"),
    ("H100", "fp8-matmul"): ("ddp",),
    ("A100", "bf16"): ("ddp", "fsdp"),
    ("RTX 4090", "int8"): ("stream", "fsdp"),
}
HEAD = ("card, base", "GPUs", "placement", "s a step", "pictures/s", "efficiency", "sent", "on the card", "most of it")


def rows() -> Iterator[tuple[str, ...]]:
    """The head, then a row for each card, number of GPUs and strategy; sent is of each GPU and step."""
    yield (*HEAD, "links busy")
    for (name, precision), strategies in CASES.items():
        (card,) = (card for card in roofline.CARDS if card.name == name)
        alone = 0.0
        for gpus in GPUS:
            for strategy in strategies if gpus > 1 else strategies[:1]:
                if strategy == "hsdp" and gpus == GPUS_PER_NODE:
                    continue  # in one node it is fsdp
                told, seconds = _row(card, _job(precision, strategy, gpus))
                alone = alone or seconds
                efficiency = f"{alone / seconds:.0%}"
                yield (f"{name}, {precision}", str(gpus), *told[:3], efficiency, *told[3:])


def _job(precision: str, strategy: str, gpus: int) -> Job:
    """One picture of 1024 px for each GPU, rank 16 on every Linear of every block, compiled."""
    train = {"precision": precision, "batch_size": gpus, "compile": True}
    tree = {
        "model": {"path": "x"},
        "data": [{"path": "x"}],
        "train": train,
        "cluster": {"strategy": strategy, "workers": gpus},
    }
    return planner.job(parse(tree), sizes.sized(tiny=False), world=gpus, local=min(gpus, GPUS_PER_NODE))


def _row(card: Card, job: Job) -> tuple[tuple[str, ...], float]:
    """What is shown of a job on its fastest placement that fits, and the seconds that are likely."""
    chosen = planner.decide(job, planner.card(job.config, card.gib * 2**30))
    work = flops.step(job, chosen, sizes.sized(tiny=False), IMAGE)
    parts, least, most = (roofline.step(job, chosen, work, card, pace) for pace in PACES.values())
    seconds = sum(parts.values())
    moved = roofline.traffic(job, chosen)
    largest = max(parts, key=lambda name: parts[name])
    busy = sum(roofline.links(job, chosen, card, PACES["likely"]).values())
    shown = (
        f"{chosen.strategy}, recompute {chosen.recompute}",
        f"{seconds:.2f} ({sum(least.values()):.2f}-{sum(most.values()):.2f})",
        f"{job.world / seconds:.3g}",
        f"{(moved.gradients + moved.gathered + moved.streamed) / 1e9:.2f} GB",
        f"{chosen.total / 1e9:.1f} GB",
        f"{largest} {parts[largest] / seconds:.0%}",
        f"{busy / seconds:.0%}",
    )
    return shown, seconds
