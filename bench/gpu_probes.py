"""`python -m bench.gpu_probes NAME`: one thing that only a card can tell; `bench.gpu_ten_minutes` runs them all.

`correct` trains a small model through the product's own building, in one precision and one way, on the card and on the
CPU: the prediction and the adapter's gradient must be those of the CPU in the same precision, but for bf16's rounding.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import captions, gpu_encode, sizes
from flux2_core import accelerator
from flux2_core.accelerator import Lane
from flux2_core.config.reading import parse
from flux2_core.lora import adapter
from flux2_core.model.families import DEV
from flux2_core.model.flow import predict
from flux2_core.model.folder import ModelFolder
from flux2_core.model.latents import CHANNELS, image_ids, text_ids
from flux2_core.model.quanto import QuantizedLinear
from flux2_core.placement import build, compiled, planner
from flux2_core.placement.planner import Placement

SMALL = sizes.DEV | {
    "num_layers": 2, "num_single_layers": 4, "attention_head_dim": 128, "num_attention_heads": 2,
    "joint_attention_dim": 256, "timestep_guidance_channels": 64,
}  # fmt: skip
TOLD_APART = {"prediction": 0.05, "gradient": 0.15}  # relative: bf16 sums in another order reach a fifth of it
SHAPES = {"in": (4608, 6144, 55296), "out": (4608, 24576, 6144), "square": (4608, 6144, 6144)}  # rows, inputs, outputs
ROUNDS, WARM = 20, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_probes", description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(PROBES))
    parser.add_argument(
        "words", nargs="*", help="of `correct`: precision and resident, stream or compile; captions: none, int8"
    )
    parser.add_argument("--tiny", action="store_true", help="toy sizes: shows that it works")
    options = parser.parse_args(arguments)
    accelerator.let_segments_grow()
    for line in PROBES[options.name](*options.words, tiny=options.tiny):
        print(json.dumps({"probe": " ".join([options.name, *options.words])} | line), flush=True)
    return 0


def card(*, tiny: bool) -> Iterator[dict[str, Any]]:
    """What is there."""
    device = accelerator.here()
    yield {
        "device": accelerator.name(device), "memory_gb": _gb(accelerator.total_bytes(device)),
        "free_gb": _gb(accelerator.free_bytes(device)), "capability": accelerator.capability(device),
        "host_gb": _gb(accelerator.free_host_bytes()), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "triton": importlib.util.find_spec("triton") is not None,
    }  # fmt: skip


def correct(precision: str, how: str, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """How far the card is from the CPU."""
    if tiny:
        compiled.BACKEND = "aot_eager"
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        fewest = {"num_layers": 1, "num_single_layers": 1} if tiny else {}
        Flux2Transformer2DModel.from_config(SMALL | fewest).save_pretrained(Path(folder, "transformer"))
        model = ModelFolder(Path(folder), DEV)
        theirs = _trained(model, precision, "resident", torch.device("cpu"))
        ours = _trained(model, precision, how, accelerator.here())
    apart = {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in TOLD_APART}
    yield {"apart": {name: round(value, 5) for name, value in apart.items()}} | {
        "ok": all(apart[name] <= most for name, most in TOLD_APART.items())
    }


def _trained(model: ModelFolder, precision: str, how: str, device: torch.device) -> dict[str, torch.Tensor]:
    """A prediction and the adapter's gradients, on the CPU in fp32."""
    streamed = how == "stream"
    train = {"precision": precision, "compile": how == "compile"}
    config = parse({"model": {"path": "x"}, "data": [{"path": "x"}], "text": {"max_length": 32}, "train": train})
    job = planner.job(config, model, world=1, local=1)
    chosen = Placement("stream" if streamed else "ddp", precision, "full" if streamed else "none")
    built = build.build(job, chosen, model, device=device, compiler=compiled.of(config.train, device))
    chance = torch.Generator().manual_seed(1)
    trained = [parameter for _, parameter in adapter.parameters(built)]
    with torch.no_grad():
        for parameter in trained:  # the outer factor is zero at the start of a training
            parameter.copy_(torch.randn(parameter.shape, generator=chance) / parameter.shape[-1] ** 0.5)
    noisy, prompts = (torch.randn(1, count, width, generator=chance) for count, width in ((64, CHANNELS), (32, 256)))
    dtype = build.compute_dtype(config.train, device)
    with accelerator.autocast(device, dtype):
        prediction = predict(
            built, noisy.to(device), prompts.to(device, dtype), torch.tensor([0.5], device=device), guidance=1.0,
            img_ids=image_ids(8, 8).to(device), txt_ids=text_ids(32).to(device),
        )  # fmt: skip
    prediction.float().square().mean().backward()
    gradients = torch.cat(
        [parameter.grad.float().flatten().cpu() for parameter in trained if parameter.grad is not None]
    )
    return {"prediction": prediction.detach().float().cpu(), "gradient": gradients}


