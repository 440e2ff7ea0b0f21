"""What is computed: the FLOP and bytes of a training step and of both encoders, from configuration files alone.

FLOP are those that torch's FlopCounterMode counts (tests/flux2_core/plan/test_flops.py: within 2 %). Bytes are those
that kernels beside the matmuls move, which is most of what a step takes beyond its matmuls.

Legend: w inner width, m feed-forward width, k and n inputs and outputs of a Linear, S all tokens of a picture.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flux2_core.lora import targets
from flux2_core.model.folder import ModelFolder
from flux2_core.model.latents import PIXELS_PER_TOKEN
from flux2_core.placement import compiled, planner
from flux2_core.placement.planner import BYTES, Job, Placement

# Bytes that elementwise kernels move, over what `none` keeps of a block: counted at FLUX.2-dev's sizes with fake
# tensors (1.67 TB eager, 0.69 more where it is computed again, 0.88 to round to 8 bits); of compiled ones estimated.
EAGER, COMPILED, ROUNDED = (19, 8), (6, 2), 10
KERNELS = 155  # of a block and step, eager, counted likewise (8,700 of 56 blocks)
ENCODED, PAINTED = 3, 6  # how often an encoder's layers, the VAE's maps are read or written; estimates
FED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_qkv_mlp_proj")  # by a block's own input


@dataclass(frozen=True)
class Work:
    """What one device has to do."""

    products: Mapping[str, float] = field(default_factory=dict)
    """FLOP of matmuls and convolutions, by what is multiplied: bf16, tf32, fp32, fp8 or int8."""
    attention: float = 0.0
    """FLOP of attention's products."""
    moved: float = 0.0
    """Bytes that other kernels read and write."""
    weights: float = 0.0
    """Bytes of weights that matmuls read."""
    kernels: float = 0.0
    """How many the host has to launch, where that is many for little work."""

    @property
    def flop(self) -> float:
        """All of them."""
        return sum(self.products.values()) + self.attention


