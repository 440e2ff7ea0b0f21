"""Flow matching as FLUX.2 is trained: noisy input, velocity target, noise levels and loss, as pure functions.

Legend: B batch, S image tokens, c = 128 channels, L text rows, D row width. sigma in [0, 1]: 1 is pure noise.
Reference: diffusers `examples/dreambooth/train_dreambooth_lora_flux2.py`. Its `u` counts from the noise end; ours is
sigma itself.
"""

from __future__ import annotations

from typing import Any

import torch


def add_noise(clean: torch.Tensor, noise: torch.Tensor, sigma_B: torch.Tensor) -> torch.Tensor:
    """x_t = (1 - sigma) x0 + sigma noise."""
    sigma = sigma_B.view(-1, *([1] * (clean.ndim - 1)))
    return (1 - sigma) * clean + sigma * noise


def velocity(clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What the model predicts: noise - x0."""
    return noise - clean


def predict(
    transformer: Any,
    noisy_BSc: torch.Tensor,
    prompt_BLD: torch.Tensor,
    sigma_B: torch.Tensor,
    *,
    img_ids: torch.Tensor,
    txt_ids: torch.Tensor,
    guidance: float | torch.Tensor | None,
) -> torch.Tensor:
    """One forward pass: predicted velocity (B, S, c).

    `noisy_BSc` stays fp32: the model casts time to its dtype, and bf16 would tell it a time up to 3.9/1000 away from
    the noise that it sees.
    """
    guide = torch.full_like(sigma_B, guidance) if isinstance(guidance, float | int) else guidance
    return transformer(
        hidden_states=noisy_BSc,
        encoder_hidden_states=prompt_BLD,
        timestep=sigma_B,
        img_ids=img_ids,
        txt_ids=txt_ids,
        guidance=guide,
        return_dict=False,
    )[0]


def empirical_mu(tokens: int, steps: int) -> float:
    """Time shift of FLUX.2's sampler by image tokens and steps (reference: `compute_empirical_mu`)."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + at_200 - 200.0 * slope


def sampling_sigmas(tokens: int, steps: int) -> torch.Tensor:
    """Noise levels of the sampler, (steps + 1,) from 1 to 0, shifted by `empirical_mu`."""
    plain = torch.linspace(1.0, 1.0 / steps, steps, dtype=torch.float64)
    shift = torch.tensor(empirical_mu(tokens, steps), dtype=torch.float64).exp()
    return torch.cat([shift / (shift + (1 / plain - 1)), torch.zeros(1, dtype=torch.float64)]).float()
