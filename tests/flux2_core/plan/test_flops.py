"""The counts of FLOP, held against torch's own counter on the very modules, on the meta device."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flux2_core.config.reading import parse
from flux2_core.config.sections import Config, Model
from flux2_core.embedded import tiny_model
from flux2_core.lora import adapter, targets
from flux2_core.lora.kinds import KINDS
from flux2_core.model import transformer
from flux2_core.model.families import FAMILIES
from flux2_core.model.flow import predict
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.model.latents import CHANNELS, image_ids, text_ids
from flux2_core.model.text_encoder import load_language_model
from flux2_core.placement import planner, recompute
from flux2_core.placement.planner import Placement
from flux2_core.placement.routing import Routing
from flux2_core.plan import flops
from tests.flux2_core.jobs import asked, described

MID = {
    "in_channels": 128, "num_layers": 2, "num_single_layers": 6, "attention_head_dim": 64, "num_attention_heads": 6,
    "joint_attention_dim": 384, "timestep_guidance_channels": 64, "axes_dims_rope": (16, 16, 16, 16), "mlp_ratio": 3.0,
    "guidance_embeds": True, "out_channels": None,
}  # fmt: skip


PAIRS = [{"path": "x", "rejected": "y"}]
SLIDER = {"slider": {"target": "a", "positive": "b", "negative": "c", "anchor": "d"}}
SLIDER |= {"train": {"batch_size": 2}, "text": {"max_length": 24}, "cluster": {"micro_batch": 2}}


def folder(tiny: Path, size: str) -> ModelFolder:
    """The tiny model, or one of a middle size of which only the configuration is there."""

    class Mid(ModelFolder):
        def config(self, part: str) -> dict[str, Any]:
            return dict(MID) if part == "transformer" else super().config(part)

    found = resolve(Model(path=str(tiny)), parts=("transformer",))
    return found if size == "tiny" else Mid(found.path, found.family)


def counted(model: ModelFolder, config: Config, policy: str | int, *, side: int) -> tuple[float, float]:
    """FLOP of a forward pass of the base and of a training step, as torch counts them."""
    with torch.device("meta"):
        built = transformer.build(model, dtype=torch.float32)
        adapter.inject(built, config.lora, targets.match(config.lora, transformer.linear_names(built)))
        adapter.measure(built, device=torch.device("meta"))
        recompute.apply(built, policy, rank=config.lora.rank)
        pictures, text = config.train.batch_size, config.text.max_length
        given = {"img_ids": image_ids(side, side).to("meta"), "txt_ids": text_ids(text).to("meta"), "guidance": 1.0}
        noisy = torch.empty(pictures, side * side, CHANNELS)
        prompts = torch.empty(pictures, text, model.text_width)
        routing, tokens = Routing(config.tread, built), side * side
        stay = [torch.zeros(pictures, tokens - int(skip * tokens), dtype=torch.long) for *_, skip in routing.spans]
        over = partial(routing.over, stay, text=text, image=tokens, references=0)
        with FlopCounterMode(display=False) as forward, torch.no_grad(), adapter.switched_off(built), over():
            predict(built, noisy, prompts, torch.empty(pictures), **given)
        with FlopCounterMode(display=False) as step, over():
            predict(built, noisy, prompts, torch.empty(pictures), **given).sum().backward()
    return forward.get_total_flops(), step.get_total_flops()


@pytest.mark.parametrize("policy", ["none", "selective", 1, "full"])
@pytest.mark.parametrize("wanted", ["all", "diffusers"])
@pytest.mark.parametrize("size", ["tiny", "mid"])
def test_a_step_is_counted_as_torch_counts_it(tiny_model: Path, size: str, wanted: str, policy: str | int) -> None:
    """A training step, and one that preserves, on the tiny model and on one of a middle size: exactly so many."""
    model = folder(tiny_model, size)
    tree = {"model": {"path": "x"}, "data": [{"path": "x"}], "lora": {"rank": 4, "targets": wanted}}
    config = parse(tree | {"train": {"batch_size": 2}, "text": {"max_length": 24}})
    job = planner.job(config, model, world=1, local=1)
    forward, step = counted(model, config, policy, side=8)
    found = flops.step(job, Placement("ddp", "bf16", policy), model, 64)
    assert found.flop == pytest.approx(step, rel=1e-9)
    kept = config.model_copy(update={"train": config.train.model_copy(update={"preservation": "blank"})})
    preserving = flops.step(replace(job, config=kept), Placement("ddp", "bf16", policy), model, 64)
    assert preserving.flop == pytest.approx(2 * step + forward, rel=1e-9), "the base's pass, and one more of each other"
    moved = parse(
        tree | {"train": {"batch_size": 2}, "text": {"max_length": 24}, "loss": {"contrastive_guidance": 3.0}}
    )
    guided = flops.step(replace(job, config=moved), Placement("ddp", "bf16", policy), model, 64)
    assert guided.flop == pytest.approx(step + forward, rel=1e-9), "the base's pass"
    paired = parse(tree | {"train": {"batch_size": 2}, "text": {"max_length": 24}, "data": PAIRS})
    both = flops.step(replace(job, config=paired), Placement("ddp", "bf16", policy), model, 64)
    assert both.flop == pytest.approx(2 * (step + forward), rel=1e-9), "two pictures, with the adapter and without"
    assert flops.passes(replace(job, config=paired)) == (2, 1), "two together"
    assert replace(job, config=paired).tokens == 2 * job.tokens
    sliding = parse({key: tree[key] for key in ("model", "lora")} | SLIDER)
    slides = flops.step(replace(job, config=sliding), Placement("ddp", "bf16", policy), model, 64)
    assert slides.flop == pytest.approx(4 * step + 8 * forward, rel=1e-9), "both strengths of two prompts"
    assert flops.passes(replace(job, config=sliding)) == (12, 4)


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize(
    "lora", [{"kind": kind} for kind in KINDS] + [{"kind": "lokr", "rank": 64}, {"ranks": {"mlp": 2}}]
)
def test_every_kind_of_adapter_is_counted(tiny_model: Path, lora: dict[str, Any], policy: str) -> None:
    """A step with each kind within 1 %: what a pass does once, whatever its tokens (dora's norms, oft's inverses, the
    factors of loha), is left out; and the planner's count of parameters is what is there."""
    model = folder(tiny_model, "mid")
    tree = {"model": {"path": "x"}, "data": [{"path": "x"}], "lora": {"rank": 4, **lora}}
    config = parse(tree | {"train": {"batch_size": 2}, "text": {"max_length": 24}})
    job = planner.job(config, model, world=1, local=1)
    _, step = counted(model, config, policy, side=16)
    found = flops.step(job, Placement("ddp", "bf16", policy), model, 256)
    assert found.flop == pytest.approx(step, rel=0.01)
    with torch.device("meta"):
        built = transformer.build(model, dtype=torch.float32)
        adapter.inject(built, config.lora, targets.match(config.lora, transformer.linear_names(built)))
    assert job.adapter == sum(parameter.numel() for _, parameter in adapter.parameters(built))


