"""`python -m bench.gpu_encode`: the full-size text encoder and VAE on a GPU, random weights, a JSON line a measurement.

Run it where a GPU is; no download is needed. Weights are made in place on the device, normal with std 1/sqrt(fan in)
(never zeros: those run 13 % too fast). Sizes are Mistral Small's language model (30 of its layers) and FLUX.2's VAE;
`--tiny` runs the same code with toy sizes on whatever device there is, and its figures mean nothing.

The peers' path is what their trainers call: 40 layers over prompts padded to 512, all hidden states kept.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from transformers import MistralConfig, MistralModel

from bench import captions
from flux2_core.model.text_encoder import batches, tapped
from flux2_core.model.tokenizer import TOKEN_BUDGET
from flux2_core.placement.encoding import PIXELS_PER_PASS

THEIR_BATCH = 4
MAX_LENGTH = 512


@dataclass(frozen=True)
class Sizes:
    """What is built; the defaults are the real ones."""

    taps: tuple[int, int, int] = (10, 20, 30)
    their_layers: int = 40
    hidden: int = 5120
    ff: int = 32768
    heads: int = 32
    kv_heads: int = 8
    head_width: int = 128
    vocabulary: int = 131072
    inner: int = 6144
    """Width of the transformer, of projected rows."""
    vae: Mapping[str, Any] = field(default_factory=dict)
    side: int = 1024
    """Of a picture, in pixels."""


TINY = Sizes(
    taps=(1, 2, 3), their_layers=4, hidden=32, ff=48, heads=2, kv_heads=1, head_width=16, vocabulary=64, inner=96,
    vae={"block_out_channels": (16, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 8}, side=32,
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_encode", description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=256, help="how many are encoded per measurement")
    parser.add_argument("--images", type=int, default=64, help="how many are encoded per measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each; the median is printed")
    parser.add_argument("--theirs", action="store_true", help="also the peers' path (48 GB of weights)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: shows that it works")
    options = parser.parse_args(arguments)
    for line in measure(options):
        print(json.dumps(line), flush=True)
    return 0


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every measurement as a dictionary of what, figures and hardware."""
    sizes = TINY if options.tiny else Sizes()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    hardware = {"device": name, "torch": torch.__version__, "tiny": options.tiny}
    lengths = captions.lengths(options.captions)
    model, projection_ID = encoder(sizes, layers=max(sizes.taps), device=device)
    ours = _rate(partial(encode, model, projection_ID, sizes, lengths), options.captions, device, options.rounds)
    mean = round(sum(lengths) / len(lengths), 1)
    yield {"what": "captions", "per_second": ours, "tokens": mean, **_memory(model, device)} | hardware
    if options.theirs:
        del model, projection_ID
        model, _ = encoder(sizes, layers=sizes.their_layers, device=device)
        part = min(options.captions, 8 * THEIR_BATCH)  # all cost the same: every prompt has 512 tokens
        theirs = _rate(partial(encode_padded, model, sizes, part), part, device, options.rounds)
        told = {"per_second": theirs, "ratio": ours / theirs, **_memory(model, device)}
        yield {"what": f"captions, {sizes.their_layers} layers of {MAX_LENGTH} tokens", **told} | hardware
    del model
    vae = autoencoder(sizes, device=device)
    for precision in (torch.float32, torch.bfloat16):
        made = partial(encode_images, vae.to(precision), options.images, sizes.side)
        images = _rate(made, options.images, device, options.rounds)
        what = "VAE images" + (", bf16" if precision == torch.bfloat16 else "")
        yield {"what": what, "per_second": images, "side": sizes.side, **_memory(vae, device)} | hardware


