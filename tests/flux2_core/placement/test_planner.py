"""The planner: its counts against real modules, its bytes against what autograd keeps, its choices on known cards."""

import gc
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux2 import (
    Flux2SingleTransformerBlock,
    Flux2Transformer2DModel,
    Flux2TransformerBlock,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flux2_core.config.adapter import Lora
from flux2_core.config.sections import Config, Model
from flux2_core.errors import UsageError
from flux2_core.lora import adapter, targets
from flux2_core.model import transformer
from flux2_core.model.families import FAMILIES
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.placement import planner, recompute, relief
from flux2_core.placement.planner import Placement, Sizes
from tests.flux2_core.jobs import CARD_16, CARD_24, CARD_48, H100, H200, asked, described, limit

Make = Callable[..., Config]


def test_parameters_of_the_published_models() -> None:
    """Counted from config.json alone: dev has exactly 32,223,281,152, klein 3.88 B; every block Linear at rank 16 takes
    100.7 M adapter parameters, diffusers' targets 77.1 M."""
    assert planner.sizes(described("dev")).parameters == 32_223_281_152
    assert planner.sizes(described("klein")).parameters == pytest.approx(3.88e9, rel=0.002)
    assert asked().adapter == pytest.approx(100.7e6, rel=0.001)
    assert asked(lora={"targets": "diffusers"}).adapter == pytest.approx(77.1e6, rel=0.001)


@pytest.mark.parametrize("changes", [{}, {"guidance_embeds": False}, {"mlp_ratio": 4.0, "num_layers": 1}])
def test_counts_equal_the_built_model(tiny_model: Path, changes: dict[str, Any]) -> None:
    """Parameters and Linears, name by name and shape by shape, are those of the model that diffusers builds."""
    base = resolve(Model(path=str(tiny_model)), parts=("transformer",)).config("transformer")
    with torch.device("meta"):
        built = Flux2Transformer2DModel.from_config({**base, **changes})

    class Changed(ModelFolder):
        def config(self, part: str) -> dict[str, Any]:
            return {**base, **changes}

    found = planner.sizes(Changed(tiny_model, FAMILIES["dev"]))
    assert found.parameters == sum(p.numel() for p in built.parameters())
    linears = {n: (m.in_features, m.out_features) for n, m in built.named_modules() if isinstance(m, nn.Linear)}
    assert found.linears() == {n: shape for n, shape in linears.items() if "transformer_blocks." in n}


@pytest.mark.parametrize(
    ("batch_size", "workers", "micro_batch", "pictures"),
    [(1, 1, None, 1), (5, 4, None, 2), (1, 8, None, 1), (9, 2, None, 5), (9, 2, 3, 3), (9, 2, 8, 5)],
)
def test_a_worker_with_more_pictures_is_planned(
    batch_size: int, workers: int, micro_batch: int | None, pictures: int
) -> None:
    """Where a batch does not divide evenly every worker computes as many pictures as the one with most."""
    cluster, train = {"micro_batch": micro_batch}, {"batch_size": batch_size}
    job = asked(workers=workers, train=train, cluster=cluster)
    assert (job.pictures, job.tokens) == (pictures, pictures * (4096 + 512))


def adapted_block(kind: str, width: int, heads: int, rank: int) -> Any:
    """A frozen block under adapters, alone in a model, as the trainer has it."""
    made = (Flux2TransformerBlock if kind == "double" else Flux2SingleTransformerBlock)(width, heads, width // heads)
    names = ("transformer_blocks", "single_transformer_blocks")
    model = nn.Module()
    for name in names:
        setattr(model, name, nn.ModuleList([made] if (name == names[0]) == (kind == "double") else []))
    model.requires_grad_(False)
    adapter.inject(model, Lora(rank=rank), targets.match(Lora(), transformer.linear_names(model)))
    if torch.get_default_device().type == "cpu":
        adapter.initialise(model, seed=0, device=torch.device("cpu"))
    return model, made


def inputs(kind: str, width: int, heads: int, tokens: int) -> tuple[Any, ...]:
    head, text = width // heads, tokens // 4
    rope = (torch.zeros(tokens, head), torch.zeros(tokens, head))
    if kind == "single":
        return (torch.randn(1, tokens, width).requires_grad_(), None, torch.randn(1, 3 * width), rope)
    image, prompt = torch.randn(1, tokens - text, width), torch.randn(1, text, width)
    mods = (torch.randn(1, 6 * width), torch.randn(1, 6 * width))
    return (image.requires_grad_(), prompt.requires_grad_(), *mods, rope)


def kept_bytes(kind: str, policy: str, *, width: int, heads: int, tokens: int, rank: int) -> int:
    """What a real block keeps: storages that autograd saves (`none`), or that the checkpoint holds."""
    model, block = adapted_block(kind, width, heads, rank)
    recompute.apply(model, policy, rank=rank)
    given = inputs(kind, width, heads, tokens)
    outside = {t.untyped_storage().data_ptr() for t in model.parameters()} | {t.data_ptr() for t in given[-1]}
    storages: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    if policy == "none":
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            block(*given)
    else:
        gc.collect()
        gc.freeze()  # what is there already is not looked at
        out = block(*given)
        outside |= {t.data_ptr() for t in (out if isinstance(out, tuple) else (out,))}
        for held in [o for o in gc.get_objects() if type(o) is torch.Tensor and o.untyped_storage().nbytes()]:
            count(held)
        gc.unfreeze()
        for tensor in given[: 1 if kind == "single" else 2]:
            storages[tensor.data_ptr()] = tensor.untyped_storage().nbytes()  # the block's input is kept by all
    return sum(storages.values())


@pytest.mark.parametrize("policy", ["none", "selective", "full"])
@pytest.mark.parametrize("kind", ["double", "single"])
def test_kept_bytes_against_real_blocks(kind: str, policy: str) -> None:
    """The formula gives what a real block keeps in fp32 within 3 %, at two widths, linearly in the tokens."""
    for width, heads, rank in ((96, 3, 4), (192, 6, 16)):
        sizes = Sizes(width, 3 * width, heads, 1, 1, 0, 0, 0)
        wanted = planner.kept(sizes, policy, precision="fp32", rank=rank)[kind == "single"]
        found = [kept_bytes(kind, policy, width=width, heads=heads, tokens=t, rank=rank) for t in (64, 256)]
        assert (found[1] - found[0]) / 192 == pytest.approx(wanted, rel=0.03), (width, policy)


@pytest.mark.parametrize("kind", ["double", "single"])
def test_no_matmul_is_computed_twice(kind: str) -> None:
    """A block of FLUX.2-dev, on the meta device at 1024 px: a step with `selective` multiplies what `none` does and,
    once more, the adapter's thin products (under 0.5 %); with `full` half as much again."""
    flop = {}
    for policy in ("none", "selective", "full"):
        with torch.device("meta"):
            model, block = adapted_block(kind, 6144, 48, 16)
            given = inputs(kind, 6144, 48, 4608)
        recompute.apply(model, policy, rank=16)
        with FlopCounterMode(display=False) as counted:
            sum(part.sum() for part in tree_leaves(block(*given))).backward()
        flop[policy] = counted.get_total_flops()
    assert 1 < flop["selective"] / flop["none"] < 1.005
    assert flop["full"] / flop["none"] == pytest.approx(planner.FULL_COST, rel=0.05)


def test_oracle_on_an_h200() -> None:
    """FLUX.2-dev at 1024 px, no matmul recomputed: bf16 about 109 GB, fp8 about 77 GB, and a single block's kept
    matmuls 629 MB, of which 57 feed the residual sum and are kept so as not to be computed again (performance.md's
    572 MB are without them; its figures leave out the block's own input, 57 MB)."""
    whole = {p: planner.place(asked(H200), "ddp", p, "selective") for p in ("bf16", "fp8", "fp8-matmul")}
    assert 107e9 < whole["bf16"].total < 111e9
    assert 76e9 < whole["fp8"].total < 79e9
    assert whole["fp8"].total < limit(H100)
    sizes, tokens = asked().sizes, asked().tokens
    assert tokens == 4096 + 512
    single = planner.kept(sizes, "selective", precision="bf16", rank=16)[1] * tokens
    assert single - 2 * 2 * 6144 * tokens == pytest.approx(572e6, rel=0.02)
    every = planner.place(asked(H200), "ddp", "bf16", "none").activations
    assert every == pytest.approx(80.5e9, rel=0.1)


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, and the most of them; those of `known` are not its own."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.alive = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.most = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in (one for one in tree_leaves(out) if isinstance(one, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata)
                self.most = max(self.most, sum(self.alive.values()))
        return out


@pytest.mark.parametrize(("precision", "learning", "looking"), [("fp32", 1.5, 1.1), ("bf16", 1.35, 0.7)])
def test_a_block_at_work_against_real_blocks(precision: str, learning: float, looking: float) -> None:
    """While a block is computed again and differentiated it holds 1.5 to 1.8 times what the larger kind of block keeps,
    and 1.1 to 1.3 times without a gradient; in bf16, where adapters copy nothing, less. The planner's factors are above
    all, and by little."""
    width, heads, tokens, rank = 768, 6, 512, 16
    found = Sizes(width, 3 * width, heads, 1, 1, 0, 0, 0)
    whole = tokens * max(planner.kept(found, "none", precision=precision, rank=rank))
    peaks: dict[bool, list[float]] = {True: [], False: []}
    for kind in ("double", "single"):
        model, block = adapted_block(kind, width, heads, rank)
        if precision == "bf16":
            for parameter in (p for p in model.parameters() if not p.requires_grad):
                parameter.data = parameter.bfloat16()
        recompute.apply(model, "full", rank=rank)
        given = inputs(kind, width, heads, tokens)
        known = [*model.parameters(), *tree_leaves([one for one in given if one is not None])]
        for learns, seen in peaks.items():
            low = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
            with low, torch.set_grad_enabled(learns), Peak(known) as peak:
                out = sum(part.sum() for part in tree_leaves(block(*given)))
                if learns:
                    out.backward()
            seen.append(peak.most / whole)
    assert learning < max(peaks[True]) < planner.WORK == 1.8
    assert looking < max(peaks[False]) < planner.LOOK == 1.3


def test_bytes_by_hand() -> None:
    """bf16, everything recomputed, streamed, at 1024 px: two blocks and what is outside them, a block's input for each
    block, 16 bytes per adapter parameter; then 2 GB spare and 1.8 double blocks at work. Previews add the VAE."""
    job, w, m, tokens = asked(), 6144, 18432, 4096 + 512
    double = 8 * w * w + 6 * w * m + 4 * 128
    found = planner.place(job, "stream", "bf16", "full")
    assert found.base == 2 * 2 * double + 2 * job.sizes.outside
    assert found.activations == 56 * 2 * w * tokens
    assert found.adapter == 16 * job.adapter
    whole = 2 * (16 * w + 4 * m + 6 * 16) + 3 * 48 * 4
    assert found.margin == pytest.approx(2e9 + 1.8 * whole * tokens, rel=1e-12)
    shown = planner.place(asked(validate={"prompts": ["x"]}), "stream", "bf16", "full")
    assert shown.margin == pytest.approx(found.margin + 0.34e9), "a step takes more than a preview of its own size"
    never = asked(validate={"prompts": ["x"], "every": 0})
    assert planner.place(never, "stream", "bf16", "full") == found


def test_what_other_precisions_take_beside() -> None:
    """As counted at full size (bench.pretended): a block in fp32 takes 2.3 times what it keeps; beside an int8 product
    lies its fp32 copy, both as wide as the widest Linear; else that Linear is widened to bf16."""
    job, w, m, tokens = asked(), 6144, 18432, 4096 + 512
    kept = max(planner.kept(job.sizes, "none", precision="fp32", rank=16))
    assert planner.place(job, "ddp", "fp32", "full").margin == pytest.approx(2e9 + 2.3 * kept * tokens, rel=1e-12)
    exact, int8, product = (planner.place(job, "ddp", kind, "full") for kind in ("bf16", "int8", "int8-matmul"))
    assert int8.margin - exact.margin == pytest.approx(2 * (3 * w + 2 * m) * w)
    assert product.margin - exact.margin == pytest.approx(8 * (3 * w + 2 * m) * tokens)


def test_a_preview_larger_than_a_step_is_planned() -> None:
    """Drawn at 2048 px beside training at 512 px a preview decides: 3 maps of 256 channels in fp32 per pixel."""
    data = [{"path": "x", "resolutions": [512]}]
    small, large = (
        planner.place(asked(data=data, validate={"prompts": ["x"], "size": size}), "ddp", "bf16", "full")
        for size in (512, 2048)
    )
    tokens, whole = 1024 + 512, 2 * (16 * 6144 + 4 * 18432 + 6 * 16) + 3 * 48 * 4
    at_work = [placed.activations + placed.margin - 2e9 - 0.34e9 for placed in (small, large)]
    assert at_work == pytest.approx([(56 * 2 * 6144 + 1.8 * whole) * tokens, 3072 * 2048**2], rel=1e-12)
    assert (small.base, small.activations, small.adapter) == (large.base, large.activations, large.adapter)


@pytest.mark.parametrize(
    ("memory", "size", "decodes"),
    [(H200, 2048, True), (H100, 2048, False), (H100, 1024, True), (CARD_48, 2048, False), (CARD_24, 2048, True),
     (12, 1024, False)],
)  # fmt: skip
def test_a_preview_that_a_card_cannot_decode(memory: float, size: int, decodes: bool) -> None:
    """Previews of 2048 px beside training at 512 px take 13 GB to decode: where that does not fit, the CPU decodes, and
    the base lies as it would without previews; to compute a few more blocks again is cheaper than that."""
    sections = {"data": [{"path": "x", "resolutions": [512]}]}
    job = asked(memory, validate={"prompts": ["x"], "size": size}, **sections)
    best, alone = planner.decide(job, limit(memory)), planner.decide(asked(memory, **sections), limit(memory))
    assert (best.strategy, best.precision, best.decodes) == (alone.strategy, alone.precision, decodes)
    assert alone.total <= best.total <= limit(memory)
    here = planner.place(job, best.strategy, best.precision, best.recompute)
    assert (here == best) == decodes
    if not decodes:
        assert here.total > limit(memory), "it would not be sent away from a card that holds it"
        assert best.recompute == alone.recompute, "only to decode, nothing more is computed again"


def test_a_card_too_small_for_previews() -> None:
    """Where drawing them does not fit either, what is refused is counted without decoding; previews may be smaller."""
    job = asked(10, data=[{"path": "x", "resolutions": [512]}], validate={"prompts": ["x"], "size": 1024})
    with pytest.raises(UsageError, match=r"takes 10.4 GB .* smaller data.resolutions, validate.size or lora.rank"):
        planner.decide(job, limit(10))


def test_the_average_is_counted() -> None:
    """`train.ema` keeps a fourth fp32 copy of the adapter beside its weight, gradient and two moments."""
    plain, averaged = (planner.place(asked(train={"ema": ema}), "ddp", "bf16", "full") for ema in (0.0, 0.999))
    assert averaged.adapter - plain.adapter == 4 * asked().adapter
    assert averaged.total - plain.total == pytest.approx(4 * asked().adapter)


@pytest.mark.parametrize(
    ("recompute", "batch_size", "levels"),
    [("none", 1, 4), ("selective", 1, 4), ("full", 1, 2), ("full", 2, 4), ("full", 4, 4)],
)
def test_validation_takes_no_more_than_a_step(recompute: str, batch_size: int, levels: int) -> None:
    """Of the four noise levels one pass takes as many as a step's memory holds: all, unless nothing else is kept."""
    job = asked(train={"batch_size": batch_size})
    placed = planner.place(job, "ddp", "bf16", recompute)
    assert relief.levels_at_once(job, placed, 4) == levels
    assert relief.levels_at_once(job, placed, 1) == 1


@pytest.mark.parametrize(
    ("memory", "workers", "local", "wanted"),
    [
        (H200, 1, 1, ("ddp", "bf16", "selective")),
        (H200, 8, 8, ("ddp", "bf16", "selective")),
        (H100, 1, 1, ("ddp", "bf16", "k")),
        (H100, 8, 8, ("fsdp", "bf16", "selective")),
        (H100, 16, 8, ("hsdp", "bf16", "selective")),
        (CARD_48, 1, 1, ("ddp", "int8", "k")),
        (CARD_24, 1, 1, ("stream", "bf16", "full")),
        (CARD_24, 8, 8, ("fsdp", "bf16", "k")),
    ],
)
def test_choices(memory: float, workers: int, local: int, wanted: tuple[str, str, str]) -> None:
    """What is picked for known cards: an exact base before a rounded one before streaming, then the fastest."""
    best = planner.decide(asked(memory, workers=workers, local=local), limit(memory))
    recompute = "k" if isinstance(best.recompute, int) else best.recompute
    assert (best.strategy, best.precision, recompute) == wanted
    assert best.total <= limit(memory)
    if isinstance(best.recompute, int):  # and no fewer blocks would do
        fewer = planner.place(
            asked(memory, workers=workers, local=local), best.strategy, best.precision, best.recompute - 1
        )
        assert fewer.total > limit(memory)


def test_what_is_asked_is_kept() -> None:
    """Explicit settings are never overruled; what does not fit then is refused with the smallest and the ways out."""
    best = planner.decide(asked(H200, train={"precision": "fp8-matmul", "recompute": 7}), limit(H200))
    assert (best.precision, best.recompute) == ("fp8-matmul", 7)
    with pytest.raises(
        UsageError,
        match=r"fits 15.8 GB, 94% of cluster.gpu_memory: .*\"stream\".*\"int4\"",
    ):
        planner.decide(asked(CARD_16, train={"precision": "bf16"}, cluster={"strategy": "ddp"}), limit(CARD_16))
    with pytest.raises(UsageError, match=r"cluster.micro_batch=1"):
        planner.decide(asked(8, train={"batch_size": 4}), limit(8))
    for memory in (limit(CARD_24), None):
        with pytest.raises(UsageError, match=r"train.recompute='none'.*\"full\""):
            planner.decide(asked(train={"recompute": "none"}, cluster={"strategy": "stream"}), memory)


def test_on_a_cpu_nothing_is_saved() -> None:
    """Without a card: whole, fp32, nothing recomputed, unless it is asked for."""
    assert planner.decide(asked(), None) == Placement("ddp", "fp32", "none")
    wanted = asked(train={"precision": "int8", "recompute": 3}, cluster={"strategy": "fsdp"})
    assert planner.decide(wanted, None) == Placement("fsdp", "int8", 3)


def test_next_smaller_is_smaller() -> None:
    """Out of memory: each advice, followed, leads to a smaller placement, until settings of another kind are named."""
    job = asked(H200)
    now = planner.decide(job, limit(H200))
    seen = []
    while "instead of" in (advice := relief.next_smaller(job, now)):
        settings = dict(part.split("=") for part in advice.split(": ")[0].removeprefix("set ").replace('"', "").split())
        again = settings["train.recompute"]
        then = planner.place(
            job, settings["cluster.strategy"], settings["train.precision"], int(again) if again.isdigit() else again
        )
        assert then.total < now.total
        seen.append(now := then)
    assert 3 <= len(seen) <= 40
    assert seen[-1].strategy == "stream"
    assert "resolutions" in advice