def test_routes_and_rollouts_are_counted(tiny_model: Path) -> None:
    """A step whose tokens skip blocks, as torch counts it; of a rollout the mean of its passes, with all tokens."""
    model = folder(tiny_model, "mid")
    tree = {"model": {"path": "x"}, "data": [{"path": "x"}], "lora": {"rank": 4}, "text": {"max_length": 24}}
    routes = {"routes": [{"skip": 0.25, "start": 1, "end": 2}, {"skip": 0.5, "start": 4, "end": -2}]}
    config = parse(tree | {"tread": routes})
    forward, step = counted(model, config, "selective", side=8)
    plain, _ = counted(model, parse(tree), "selective", side=8)
    placement = Placement("ddp", "bf16", "selective")

    def found(**sections: Any) -> float:
        job = planner.job(parse(tree | {"tread": routes} | sections), model, world=1, local=1)
        return flops.step(job, placement, model, 64).flop

    assert forward < 0.9 * plain
    assert found() == pytest.approx(step, rel=1e-9)
    assert found(rollout={"probability": [0, 0.5], "steps": 3}) == pytest.approx(step + plain / 2, rel=1e-9)
    assert found(loss={"contrastive_guidance": 3.0}) == pytest.approx(step + plain, rel=1e-9)
    assert found(train={"preservation": "blank"}) == pytest.approx(2 * step + forward, rel=1e-9)


@pytest.mark.parametrize("precision", ["fp8-matmul", "int8", "bf16"])
def test_what_is_multiplied_in_8_bits(precision: str) -> None:
    """With `-matmul` the base's products, 99.5 % at FLUX.2-dev's size, are in 8 bits, the adapter's are not; a base
    that is only kept in few bits is widened, which moves more bytes than one in bf16."""
    job, dev = asked(), described("dev")
    found = flops.step(job, Placement("ddp", precision, "none"), dev, 4096)
    plain = flops.step(job, Placement("ddp", "bf16", "none"), dev, 4096)
    assert found.flop == plain.flop == pytest.approx(600e12, rel=0.01)
    eight = found.products["fp8"] / sum(found.products.values())
    assert eight == (pytest.approx(0.995, abs=0.001) if precision == "fp8-matmul" else 0)
    assert (found.moved > plain.moved) == (precision != "bf16")


@pytest.mark.parametrize("kind", ["dev", "klein"])
def test_a_text_encoder_is_counted_as_torch_counts_it(tmp_path: Path, kind: str) -> None:
    """Layers up to the last that is tapped, two prompts of different lengths, within 2 %."""
    build = {"dev": tiny_model.build_model, "klein": tiny_model.build_klein_model}[kind]
    model = resolve(Model(path=str(build(tmp_path))), parts=("text_encoder",))
    language = load_language_model(model, dtype=torch.float32, device=torch.device("cpu"))
    lengths = 300, 40
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # which it counts
        for length in lengths:
            language(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    found = flops.texts(model, tokens=sum(lengths), squares=sum(length**2 for length in lengths), dtype="bf16")
    assert found.flop == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("sizes", [{}, {"block_out_channels": (16, 32, 64, 64), "mid_block_add_attention": False}])
def test_a_vae_is_counted_as_torch_counts_it(tiny_model: Path, sizes: dict[str, Any]) -> None:
    """The encoder of FLUX.2's VAE at its real sizes, and another one, two pictures of different shapes, within 2 %."""
    with torch.device("meta"):
        vae = AutoencoderKLFlux2(**({"norm_num_groups": 8} if sizes else {}), **sizes)

    class Other(ModelFolder):
        def config(self, part: str) -> dict[str, Any]:
            return dict(vae.config)

    shapes = (256, 192), (128, 512)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        for height, width in shapes:
            vae.encode(torch.empty(1, 3, height, width, device="meta"))
    tokens = [height * width // 256 for height, width in shapes]
    counted = {"tokens": sum(tokens), "squares": sum(t**2 for t in tokens)}
    found, half = (
        flops.pictures(Other(tiny_model, FAMILIES["dev"]), **counted, precision=precision)
        for precision in ("fp32", "bf16")
    )
    assert found.flop == half.flop == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert (half.products, half.moved) == ({"bf16": found.products["tf32"]}, found.moved / 2)
