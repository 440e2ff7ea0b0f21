"""Latents against diffusers' own encode path."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2Pipeline

from flux2_core.config import Model
from flux2_core.latents import from_tokens, image_ids, patchify, text_ids, to_tokens, unpatchify
from flux2_core.model_folder import resolve
from flux2_core.vae import Vae


def test_latents_equal_the_pipelines(tiny_model: Path) -> None:
    """Our latents equal the mode of diffusers' VAE, patchified and normalised by the pipeline's own functions."""
    pixels = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 3, 64, 96)).astype(np.float32))
    vae = AutoencoderKLFlux2.from_pretrained(tiny_model / "vae")
    with torch.no_grad():
        latents = Flux2Pipeline._patchify_latents(vae.encode(pixels).latent_dist.mode())
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    ours = Vae(resolve(Model(path=str(tiny_model)), parts=("vae",))).encode(pixels)
    assert ours.shape == (2, 128, 4, 6)
    assert (ours - (latents - mean) / std).abs().max() <= 2e-6
    assert std.std() > 0.01, "the statistics must not be trivial, or this test shows nothing"


def test_decode_inverts_the_normalisation(tiny_model: Path) -> None:
    """Decoding our latents equals decoding the VAE's own, so that previews show what was cached."""
    vae = Vae(resolve(Model(path=str(tiny_model)), parts=("vae",)))
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        own = vae.vae.decode(vae.vae.encode(pixels).latent_dist.mode()).sample
    expected = ((own / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    assert (vae.decode(vae.encode(pixels)).int() - expected.int()).abs().max() <= 1


def test_patchify_order_and_inverse() -> None:
    """Channels come in the order (channel, row, column), as in diffusers, and unpatchify undoes it."""
    latents = torch.randn(2, 32, 6, 4)
    assert torch.equal(patchify(latents), Flux2Pipeline._patchify_latents(latents))
    assert torch.equal(unpatchify(patchify(latents)), latents)
    assert torch.equal(from_tokens(to_tokens(latents), height=6, width=4), latents)


def test_position_ids_equal_the_pipelines() -> None:
    """Image and text ids equal diffusers' own."""
    latents = torch.zeros(1, 128, 3, 5)
    assert torch.equal(image_ids(3, 5), Flux2Pipeline._prepare_latent_ids(latents)[0])
    assert torch.equal(text_ids(7), Flux2Pipeline._prepare_text_ids(torch.zeros(1, 7, 4))[0])
    reference = Flux2Pipeline._prepare_image_ids([torch.zeros(1, 128, 3, 5), torch.zeros(1, 128, 3, 5)])[0]
    assert torch.equal(torch.cat([image_ids(3, 5, time=10), image_ids(3, 5, time=20)]), reference)
