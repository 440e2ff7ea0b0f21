"""`python -m bench.gpu_step`: training steps of full-size FLUX.2-dev on a GPU, random weights, a JSON line a setting.

Run it where a GPU is; no download is needed. Weights are made in place on the device, normal with std 1/sqrt(fan in)
(never zeros: those run 13 % too fast). Block by block it is what the trainer runs: the same Linears, policies, adapter,
autocast, clipping and fused AdamW; batches are random tensors. Useful TFLOP leave recomputing out. With
`--strategy stream` the blocks wait in host memory. Each line carries
what the planner foresaw, to be held against `peak_gb`. `--tiny` runs the same code with toy sizes on whatever device
there is, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from bench import sizes
from flux2_core import accelerator
from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.lora import adapter, targets
from flux2_core.model import frozen_linear, transformer
from flux2_core.model.flow import add_noise, predict, velocity
from flux2_core.model.frozen_linear import FrozenLinear
from flux2_core.model.latents import CHANNELS, PIXELS_PER_TOKEN, image_ids, text_ids
from flux2_core.placement import build, planner, recompute, stream
from flux2_core.placement.compiled import Compiled
from flux2_core.placement.planner import Placement
from flux2_core.plan import flops
from flux2_core.train.losses import mse_B

CASES = {"1024x1": (1024, 1), "512x4": (512, 4)}  # side in pixels, pictures a step
TINY_CASES = {"1024x1": (64, 1), "512x4": (32, 4)}
WARM, MEASURED = 2, 5  # steps; the compiler works in the first


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_step", description=__doc__.splitlines()[0])
    parser.add_argument("--precision", nargs="+", default=["bf16", "fp8-matmul"], help="of train.precision")
    parser.add_argument("--strategy", choices=["ddp", "stream"], default="ddp", help="stream: blocks in host memory")
    parser.add_argument("--recompute", nargs="+", default=["none", "selective", "full"], help="of train.recompute")
    parser.add_argument("--compile", nargs="+", choices=["off", "on"], default=["off", "on"])
    parser.add_argument("--fast-accum", action="store_true", help="let fp8 products sum up in fewer bits")
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), help="side x pictures")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=480, help="begin no further setting after so long")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: shows that it works")
    options = parser.parse_args(arguments)
    accelerator.let_segments_grow()
    if options.strategy == "stream":
        options.recompute = ["full"]
    for line in measure(options):
        print(json.dumps(line), flush=True)
    return 0


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every setting as a dictionary of what, figures and hardware; one that does not fit says `out_of_memory`."""
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frozen_linear.FAST_ACCUMULATION = options.fast_accum
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    hardware = {"device": name, "torch": torch.__version__, "tiny": options.tiny, "fast_accum": options.fast_accum}
    for precision in options.precision:
        bench = Bench(precision, device=device, rank=options.rank, tiny=options.tiny, strategy=options.strategy)
        for case in options.case:
            for again in options.recompute:
                for compiled in options.compile:
                    told = {"case": case, "precision": precision, "strategy": options.strategy}
                    told |= {"recompute": again, "compile": compiled == "on"}
                    if time.perf_counter() - began > options.seconds:
                        yield told | {"left_out": f"after {options.seconds} s"}
                        continue
                    policy = int(again) if again.isdigit() else again
                    yield told | bench.run(case, policy, compiled=compiled == "on") | hardware
        del bench
        if device.type == "cuda":
            torch.cuda.empty_cache()