def step(job: Job, placement: Placement, model: ModelFolder, image: float) -> Work:
    """One optimizer step of one worker.

    Args:
        job: What is trained.
        placement: Which precision and policy.
        model: Whose sizes.
        image: Tokens of a picture and of its references, the mean over what is drawn.
    """
    found, config, kind = job.sizes, job.config, placement.precision.removesuffix("-matmul")
    every = found.double + found.single
    routed, full = _routed(job, image), [image] * every
    once, trained = _passes(job, placement, routed, text=config.text.max_length)
    whole, _ = _passes(job, placement, full, text=config.text.max_length)
    pictures = -(-config.train.batch_size // job.world)
    learnt = sum(at_once * there for at_once, there, _ in config.passes)
    beside = sum(at_once * there for at_once, _, there in config.passes)  # without a gradient, by the routes;
    beside, all_of = beside + config.takes_prior, config.whole_passes  # `all_of` are with all tokens
    count = {
        name: pictures * (learnt * flop + beside * once.get(name, 0) + all_of * whole.get(name, 0))
        for name, flop in trained.items()
    }
    outside, back = _outside(model, image, text=0 if config.text.stored == "projected" else config.text.max_length)
    thick = "fp32" if kind == "fp32" else "bf16"
    products = defaultdict[str, float](float)
    products[thick] = count["thin"] + pictures * ((learnt + beside + all_of) * outside + learnt * back)
    products[kind if placement.precision != kind else thick] += count["wide"]
    forward, backward = passes(job)
    repeated = planner.policies(placement.recompute, every).count("full") / every
    uses = forward + backward * (1 + repeated)  # of each block
    held = (found.double * found.double_parameters + found.single * found.single_parameters) * uses
    widened = (BYTES[kind] + BYTES[thick]) * held if placement.precision == kind not in ("bf16", "fp32") else 0.0
    moved = _moved(job, placement, routed) * (learnt + beside / 3)  # a pass without a gradient: a third
    moved += _moved(job, placement, full) * all_of / 3
    return Work(
        products,
        count["attention"],
        moved=pictures * moved + widened,
        weights=held * BYTES[kind if placement.precision != kind else thick],
        kernels=KERNELS * every * uses / 2,
    )


def passes(job: Job) -> tuple[float, float]:
    """How often each block of one worker is passed forward and backward in a step."""
    share = -(-job.config.train.batch_size // job.world)
    parts = -(-share // job.pictures)
    config, (trained, alone) = job.config, (sum(passes) for passes in list(zip(*job.config.passes, strict=True))[1:])
    return parts * (trained + alone + config.takes_prior + config.whole_passes), parts * trained


def _routed(job: Job, image: float) -> list[float]:
    """Tokens of a picture and of its references that go through each block: of its own some may skip it."""
    own = image / (1 + max(len(data.references) for data in job.config.data))
    return [image - skip * own for skip in job.config.tread.skipped(job.sizes.double + job.sizes.single)]


def _passes(
    job: Job, placement: Placement, image: Sequence[float], *, text: int
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """FLOP of a picture in the blocks: of the base's forward pass alone, and of forward, backward and what is repeated.

    A Linear's weight has no gradient, its input has one from the first adapter on; the adapter's factors have both.
    Attention's backward pass counts twice; that kernels compute its scores again is in its efficiency.
    """
    found, linears = job.sizes, job.sizes.linears()
    policies = planner.policies(placement.recompute, found.double + found.single)
    adapted = targets.work(job.config.lora, linears)
    first = min(_block(name, found.double) for name in adapted)
    once, trained = defaultdict[str, float](float), defaultdict[str, float](float)
    for name, (k, n) in linears.items():
        block = _block(name, found.double)
        own = image[block]
        tokens = own + text if name.startswith("single") else text if "add_" in name or "_context" in name else own
        meets, after = adapted.get(name, (0, 0))
        wide, thin = 2 * tokens * k * n, 2 * tokens * (meets + after)
        once["wide"] += wide
        trained["wide"] += wide
        trained["thin"] += thin
        if block >= first:
            fed = block == first and name.endswith(FED)
            trained["wide"] += wide * ((not fed) + (policies[block] == "full"))
            trained["thin"] += thin * (2 + (policies[block] != "none")) - 2 * tokens * meets * fed
    attention = [4 * (own + text) ** 2 * found.w for own in image]
    again = zip(attention[first:], policies[first:], strict=True)
    once["attention"] = sum(attention)
    trained["attention"] = once["attention"] + sum(each * (2 + (policy == "full")) for each, policy in again)
    return once, trained


def _block(name: str, double: int) -> int:
    kind, number, _ = name.split(".", 2)
    return int(number) + double * kind.startswith("single")


def _outside(model: ModelFolder, image: float, *, text: int) -> tuple[float, float]:
    """FLOP of a picture outside the blocks, forward and backward."""
    config, w = model.config("transformer"), model.inner_width
    channels, out = config["in_channels"], config.get("out_channels") or config["in_channels"]
    once = (1 + model.guided) * (config["timestep_guidance_channels"] + w) + 17 * w  # embedders and modulations
    each = image * channels + text * config["joint_attention_dim"] + image * out
    return 2 * w * (once + each), 2 * w * image * out


def _moved(job: Job, placement: Placement, image: Sequence[float]) -> float:
    """Bytes that kernels beside matmuls move for a picture."""
    found, kind = job.sizes, placement.precision.removesuffix("-matmul")
    double, single = planner.kept(found, "none", precision=kind, rank=targets.thin(job.config.lora))
    costs = [double] * found.double + [single] * found.single
    kept = sum((own + job.config.text.max_length) * cost for own, cost in zip(image, costs, strict=True))
    policies = planner.policies(placement.recompute, found.double + found.single)
    again = 1 - policies.count("none") / len(policies)
    plain, repeated = COMPILED if compiled.wanted(job.config.train) else EAGER
    return kept * (plain + repeated * again + ROUNDED * (placement.precision != kind))


def texts(model: ModelFolder, *, tokens: float, squares: float, dtype: str) -> Work:
    """Encode texts of so many tokens in all, and so many of the sum of their squares."""
    told = model.config("text_encoder")
    config = told.get("text_config", told)
    h, heads, layers = config["hidden_size"], config["num_attention_heads"], max(model.family.taps)
    head = config.get("head_dim") or h // heads
    attention = 2 * h * head * (heads + config["num_key_value_heads"])
    parameters = layers * (attention + 3 * h * config["intermediate_size"])
    thick = "fp32" if dtype == "fp32" else "bf16"
    return Work(
        {thick: 2 * parameters * tokens},
        attention=4 * squares * head * heads * layers,
        moved=ENCODED * tokens * layers * (8 * h + 3 * config["intermediate_size"]) * BYTES[thick],
        weights=parameters * BYTES[thick],  # at least once: a pass has up to 8,192 tokens, far more than they need
    )


def pictures(model: ModelFolder, *, tokens: float, squares: float, precision: str) -> Work:
    """Encode pictures of so many tokens in all, and so many of the sum of their squares; products of fp32 in TF32."""
    config = model.config("vae")
    widths, depth, latent = config["block_out_channels"], config["layers_per_block"], 2 * config["latent_channels"]
    side, flop, maps = PIXELS_PER_TOKEN, 0.0, 0.0
    last = widths[-1]

    def convolved(inputs: int, outputs: int, kernel: int = 3) -> None:
        nonlocal flop, maps
        flop += 2.0 * kernel**2 * inputs * outputs * side**2
        maps += outputs * side**2

    convolved(config["in_channels"], widths[0])
    for place, (before, after) in enumerate(itertools.pairwise([widths[0], *widths])):
        for layer in range(depth):
            convolved(before if layer == 0 else after, after)
            convolved(after, after)
            if layer == 0 and before != after:
                convolved(before, after, 1)
        if place < len(widths) - 1:
            side //= 2
            convolved(after, after)
    for _ in range(4):
        convolved(last, last)
    convolved(last, latent)
    if config.get("use_quant_conv", True):
        convolved(latent, latent, 1)
    attends = config.get("mid_block_add_attention", True)
    flop += attends * 8.0 * last**2 * side**2
    attention = attends * 4.0 * squares * side**4 * last
    kind = "tf32" if precision == "fp32" else precision
    return Work({kind: flop * tokens}, attention, moved=PAINTED * BYTES[precision] * maps * tokens)