def matmuls(*, tiny: bool) -> Iterator[dict[str, Any]]:
    """TFLOP/s at FLUX.2-dev's shapes, in bf16 and 8 bits; of fp8 with fast accumulation and without."""
    device = accelerator.here()
    for name, shape in SHAPES.items():
        m, k, n = (size // 64 for size in shape) if tiny else shape
        x, w = (torch.randn(*size, device=device, dtype=torch.bfloat16) for size in ((m, k), (n, k)))
        ways: dict[str, Callable[[], Any]] = {"bf16": partial(torch.mm, x, w.t())}
        small = [each.to(torch.int8) for each in (x, w)]
        ways["int8"] = partial(torch._int_mm, small[0], small[1].t())
        if accelerator.is_gpu(device):  # a CPU has no fp8 product
            left, right = (each.to(torch.float8_e4m3fn) for each in (x, w))
            scales = {"scale_a": torch.ones(m, 1, device=device), "scale_b": torch.ones(1, n, device=device)}
            for fast in (False, True):
                ways[f"fp8 use_fast_accum={fast}"] = partial(
                    torch._scaled_mm, left, right.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=fast
                )
        rates = {way: round(2 * m * k * n / _seconds(run, tiny=tiny) / 1e12, 1) for way, run in ways.items()}
        yield {"shape": name, "rows_inputs_outputs": [m, k, n], "tflop_per_second": rates}


def attention(*, tiny: bool) -> Iterator[dict[str, Any]]:
    """Milliseconds forward, and forward and backward, of each backend at FLUX.2-dev's size."""
    device = accelerator.here()
    size = (1, 2, 64, 16) if tiny else (1, 48, 4608, 128)
    q, k, v = (torch.randn(*size, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def both() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()

    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        told = {"backend": backend.name.lower()}
        try:
            with sdpa_kernel(backend):
                times = [_seconds(run, tiny=tiny) for run in (forward, both)]
        except RuntimeError as error:
            yield told | {"refused": str(error).splitlines()[0][:120]}
            continue
        flop = 4 * size[1] * size[2] ** 2 * size[3]
        rates = [round(times * flop / seconds / 1e12, 1) for times, seconds in zip((1, 3), times, strict=True)]
        yield told | {"ms": [round(1e3 * seconds, 2) for seconds in times], "tflop_per_second": rates}


def copies(*, tiny: bool) -> Iterator[dict[str, Any]]:
    """GB/s inside the card and from pinned host memory, and how much of a copy hides behind matmuls."""
    device, size = accelerator.here(), 2**16 if tiny else 10**9
    there, other = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    inside = 2 * size / _seconds(partial(there.copy_, other), tiny=tiny)
    lane, side = Lane(device), 64 if tiny else 8192
    home = lane.home(size)
    x = torch.randn(side, side, device=device, dtype=torch.bfloat16)

    def copied() -> None:
        lane.wait(lane.bring(home, there))

    def computed() -> None:
        for _ in range(16):
            torch.mm(x, x)

    def both() -> None:
        arrival = lane.bring(home, there)
        computed()
        lane.wait(arrival)

    alone, busy, together = (_seconds(run, tiny=tiny) for run in (copied, computed, both))
    hidden = (alone + busy - together) / min(alone, busy)
    yield {"inside_gb_per_second": round(inside / 1e9, 1), "from_host_gb_per_second": round(size / alone / 1e9, 1)} | {
        "copy_ms": round(1e3 * alone, 2), "compute_ms": round(1e3 * busy, 2), "together_ms": round(1e3 * together, 2),
        "hidden": round(hidden, 3),
    }  # fmt: skip


def captions_of(kind: str, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """Captions a second, with the encoder's Linears in bf16 or rounded by quanto, one after the other."""
    shape, device = gpu_encode.TINY if tiny else gpu_encode.Sizes(), accelerator.here()
    lengths = captions.lengths(8 if tiny else 256)
    model, projection = gpu_encode.encoder(shape, layers=max(shape.taps), device=device)
    if kind != "none":
        for place, linear in list(model.named_modules()):
            if isinstance(linear, torch.nn.Linear):
                owner, _, leaf = place.rpartition(".")
                setattr(model.get_submodule(owner), leaf, QuantizedLinear(linear.weight, linear.bias, kind=kind))
    seconds = _seconds(partial(gpu_encode.encode, model, projection, shape, lengths), tiny=tiny, rounds=3, warm=1)
    weights = sum(parameter.nbytes for parameter in model.parameters()) / 1e9
    yield {"captions_per_second": round(len(lengths) / seconds, 2), "weights_gb": round(weights, 2)} | _peak(device)


def pictures(*, tiny: bool) -> Iterator[dict[str, Any]]:
    """The VAE: pictures a second, few and many, and what tiles cost, and change, of a picture four times as large."""
    shape, device = gpu_encode.TINY if tiny else gpu_encode.Sizes(), accelerator.here()
    vae = gpu_encode.autoencoder(shape, device=device)
    for count in (4, 16):
        work = partial(gpu_encode.encode_images, vae, count, shape.side)
        yield {"pictures": count, "per_second": round(count / _seconds(work, tiny=tiny, rounds=3, warm=1), 2)} | _peak(
            device
        )
    large = torch.rand(1, 3, 2 * shape.side, 2 * shape.side, device=device) * 2 - 1

    @torch.inference_mode()
    def encode() -> torch.Tensor:
        return vae.encode(large).latent_dist.mode()

    whole = encode()
    seconds = [_seconds(encode, tiny=tiny, rounds=3, warm=1)]
    vae.enable_tiling()
    tiled = encode()
    seconds.append(_seconds(encode, tiny=tiny, rounds=3, warm=1))
    apart = float((tiled - whole).norm() / whole.norm())
    yield {
        "side": 2 * shape.side,
        "whole_s": round(seconds[0], 4),
        "tiled_s": round(seconds[1], 4),
        "apart": apart,
    } | _peak(device)


def _seconds(run: Callable[[], Any], *, tiny: bool, rounds: int = ROUNDS, warm: int = WARM) -> float:
    """Median of some turns, each waited for."""
    device, found = accelerator.here(), []
    for turn in range(2 if tiny else warm + rounds):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        if tiny or turn >= warm:
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def _wait(device: torch.device) -> None:
    if accelerator.is_gpu(device):
        torch.accelerator.synchronize(device)


def _peak(device: torch.device) -> dict[str, float]:
    return {"peak_gb": round(accelerator.peak_bytes(device) / 1e9, 2)} if accelerator.is_gpu(device) else {}


def _gb(count: int | None) -> float | None:
    return None if count is None else round(count / 1e9, 1)


PROBES: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "card": card, "correct": correct, "matmuls": matmuls, "attention": attention, "copies": copies,
    "captions": captions_of, "pictures": pictures,
}  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
