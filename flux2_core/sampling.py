"""Drawing pictures from cached prompt embeddings: FLUX.2's Euler sampler, without any text encoder.

Legend: B prompts, L text rows, D row width, S = h * w image tokens, c = 128 channels.
Reference: diffusers `Flux2Pipeline.__call__` with `FlowMatchEulerDiscreteScheduler`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from flux2_core.flow_matching import generator, predict, sampling_sigmas
from flux2_core.latents import CHANNELS, PIXELS_PER_TOKEN, from_tokens, image_ids, text_ids, to_tokens


@torch.no_grad()
def draw(
    transformer: Any,
    prompts_BLD: torch.Tensor,
    seeds: list[int],
    *,
    height: int,
    width: int,
    steps: int,
    guidance: float | None,
    device: torch.device,
) -> torch.Tensor:
    """Denoise one picture per prompt and seed; return normalised latents (B, 128, h, w), fp32.

    Args:
        transformer: the model, with or without its adapter.
        prompts_BLD: prompt embeddings, all rows.
        seeds: one per prompt; a picture depends on its own seed alone.
        height: pixels, a multiple of 16.
        width: pixels, a multiple of 16.
        steps: Euler steps.
        guidance: what the model is told; None for a model without guidance embedding.
        device: where the transformer is.
    """
    h, w = height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN
    noise = [torch.randn(CHANNELS, h, w, generator=generator(seed, "preview")) for seed in seeds]
    x_BSc = to_tokens(torch.stack(noise)).to(device)
    prompts = prompts_BLD.to(device)
    ids = {"img_ids": image_ids(h, w).to(device), "txt_ids": text_ids(prompts.shape[1]).to(device)}
    sigmas = sampling_sigmas(h * w, steps)
    for now, then in itertools.pairwise(sigmas):
        sigma_B = now.expand(len(seeds)).to(device)
        x_BSc = (
            x_BSc
            + (then - now).to(device) * predict(transformer, x_BSc, prompts, sigma_B, guidance=guidance, **ids).float()
        )
    return from_tokens(x_BSc, height=h, width=w).cpu()
