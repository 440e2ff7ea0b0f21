"""The roofline: what encoding and training will take on a card, from counted work and data sheets, before any run.

Each kind of work is divided by the card's rate for it, by its data sheet, times the share of it that is reached; they
add up, as kernels run one after the other. Every time is a span: likely, least and most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from flux2_core import accelerator
from flux2_core.config.sections import Config
from flux2_core.errors import UsageError
from flux2_core.model.folder import ModelFolder
from flux2_core.placement import planner
from flux2_core.placement.planner import BYTES, Job, Placement
from flux2_core.plan import flops
from flux2_core.plan.flops import Work
from flux2_core.plan.memory import GPUS_PER_NODE

HOUR_S = 3600


class Pace(NamedTuple):
    """Shares of a card's rates that are reached."""

    matmul: float
    """Likely: 0.70 PFLOP/s of an H200's 0.99; 0.79 was seen on one."""
    eight: float
    """Of matmuls in 8 bits; at best with fast accumulation."""
    attention: float
    """Forward and backward: 0.21 s of cuDNN for FLUX.2-dev's 88 TFLOP on an H200."""
    memory: float
    """4 TB/s of an H200's 4.8."""
    link: float
    """Between cards, and from the host."""


PACES = {  # to the time that is likely, the least and the most
    "likely": Pace(0.70, 0.45, 0.42, 0.83, 0.70),
    "least": Pace(0.85, 0.70, 0.60, 0.92, 0.85),
    "most": Pace(0.55, 0.35, 0.30, 0.65, 0.50),
}
KERNEL_S = 5e-6  # the host launches one
NETWORK = 50  # GB/s between nodes for each GPU, whose rings share them all: 400 Gbit/s each, as H100 nodes have


class Card(NamedTuple):
    """A data sheet: TFLOP/s without sparsity, accumulated in fp32; GB/s, of links in one direction."""

    name: str
    bf16: float
    fp8: float
    """0 where the card has none."""
    int8: float
    fp32: float
    memory: float
    gib: float
    """Of memory, as the driver tells it."""
    host: float
    """From the host: PCIe 4.0 or 5.0, 16 lanes."""
    peers: float
    """To the other cards of a node: NVLink, or PCIe."""

    def rate(self, kind: str) -> float:
        """TFLOP/s of products of this kind."""
        rates = {"bf16": self.bf16, "tf32": self.bf16 / 2, "fp32": self.fp32, "fp8": self.fp8, "int8": self.int8}
        return rates[kind]


# NVIDIA's data sheets: A100 80GB SXM (2021), H100 SXM (2023), L40S (2023), H200 SXM (2024), HGX B200 (2025; half of
# what it says with sparsity); of RTX cards the appendices of the white papers on Ada (2022) and RTX Blackwell (2025).
CARDS = (
    Card("A100", 312, 0, 624, 19.5, memory=2039, gib=79.2, host=32, peers=300),
    Card("H100", 989, 1979, 1979, 67, memory=3350, gib=79.1, host=64, peers=450),
    Card("H200", 989, 1979, 1979, 67, memory=4800, gib=139.8, host=64, peers=450),
    Card("L40S", 362, 733, 733, 91.6, memory=864, gib=44.5, host=32, peers=32),
    Card("RTX 4090", 165.2, 330.3, 660.6, 82.6, memory=1008, gib=23.6, host=32, peers=32),
    Card("RTX 5090", 209.5, 419, 838, 104.8, memory=1792, gib=31.4, host=64, peers=64),
    Card("B200", 2250, 4500, 4500, 75, memory=8000, gib=178.4, host=64, peers=900),
)
OTHERWISE = CARDS[1]  # where no card of the table is at hand: what is rented most


def named(device: str) -> Card | None:
    """The card in a device's name ("NVIDIA H200", "NVIDIA GeForce RTX 4090")."""
    return next((card for card in CARDS if card.name in device), None)


@dataclass(frozen=True)
class Traffic:
    """Bytes that each worker sends (or is sent) in a step."""

    gradients: float = 0.0
    """Of the adapter, summed over all workers in a ring once a step."""
    gathered: float = 0.0
    """Of a sharded base, for each pass forward and backward."""
    streamed: float = 0.0
    """Of blocks from host memory, likewise."""


def traffic(job: Job, placement: Placement) -> Traffic:
    """What a placement moves between cards, or from the host, for a step."""
    found, world = job.sizes, job.world
    kind = placement.precision.removesuffix("-matmul")
    per, thick = BYTES[kind], BYTES["fp32" if kind == "fp32" else "bf16"]
    blocks = (found.double * found.double_parameters + found.single * found.single_parameters) * per
    forward, backward = flops.passes(job)
    group = {"fsdp": world, "hsdp": job.local}.get(placement.strategy, 1)
    return Traffic(
        gradients=2 * (world - 1) / world * BYTES["fp32"] * job.adapter,
        gathered=(group - 1) / group * ((forward + backward) * blocks + forward * found.outside * thick),
        streamed=(forward + backward) * blocks if placement.strategy == "stream" else 0.0,
    )


