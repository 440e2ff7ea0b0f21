"""Encoding is placed as training is: the text encoder whole on a card or streamed layer by layer, the size of passes.

None of it changes a row by more than a pass's size always did, so none of it is in a fingerprint. `text.quantize` is in
one: it is never chosen here, only advised (decisions/0037). Of a picture the whole is encoded, never tiles of it.

Legend: h hidden width of the text encoder, i its feed-forward width; tokens and pixels are those of one forward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from flux2_core import accelerator
from flux2_core.config.sections import Config
from flux2_core.errors import SetupError, UsageError
from flux2_core.model.folder import ModelFolder
from flux2_core.model.tokenizer import TOKEN_BUDGET
from flux2_core.placement import planner
from flux2_core.placement.planner import BYTES, FILLED, GATHERED, PINNED, SPARE, VAE

if TYPE_CHECKING:
    from flux2_core.model.text_encoder import TextEncoder

PIXELS_PER_PASS = 4 * 1024 * 1024
ENCODED = 2560  # bytes per pixel that the VAE's encoder works in: five maps of 128 channels, counted in fp32
HALVINGS = 3  # of a text pass: 1,024 tokens still keep a card busy; with fewer, streaming would be no slower
WIDENED = {"int8": 2, "fp8": 2, "int4": 3}  # copies of one Linear's weight while it is rebuilt for its matmul
WHOLE, STREAM = "whole", "stream"


@dataclass(frozen=True)
class Encoding:
    """Where an encoder lies, what one pass takes, and the bytes of it on a card (and in the host's memory)."""

    strategy: str
    most: float
    """Tokens or pixels of a pass, those of a single one apart."""
    total: float = 0.0
    host: float = 0.0


def text(
    config: Config, model: ModelFolder, limit: float | None, *, host: float = math.inf, encoders: int = 1
) -> Encoding:
    """The text encoder within `limit` bytes of a card and a node's free host memory; on a CPU (None) whole.

    Whole with smaller passes comes before streaming: that brings every layer for each pass.

    Raises:
        UsageError: it fits in no way; names what to set.
    """
    if limit is None:
        return Encoding(WHOLE, math.inf)
    budgets = [max(TOKEN_BUDGET >> times, config.text.max_length) for times in range(HALVINGS + 1)]
    tried = [_text(config, model, strategy, most) for strategy in (WHOLE, STREAM) for most in budgets]
    for one in tried:
        if one.total <= limit and one.host * encoders <= PINNED * host:
            return one
    least = tried[-1]
    told = f"{least.total / 1e9:.1f} GB, and {least.host * encoders / 1e9:.1f} GB of a node's host memory"
    free = "" if host == math.inf else f" and {host / 1e9:.1f} GB of host memory are free"
    ways = ['text.quantize="int8" or "int4"'] if BYTES[_kind(config)] > BYTES["int4"] else []
    ways += ["fewer cluster.encoders"] if encoders > 1 else []
    raise UsageError(
        f"the text encoder does not fit the {limit / 1e9:.1f} GB of a card ({FILLED:.0%} of what is free or of "
        f"cluster.gpu_memory){free}: streamed layer by layer it takes {told}; "
        + (f"set {', '.join(ways)}" if ways else "use a larger card or machine")
    )


def pictures(config: Config, limit: float | None) -> Encoding:
    """Passes of the VAE within `limit` bytes of a card; one picture is always tried, whatever it takes."""
    alone = max(max(data.resolutions) for data in config.data) ** 2
    if limit is None:
        return Encoding(WHOLE, math.inf)
    most, each = max(PIXELS_PER_PASS, alone), ENCODED * BYTES[config.latents.precision] / BYTES["fp32"]
    while most > alone and VAE + SPARE + each * most > limit:
        most = max(most // 2, alone)
    return Encoding(WHOLE, most, VAE + SPARE + each * most)


def advice(config: Config, model: ModelFolder, chosen: Encoding, limit: float) -> str | None:
    """What a person may set where the exact encoder is streamed: fewer bits a weight, which are other rows."""
    if chosen.strategy == WHOLE or config.text.quantize != "none":
        return None
    for kind in ("int8", "int4"):
        rounded = planner.altered(config, text={"quantize": kind})
        if (whole := _text(rounded, model, WHOLE, TOKEN_BUDGET)).total <= limit:
            return f'text.quantize="{kind}" fits whole in {whole.total / 1e9:.1f} GB: faster, with rows of its own'
    return None


def build(config: Config, model: ModelFolder, device: torch.device) -> tuple[TextEncoder, Encoding]:
    """The text encoder where it fits of this process's device.

    Raises:
        UsageError: it fits in no way.
        SetupError: the card is full all the same.
    """
    from flux2_core.model.text_encoder import TextEncoder

    chosen = text(config, model, here(config, device), host=accelerator.free_host_bytes())
    streamed = chosen.strategy == STREAM
    try:
        encoder = TextEncoder(model, config.text, device=str(device), streamed=streamed)
        if streamed:
            from flux2_core.placement.stream import Stream  # brings diffusers, for nothing where a card is large

            Stream(encoder.language_model.layers, device)
    except torch.OutOfMemoryError as error:
        raise SetupError(
            f"the text encoder does not fit the card ({str(error).split('. ')[0]}): set cluster.gpu_memory to the GiB "
            'that are really free, so that it is streamed, or text.quantize="int8"'
        ) from error
    return encoder, chosen


def here(config: Config, device: torch.device) -> float | None:
    """Bytes of this process's card that may be filled; None for a CPU, and for a make that does not tell."""
    return planner.card(config, accelerator.free_bytes(device)) if accelerator.is_gpu(device) else None


def _text(config: Config, model: ModelFolder, strategy: str, most: int) -> Encoding:
    sizes, item, kind = layers(model), BYTES["fp32" if config.text.dtype == "fp32" else "bf16"], _kind(config)
    h, i = sizes["h"], sizes["i"]
    every = sizes["count"] * sizes["layer"] * BYTES[kind]
    moving = GATHERED * sizes["layer"] * BYTES[kind]
    base = (every if strategy == WHOLE else moving) + sizes["embedding"] * item
    base += WIDENED.get(kind, 0) * h * i * item
    if config.text.stored == "projected":
        base += model.inner_width * model.text_width * item
    work = most * (3 * i + 8 * h) * item  # gate, up, their product; norms' fp32 copies, the states tapped so far
    return Encoding(strategy, most, base + work + SPARE, every if strategy == STREAM else 0.0)


def layers(model: ModelFolder) -> dict[str, int]:
    """Widths of the text encoder, and parameters of its embedding and of each of the `count` layers that are needed."""
    config: dict[str, Any] = model.config("text_encoder")
    config = config.get("text_config", config)
    h, i, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or h // heads
    attention = 2 * h * head * (heads + config["num_key_value_heads"])
    return {
        "h": h, "i": i, "count": max(model.family.taps), "layer": attention + 3 * h * i + 2 * h,
        "embedding": config["vocab_size"] * h,
    }  # fmt: skip


def _kind(config: Config) -> str:
    small = config.text.quantize
    return small if small != "none" else "fp32" if config.text.dtype == "fp32" else "bf16"
