"""Trains the embedded VAE: scenes and doodles to 32 channels and back, robust to small errors of the latents.

No Kullback-Leibler term: each latent is brought to unit variance by batch statistics (as FLUX.2's VAE does with running
ones) and noise is added before decoding. That makes every channel carry something, so that normalising amplifies no
empty one, and lets the decoder forgive what the transformer gets slightly wrong.

Legend: B batch, C = 32 channels, c = 128, pixels in [-1, 1].
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flux2_core.embedded.fitting import Plan, fit
from flux2_core.embedded.shapes import Scene, all_scenes, doodle, draw
from flux2_core.model.latents import denormalise, normalise, patchify, unpatchify

PLAN = Plan(steps=6250, batch=8, learning_rate=1.5e-3, warmup=200)
PICTURES = 12000
DOODLES = 0.35
OWLS = 0.15  # share of scenes with the demo subject: the VAE may know it, the transformer must not
HATCHED = 0.3  # share of scenes in the demo style
NOISE = 0.35  # largest noise added to unit-variance latents
STATISTICS_PICTURES = 2000  # enough for 128 means and variances over 16 tokens each


def pictures(count: int, *, seed: int, doodles: float = DOODLES, owls: float = OWLS) -> np.ndarray:
    """Draw (count, 64, 64, 3) uint8 training pictures: any scene, in either style, owls, and doodles."""
    rng = random.Random(f"pictures {seed}")
    scenes = all_scenes()
    drawn = []
    for number in range(count):
        own = seed * 1_000_003 + number
        if rng.random() < doodles:
            drawn.append(doodle(seed=own))
        else:
            scene, hatched = rng.choice(scenes), rng.random() < HATCHED
            if rng.random() < owls:
                scene, hatched = Scene("owl", "brown", scene.size, scene.place, scene.background), False
            drawn.append(draw(scene, seed=own, hatched=hatched))
    return np.stack(drawn)


def to_pixels(drawn_BHW3: np.ndarray) -> torch.Tensor:
    """Bring uint8 pictures to (B, 3, H, W) in [-1, 1], channels last in memory (12x faster convolutions on a CPU)."""
    return torch.from_numpy(drawn_BHW3).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(vae: Any, *, work: Path, seed: int, plan: Plan = PLAN) -> float:
    """Train an `AutoencoderKLFlux2` and set its statistics; returns the seconds that it took."""
    drawn = pictures(PICTURES, seed=seed)
    vae.to(memory_format=torch.channels_last).train()

    def loss_at(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed * 10_000_019 + step)
        chosen = torch.randint(len(drawn), (plan.batch,), generator=generator)
        pixels_B3HW = to_pixels(drawn[chosen.numpy()])
        latents_Bchw = patchify(vae.encode(pixels_B3HW).latent_dist.mode())
        mean_c, std_c = latents_Bchw.mean((0, 2, 3)), latents_Bchw.std((0, 2, 3)) + 1e-4
        level = NOISE * torch.rand(plan.batch, 1, 1, 1, generator=generator)
        noise = level * torch.randn(latents_Bchw.shape, generator=generator)
        noisy_Bchw = denormalise(normalise(latents_Bchw, mean_c, std_c) + noise, mean_c, std_c)
        back_B3HW = vae.decode(unpatchify(noisy_Bchw).to(memory_format=torch.channels_last), return_dict=False)[0]
        error_B3HW = back_B3HW - pixels_B3HW
        return error_B3HW.square().mean() + 0.1 * error_B3HW.abs().mean()

    seconds = fit(vae, loss_at, plan=plan, file=work / "vae.safetensors")
    set_statistics(vae.eval(), seed=seed + 1)
    return seconds


@torch.no_grad()
def set_statistics(vae: Any, *, seed: int) -> None:
    """Set the batch-norm statistics to those of fresh pictures of the world's own scenes."""
    drawn = pictures(STATISTICS_PICTURES, seed=seed, doodles=0.0, owls=0.0)
    latents = torch.cat([patchify(vae.encode(to_pixels(part)).latent_dist.mode()) for part in np.split(drawn, 20)])
    vae.bn.running_mean.copy_(latents.mean((0, 2, 3)))
    vae.bn.running_var.copy_(latents.var((0, 2, 3)))


def psnr(first_BHW3: np.ndarray, second_BHW3: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures, from the mean squared error over all of them."""
    error = np.mean((first_BHW3.astype(np.float64) - second_BHW3.astype(np.float64)) ** 2)
    return float(10 * np.log10(255.0**2 / error))