def kernels(work: Work, card: Card, pace: Pace) -> dict[str, float]:
    """Seconds that a card is busy, by what with."""
    products = sum(
        flop / (card.rate(kind) * (pace.eight if kind in ("fp8", "int8") else pace.matmul))
        for kind, flop in work.products.items()
    )
    return {
        "matmuls": max(products / 1e12, work.weights / (card.memory * pace.memory * 1e9)),
        "attention": work.attention / (card.bf16 * pace.attention * 1e12),
        "memory": work.moved / (card.memory * pace.memory * 1e9),
    }


def links(job: Job, placement: Placement, card: Card, pace: Pace) -> dict[str, float]:
    """Seconds of a step that the card's links are busy, by what with."""
    moved = traffic(job, placement)
    between = min(card.peers, NETWORK * job.local if job.world > job.local else card.peers)
    rates = {"gathering": card.peers if placement.strategy == "hsdp" else between, "streaming": card.host}
    sent = {"gathering": moved.gathered, "streaming": moved.streamed, "gradients": moved.gradients}
    return {name: size / (rates.get(name, between) * pace.link * 1e9) for name, size in sent.items()}


def step(job: Job, placement: Placement, work: Work, card: Card, pace: Pace) -> dict[str, float]:
    """Seconds of a step by what takes them; of what runs beside the kernels only what it is slower by."""
    found = kernels(work, card, pace)
    beside = links(job, placement, card, pace) | {"launches": work.kernels * KERNEL_S}
    after = {"gradients": beside.pop("gradients")}
    slowest = max(beside, key=lambda name: beside[name])
    found[slowest] = max(0.0, beside[slowest] - sum(found.values()))
    return found | after


def estimate(
    config: Config,
    model: ModelFolder,
    *,
    image: float,
    encoding: Mapping[str, Work],
    memory: Mapping[str, Any],
    time: Mapping[str, Any],
) -> dict[str, Any]:
    """What `plan` can say before anything was measured; loading, compiling, validation and previews come on top.

    Args:
        config: The configuration.
        model: Its model.
        image: Tokens of a picture and of its references, on average.
        encoding: What is to be encoded, by kind of row.
        memory: What the planner said (`plan.memory`).
        time: What was measured (`plan.rates`): in the sums it takes the place of what is estimated.
    """
    device = accelerator.name(accelerator.here()) or ""
    card, workers = named(device) or OTHERWISE, config.cluster.workers
    told: dict[str, Any] = {"card": card.name, "here": card.name in device}
    job = planner.job(config, model, world=workers, local=min(workers, accelerator.count() or GPUS_PER_NODE))
    try:
        placement = _placement(job, memory, card)
        work = flops.step(job, placement, model, image)
        if not all(card.rate(kind) for kind in work.products):
            raise UsageError(f'{card.name} cards multiply nothing in 8-bit floats: set train.precision="int8-matmul"')
    except UsageError as error:
        return told | {"reason": str(error)}
    spans = {kind: _over(partial(kernels, each, card)) for kind, each in encoding.items()}
    a_step = _over(partial(step, job, placement, work, card))
    spans["train"] = {name: seconds * config.train.steps for name, seconds in a_step.items()}
    hours = dict.fromkeys(PACES, 0.0)
    for kind, span in spans.items():
        known, devices = time[kind], workers if kind == "train" else 1
        for name, seconds in span.items():
            hours[name] += (known["seconds"] if known else seconds) * devices / HOUR_S
    price, likely = config.cluster.price, step(job, placement, work, card, PACES["likely"])
    told |= {"strategy": placement.strategy, "precision": placement.precision, "recompute": placement.recompute}
    told |= {"tflop": round(work.flop / 1e12, 3), "most_of_it": max(likely, key=lambda name: likely[name])}
    spans |= {"step": a_step, "gpu_hours": hours}
    spans |= {} if price is None else {"cost": {name: price * value for name, value in hours.items()}}
    return told | {what: {name: float(f"{value:.3g}") for name, value in span.items()} for what, span in spans.items()}


def _placement(job: Job, memory: Mapping[str, Any], card: Card) -> Placement:
    """What the planner chose for the cards that it knows of, else what it would for this one."""
    if reason := memory.get("refused"):
        raise UsageError(reason)
    if chosen := memory.get("chosen"):
        return Placement(chosen["strategy"], chosen["precision"], chosen["recompute"])
    return planner.decide(job, planner.card(job.config, card.gib * 2**30))


def _over(parts: Callable[[Pace], Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(parts(pace).values()) for name, pace in PACES.items()}