def encoder(sizes: Sizes, *, layers: int, device: torch.device) -> tuple[Any, torch.Tensor]:
    """The language model of so many layers, without its final norm, and `context_embedder`'s weight, in bf16."""
    config = MistralConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.hidden, intermediate_size=sizes.ff, num_hidden_layers=layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, head_dim=sizes.head_width,
        max_position_embeddings=131072, sliding_window=None,
    )  # fmt: skip
    with torch.device("meta"):
        model = MistralModel._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    model.norm = torch.nn.Identity()
    model = in_place(model, device).eval()
    model.rotary_emb = type(model.rotary_emb)(config=config).to(device)
    width = len(sizes.taps) * sizes.hidden
    projection_ID = torch.empty(sizes.inner, width, dtype=torch.bfloat16, device=device)
    return model, projection_ID.normal_(std=1 / math.sqrt(width))


def autoencoder(sizes: Sizes, *, device: torch.device) -> Any:
    """FLUX.2's VAE in fp32, as the product runs it."""
    with torch.device("meta"):
        vae = AutoencoderKLFlux2(**sizes.vae)
    return in_place(vae, device).eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def in_place(model: Any, device: torch.device) -> Any:
    """Give a model of the meta device random weights on a device, without a copy elsewhere."""
    model = model.to_empty(device=device).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=1 / math.sqrt(parameter[0].numel()))
        else:
            parameter.normal_(mean=1.0, std=0.1)
    return model


@torch.inference_mode()
def encode(model: Any, projection_ID: torch.Tensor, sizes: Sizes, lengths: list[int]) -> torch.Tensor:
    """The product's passes: real tokens only, like lengths together, projected at once; returns the last rows."""
    made = torch.empty(0)
    for group in batches(lengths, budget=TOKEN_BUDGET):
        longest = max(lengths[place] for place in group)
        own = torch.tensor([lengths[place] for place in group]).unsqueeze(1)
        mask_BN = (torch.arange(longest) >= longest - own).long()
        ids_BN = torch.randint(sizes.vocabulary, (len(group), longest))
        states_BND = tapped(model, sizes.taps, ids_BN, mask_BN, offset=MAX_LENGTH - longest)
        rows_ND = torch.cat([states[-lengths[place] :] for states, place in zip(states_BND, group, strict=True)])
        made = torch.nn.functional.linear(rows_ND, projection_ID).cpu()
    return made


@torch.inference_mode()
def encode_padded(model: Any, sizes: Sizes, count: int) -> torch.Tensor:
    """The peers' passes: 512 tokens each, the states of every layer kept, three of them taken."""
    made = torch.empty(0)
    for start in range(0, count, THEIR_BATCH):
        ids_BL = torch.randint(sizes.vocabulary, (min(THEIR_BATCH, count - start), MAX_LENGTH))
        ids_BL = ids_BL.to(model.device)
        states = model(
            input_ids=ids_BL, attention_mask=torch.ones_like(ids_BL), output_hidden_states=True, use_cache=False
        ).hidden_states
        made = torch.cat([states[tap] for tap in sizes.taps], dim=-1).cpu()
    return made


@torch.inference_mode()
def encode_images(vae: Any, count: int, side: int) -> torch.Tensor:
    """Latents of random pictures, as many at a time as the product gives the VAE."""
    made, batch = torch.empty(0), max(1, PIXELS_PER_PASS // side**2)
    for start in range(0, count, batch):
        pixels = torch.rand(min(batch, count - start), 3, side, side, device=vae.device) * 2 - 1
        made = vae.encode(pixels.to(vae.dtype)).latent_dist.mode().cpu()
    return made


def _rate(work: Callable[[], torch.Tensor], count: int, device: torch.device, rounds: int) -> float:
    """Items a second, by the median of some turns after an unmeasured one, whose result must be finite and varied."""
    made = work()
    assert made.isfinite().all(), "random weights blew up"
    assert made.float().std() > 0, "nothing was computed"
    seconds = []
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return count / statistics.median(seconds)


def _memory(model: Any, device: torch.device) -> dict[str, float]:
    """Gigabytes of weights and, on a GPU, the peak since the last question."""
    told = {"weights_gb": round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9, 3)}
    if device.type == "cuda":
        told["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        torch.cuda.reset_peak_memory_stats()
    return told


if __name__ == "__main__":
    raise SystemExit(main())