class Bench:
    """One model of random weights on the device, its adapter and its optimizer."""

    def __init__(self, precision: str, *, device: torch.device, rank: int, tiny: bool, strategy: str = "ddp") -> None:
        self.precision, self.device, self.tiny, self.strategy = precision, device, tiny, strategy
        self.folder = sizes.sized(tiny=tiny)
        self.config = self._config(rank=rank)
        self.dtype = build.compute_dtype(self.config.train, device)
        self.model = transformer.build(self.folder, dtype=self.dtype)
        adapter.inject(
            self.model, self.config.lora, targets.match(self.config.lora, transformer.linear_names(self.model))
        )
        frozen_linear.swap(self.model, precision, dtype=self.dtype, device=device)
        fill(self.model, device=device, host_blocks=strategy == "stream")
        adapter.initialise(self.model, seed=0, device=device)
        self.adapter = [parameter for _, parameter in adapter.parameters(self.model)]
        self.optimizer = torch.optim.AdamW(self.adapter, lr=1e-4, fused=device.type == "cuda")

    def _config(self, *, rank: int, side: int = 1024, pictures: int = 1, **train: Any) -> Config:
        return parse(
            {
                "model": {"path": "random"},
                "data": [{"path": "random", "resolutions": [side]}],
                "text": {"max_length": 16 if self.tiny else 512},
                "lora": {"rank": rank},
                "train": {"precision": self.precision, "batch_size": pictures, **train},
            }
        )

    def run(self, case: str, again: str | int, *, compiled: bool) -> dict[str, Any]:
        """Median seconds a step, useful TFLOP a second, peak and foreseen gigabytes."""
        side, pictures = (TINY_CASES if self.tiny else CASES)[case]
        rank = self.config.lora.rank
        config = self._config(rank=rank, side=side, pictures=pictures, recompute=again, compile=compiled)
        job = planner.job(config, self.folder, world=1, local=1)
        foreseen = planner.place(job, self.strategy, self.precision, again)
        for block in transformer.blocks(self.model):
            vars(block).pop("forward", None)  # of the setting before
        compiler = Compiled("aot_eager" if self.tiny else "inductor") if compiled else None
        streamed = self.strategy == "stream"
        recompute.apply(self.model, "none" if streamed else again, rank=rank, compiler=compiler)
        if streamed:
            stream.Stream(transformer.blocks(self.model), self.device)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        warm, steps = (1, 2) if self.tiny else (WARM, WARM + MEASURED)
        figures: dict[str, Any] = {"planned_gb": round(foreseen.total / 1e9, 2)}
        try:
            seconds = [self.step(side, pictures, config.text.max_length) for _ in range(steps)]
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad()
            return figures | {"out_of_memory": True}
        median = statistics.median(seconds[warm:])
        figures |= {"seconds": round(median, 4), "first_seconds": round(seconds[0], 1)}
        figures |= {"seconds_per_image": round(median / pictures, 4)}
        useful = flops.step(job, Placement("ddp", self.precision, "none"), self.folder, (side // PIXELS_PER_TOKEN) ** 2)
        figures["tflop_per_second"] = round(useful.flop / median / 1e12, 1)
        if self.device.type == "cuda":
            figures["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            figures["reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
        return figures

    def step(self, side: int, pictures: int, text: int) -> float:
        """Seconds of one optimizer step on random tensors."""
        h = side // PIXELS_PER_TOKEN
        clean, noise = (torch.randn(pictures, h * h, CHANNELS, device=self.device) for _ in range(2))
        width = self.folder.config("transformer")["joint_attention_dim"]
        prompts = torch.randn(pictures, text, width, device=self.device, dtype=self.dtype)
        sigma_B = torch.rand(pictures, device=self.device)
        self._wait()
        began = time.perf_counter()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            prediction = predict(
                self.model, add_noise(clean, noise, sigma_B), prompts, sigma_B, guidance=1.0,
                img_ids=image_ids(h, h).to(self.device), txt_ids=text_ids(text).to(self.device),
            )  # fmt: skip
        mse_B(prediction, velocity(clean, noise)).mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(self.adapter, 1.0)
        assert math.isfinite(float(norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def fill(model: Any, *, device: torch.device, host_blocks: bool = False) -> None:
    """Random weights for everything frozen, made on the device, a layer at a time; blocks may wait on the host."""
    for place, owner in list(model.named_modules()):
        device_of = torch.device("cpu") if host_blocks and "transformer_blocks." in place else device
        if isinstance(owner, FrozenLinear):
            weight = torch.empty(owner.out_features, owner.in_features, device=device)
            payload, scale = frozen_linear.quantise(weight.normal_(std=owner.in_features**-0.5), owner.precision)
            owner.payload = torch.nn.Parameter(payload.to(device_of), requires_grad=False)
            owner.scale = torch.nn.Parameter(scale.to(device_of), requires_grad=False)
            continue
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                value = value.normal_(std=value.shape[-1] ** -0.5) if value.ndim > 1 else value.fill_(1)
                setattr(owner, name, torch.nn.Parameter(value.to(device_of), requires_grad=False))


if __name__ == "__main__":
    raise SystemExit(main())
