"""The planner: where the frozen base lies, in which precision, and what is recomputed, so that a card holds it.

Bytes per device = base + kept activations + 16 per adapter parameter (fp32 weight, gradient, two moments; 4 more with
`train.ema`) + a margin, which holds the block that is at work, or a picture that is drawn and decoded where that takes
more. Where decoding is what does not fit, the CPU decodes. 0.94 of a card is planned for.
`stream` also takes host memory: all blocks, once for each worker of a node.
Everything follows from the model's own config.json. `plan` prints it, and the trainer asks the same function, so that
`auto` means what `plan` said. Times are relative estimates, used only to order what fits.

Legend: w inner width, m feed-forward width; "tokens" are image, reference and text tokens of all pictures of one pass.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flux2_core.config.dataset import Data
from flux2_core.config.sections import Config
from flux2_core.errors import UsageError
from flux2_core.lora import targets
from flux2_core.lora.kinds import KINDS
from flux2_core.model.folder import ModelFolder
from flux2_core.model.latents import PIXELS_PER_TOKEN

BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5625, "nf4": 0.5625}  # a fp32 scale per 64
ADAPTER_BYTES = 16
FILLED = 0.94  # of what is free on a card
# Most bytes of a block at work over what `none` keeps of it. Counted: 1.2 (double) to 1.7 (single) while it is computed
# again and differentiated, 0.7 to 1.3 without a gradient; 1.6 to 1.8 was measured of the former on profiles. At full
# size 2.2 was counted in fp32, where no copy of lower precision is what is kept (`bench.pretended`).
WORK, FP32_WORK, LOOK = 1.8, 2.3, 1.3
VAE, DECODED = 0.34e9, 3072  # bytes in fp32: of the VAE, and of three maps of 256 channels per pixel that it decodes
SPARE = 2e9  # the driver's context, communication buffers, what the allocator cannot use; an estimate
STRATEGY_COST = {"ddp": 1.0, "hsdp": 1.05, "fsdp": 1.08, "stream": 1.3}
# `selective` repeats no matmul, but its elementwise traffic is 1.4 times that of `none` (counted): 0.17 of 1.6 s of an
# eager step on an H200 (estimated), next to nothing of a compiled one; between them. `full`: 894 TFLOP instead of 596.
SELECTIVE_COST, FULL_COST = 1.06, 1.5
ELSEWHERE_COST = 0.1  # of pictures that the CPU decodes: four of 1024 px, 10 s each, every 250 steps (estimated)
PINNED = 0.9  # of the free host memory; the rest is for a block as it is read (2 GB), the workers and files' pages
PRODUCT = 8  # bytes of a value while an int8 product is scaled: int32 and fp32 side by side
GATHERED = 2  # blocks on a device at a time under fsdp, hsdp and stream


@dataclass(frozen=True)
class Sizes:
    """What a transformer's configuration says, as far as memory depends on it."""

    w: int
    m: int
    heads: int
    double: int
    single: int
    double_parameters: int
    single_parameters: int
    outside: int
    """Parameters outside the blocks: embedders, modulations, output layers; never quantised, never streamed."""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.double * self.double_parameters + self.single * self.single_parameters + self.outside

    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of every Linear inside a block, by its name."""
        w, m, found = self.w, self.m, {}
        for block in range(self.double):
            head = f"transformer_blocks.{block}"
            for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
                found[f"{head}.attn.{name}"] = (w, w)
            for part in ("ff", "ff_context"):
                found |= {f"{head}.{part}.linear_in": (w, 2 * m), f"{head}.{part}.linear_out": (m, w)}
        for block in range(self.single):
            head = f"single_transformer_blocks.{block}.attn"
            found |= {f"{head}.to_qkv_mlp_proj": (w, 3 * w + 2 * m), f"{head}.to_out": (w + m, w)}
        return found


@dataclass(frozen=True)
class Placement:
    """One way to lay the training out, and its bytes on each device (and in the host memory of each worker)."""

    strategy: str
    precision: str
    recompute: str | int
    base: float = 0.0
    activations: float = 0.0
    adapter: float = 0.0
    margin: float = 0.0
    host: float = 0.0
    decodes: bool = True
    """Whether pictures are decoded here; else on the CPU."""

    @property
    def total(self) -> float:
        """Bytes on each device."""
        return self.base + self.activations + self.adapter + self.margin

    def settings(self) -> str:
        """As one writes it into a configuration."""
        recompute = self.recompute if isinstance(self.recompute, int) else f'"{self.recompute}"'
        return f'train.precision="{self.precision}" cluster.strategy="{self.strategy}" train.recompute={recompute}'


@dataclass(frozen=True)
class Job:
    """What is to be placed: a model and what is done with it, by `world` workers, `local` of them in each node."""

    config: Config
    sizes: Sizes
    adapter: int
    """Parameters of the adapter."""
    world: int
    local: int
    host: float = math.inf
    """Bytes of host memory that are free in each node; without end where nobody knows."""
    even: bool = True
    """Whether every node has `local` of the workers; else the fullest has."""
    trains: bool = True
    """Whether a backward pass and an optimizer follow; else pictures are drawn."""

    @property
    def grid(self) -> bool:
        """Whether the base can be sharded inside nodes and replicated over them."""
        return self.even and self.local > 1 and self.world % self.local == 0

    @property
    def pictures(self) -> int:
        """Pictures of one forward pass of one worker, fillers among them."""
        share = -(-self.config.train.batch_size // self.world)
        return min(share, self.config.cluster.micro_batch or share)

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass of one worker, at the largest resolution."""
        return self._tokens(0.0)

    @property
    def routed(self) -> list[int]:
        """Those that go through each block (`tread`); all, where masks say which ones may not skip."""
        masked = any(data.masks for data in self.config.data)
        skipped = self.config.tread.skipped(self.sizes.double + self.sizes.single)
        return [self._tokens(skip * (not masked)) for skip in skipped]

    def _tokens(self, skip: float) -> int:
        """All but this share of the pictures' own."""
        sides = [(data, max(data.resolutions)) for data in self.config.data]
        images = [(image_tokens(data, side, len(data.references)), image_tokens(data, side, 0)) for data, side in sides]
        image = max(whole - int(skip * one) for whole, one in images)
        at_once = max(at_once for at_once, _, _ in self.config.passes)
        return self.pictures * at_once * (image + self.config.text.max_length)


def image_tokens(data: Data, side: int, references: int) -> int:
    """Most tokens of a picture of one side and of so many references beside it."""
    beside = data.reference_size if isinstance(data.reference_size, int) else side
    return (side // PIXELS_PER_TOKEN) ** 2 + references * (beside // PIXELS_PER_TOKEN) ** 2


def sizes(model: ModelFolder) -> Sizes:
    """Sizes of a model from its config.json; no module is built."""
    config = model.config("transformer")
    head, heads, channels = (config[k] for k in ("attention_head_dim", "num_attention_heads", "in_channels"))
    w = head * heads
    m = int(w * config["mlp_ratio"])
    embedders = (1 + model.guided) * (config["timestep_guidance_channels"] + w) * w
    modulations_and_norm = (6 + 6 + 3 + 2) * w * w
    rows = channels + config["joint_attention_dim"] + (config.get("out_channels") or channels)
    return Sizes(
        w, m, heads, config["num_layers"], config["num_single_layers"],
        double_parameters=8 * w * w + 6 * w * m + 4 * head,
        single_parameters=4 * w * w + 3 * w * m + 2 * head,
        outside=embedders + modulations_and_norm + rows * w,
    )  # fmt: skip


def job(
    config: Config, model: ModelFolder, *, world: int, local: int, host: float = math.inf, even: bool = True
) -> Job:
    """Count what a configuration asks of a model."""
    found = sizes(model)
    adapter = sum(map(math.prod, targets.shapes(config.lora, found.linears()).values()))
    return Job(config, found, adapter, world, local, host, even)


def policies(recompute: str | int, count: int) -> list[str]:
    """The policy of each of `count` blocks."""
    if isinstance(recompute, str):
        return [recompute] * count
    return ["full"] * min(recompute, count) + ["selective"] * (count - recompute)


def kept(found: Sizes, policy: str, *, precision: str, rank: int, copies: int = 0) -> tuple[float, float]:
    """Activation bytes per token that a double and a single block keep for the backward pass.

    `full`: the block's input. `selective`: also the outputs of attention and of all matmuls but the adapter's.
    `none`: all that autograd saves; under bf16 autocast norms work on fp32 copies, and the adapter's inputs are copied.
    `rank` is of the adapter's thin products, `copies` how often it keeps a Linear's output once more.
    """
    w, m, heads = found.w, found.m, found.heads
    item = 4 if precision == "fp32" else 2
    if policy == "full":
        return w * item, w * item
    if policy == "selective":
        return (7 * w + 2 * m) * item + 4 * heads, (6 * w + 2 * m) * item + 4 * heads
    wide = 0 if precision == "fp32" else 6 * w  # fp32 inputs of norms, and three copies of what q, k and v read
    thin = 3 * heads * 4
    double = ((1 + copies) * (10 * w + 4 * m) + wide + 6 * rank) * item + thin
    return double, (9 * w + 4 * m + copies * (4 * w + 2 * m) + wide + 2 * rank) * item + thin


def place(job: Job, strategy: str, precision: str, recompute: str | int, *, decodes: bool = True) -> Placement:
    """The bytes of one way to lay it out, with the VAE on the card or on the CPU."""
    found, kind = job.sizes, precision.removesuffix("-matmul")
    compute = BYTES["fp32" if kind == "fp32" else "bf16"]
    per = BYTES[kind]
    every = (found.double * found.double_parameters + found.single * found.single_parameters) * per
    largest = max(found.double_parameters * min(1, found.double), found.single_parameters)
    moving = min(GATHERED * largest * per, every)
    base = {
        "ddp": every,
        "fsdp": every / job.world + moving,
        "hsdp": every / job.local + moving,
        "stream": moving,
    }[strategy] + found.outside * compute
    costs = block_costs(job, kind)
    blocks = [0] * found.double + [1] * found.single
    chosen = zip(policies(recompute, len(blocks)), blocks, job.routed, strict=True)
    activations = job.trains * sum(costs[policy][which] * tokens for policy, which, tokens in chosen)
    average = BYTES["fp32"] * bool(job.config.train.ema)
    adapter = (ADAPTER_BYTES + average if job.trains else BYTES["fp32"]) * job.adapter
    widest, product = 3 * found.w + 2 * found.m, PRODUCT * job.tokens * (precision == "int8-matmul")
    aside = 0 if kind in ("bf16", "fp32") else widest * max(found.w * compute, product)  # a weight that is widened
    work = FP32_WORK if kind == "fp32" else WORK
    block = max(costs["none"])  # one is whole while it is at work
    step = activations + job.tokens * block * (work if job.trains else LOOK)
    drawn, decoded = _picture(job, block)
    margin = SPARE + aside + max(step, drawn) - activations
    if decodes and decoded:
        margin = SPARE + aside + VAE + max(step, drawn, decoded) - activations
    host = every if strategy == "stream" else 0.0
    return Placement(strategy, precision, recompute, base, activations, adapter, margin, host, decodes or not decoded)


def block_costs(job: Job, kind: str) -> dict[str, tuple[float, float]]:
    """Bytes per token that a block keeps, of the two kinds, by policy."""
    rank, copies = targets.thin(job.config.lora), KINDS[job.config.lora.kind].kept
    costs = {p: kept(job.sizes, p, precision=kind, rank=rank, copies=copies) for p in ("none", "selective", "full")}
    # A compiled block decides by itself, and keeps about what `selective` keeps; with "auto" an eager one must fit too.
    if job.config.train.compile is True:
        costs["none"] = costs["selective"]
    return costs


def _picture(job: Job, block: float) -> tuple[float, float]:
    """Most bytes of drawing a picture and of decoding it; beside a training the adapter is there three times for it."""
    validation, side = job.config.validation, job.config.preview_size
    if not job.trains:
        return 0.0, DECODED * side**2  # drawing is the step
    if not (validation.drawn and validation.every):
        return 0.0, 0.0
    most = max(len(prompt.references) for prompt in validation.drawn)
    tokens = image_tokens(job.config.data[0], side, most) + job.config.text.max_length
    return LOOK * block * tokens + BYTES["fp32"] * job.adapter, DECODED * side**2


def fits(job: Job, placement: Placement, limit: float) -> bool:
    """Whether each card holds it, and each node what its workers stream from there."""
    return placement.total <= limit and placement.host * job.local <= PINNED * job.host


def candidates(job: Job, limit: float) -> list[Placement]:
    """What the configuration allows, the best first: an exact base before a rounded one before streaming, then speed.

    Raises:
        UsageError: settings that exclude each other.
    """
    train, cluster = job.config.train, job.config.cluster
    precisions = ("bf16", "int8") if train.precision == "auto" else (train.precision,)
    shared = () if job.world == 1 else ("hsdp",) if job.grid and job.local < job.world else ("fsdp",)
    strategies = ("ddp", *shared, "stream") if cluster.strategy == "auto" else (cluster.strategy,)
    if cluster.strategy == "stream":
        check_stream(train.recompute)
    ways = [(strategy, precision) for precision in precisions for strategy in strategies]
    found = [place(job, *way, recompute) for way in ways for recompute in _recomputes(job, *way, limit)]
    if _picture(job, 0)[1]:
        taken = {p for p in found if p.total <= limit}
        there = [
            place(job, *way, r, decodes=False) for way in ways for r in _recomputes(job, *way, limit, decodes=False)
        ]
        found += [
            p for p in there if p.total <= limit and place(job, p.strategy, p.precision, p.recompute) not in taken
        ]
    return sorted(found, key=lambda p: (p.strategy == "stream", precisions.index(p.precision), relative_time(job, p)))


def check_stream(recompute: str | int) -> None:
    """Refuse a policy that streaming cannot keep."""
    if recompute not in ("auto", "full"):
        raise UsageError(
            f'cluster.strategy="stream" brings each block\'s weights twice and computes it twice: train.recompute='
            f'{recompute!r} would keep them on the card; set train.recompute="full" (or "auto")'
        )


def decide(job: Job, limit: float | None) -> Placement:
    """The best way that fits, with `limit` bytes of each card; on CPUs (None) whole, in fp32, nothing recomputed.

    Raises:
        UsageError: nothing fits, or `hsdp` is asked for and does not suit the nodes; names what to set.
    """
    train, cluster = job.config.train, job.config.cluster
    if cluster.strategy == "hsdp" and not job.grid:
        raise UsageError(
            f'cluster.strategy="hsdp" shards inside a node and replicates over nodes: {job.world} workers on these '
            'nodes do not make such a grid; use "auto", or as many workers in every node, two or more'
        )
    if limit is None:
        strategy = "ddp" if cluster.strategy == "auto" else cluster.strategy
        if strategy == "stream":
            check_stream(train.recompute)
        recompute = train.recompute
        if recompute == "auto":
            recompute = "full" if strategy == "stream" else "none"
        return Placement(strategy, "fp32" if train.precision == "auto" else train.precision, recompute)
    found = candidates(job, limit)
    for placement in found:
        if fits(job, placement, limit):
            return placement
    least = min(found, key=lambda p: p.total)
    least = place(job, least.strategy, least.precision, least.recompute, decodes=False)
    told = f"{least.total / 1e9:.1f} GB"
    if least.host * job.local > PINNED * job.host:
        told += f", and {least.host * job.local / 1e9:.1f} of a node's {job.host / 1e9:.1f} GB of free host memory"
    of = "a card's free memory" if cluster.gpu_memory is None else "cluster.gpu_memory"
    raise UsageError(
        f"no placement fits {limit / 1e9:.1f} GB, {FILLED:.0%} of {of}: the smallest that the configuration allows "
        f"takes {told} ({least.settings()}); {ways_out(job, least, card=least.total > limit)}"
    )


def card(config: Config, memory: float | None) -> float | None:
    """Bytes of a card that may be filled: of it as configured, else of what is free of the one at hand."""
    memory = memory if config.cluster.gpu_memory is None else config.cluster.gpu_memory * 2**30
    return None if memory is None else FILLED * memory


def altered(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with other values in some sections."""
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=changed)


def _recomputes(job: Job, strategy: str, precision: str, limit: float, *, decodes: bool = True) -> Iterator[str | int]:
    wanted = job.config.train.recompute
    if strategy == "stream":
        yield "full"
    elif wanted != "auto":
        yield wanted
    else:
        yield from ("none", "selective")
        if place(job, strategy, precision, "selective", decodes=decodes).total > limit:
            blocks = range(1, job.sizes.double + job.sizes.single)
            fitting = (k for k in blocks if place(job, strategy, precision, k, decodes=decodes).total <= limit)
            yield from itertools.islice(fitting, 1)
        yield "full"


def relative_time(job: Job, placement: Placement) -> float:
    """An estimate of a step's time, only good to order placements by."""
    blocks = job.sizes.double + job.sizes.single
    again = placement.recompute
    if isinstance(again, int):
        factor = SELECTIVE_COST + (FULL_COST - SELECTIVE_COST) * min(again, blocks) / blocks
    else:
        factor = {"none": 1.0, "selective": SELECTIVE_COST, "full": FULL_COST}[again]
    return factor * STRATEGY_COST[placement.strategy] + ELSEWHERE_COST * (not placement.decodes)


def ways_out(job: Job, least: Placement, *, card: bool = True) -> str:
    """What may be set to take less of a card, or (not `card`) of a node's host memory, in words."""
    ways = []
    if card and job.pictures > 1:
        ways.append("cluster.micro_batch=1")
    if card and least.recompute != "full":
        ways.append('train.recompute="full"')
    if card and least.strategy != "stream":
        ways.append('cluster.strategy="stream"')
    if BYTES[least.precision.removesuffix("-matmul")] > BYTES["int4"]:
        ways.append('train.precision="int4"')
    if least.host and job.local > 1:
        ways.append("fewer workers in a node")
    if card:
        pictures = ", validate.size" if _picture(job, 0)[1] else ""
        ways.append(f"smaller data.resolutions{pictures} or lora.rank")
    return "set " + ", ".join(ways) if ways else "use a machine with more memory"
