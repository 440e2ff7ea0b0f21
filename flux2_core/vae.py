"""The VAE: pictures to normalised, patchified latents and back.

Legend: B batch, H and W pixels, c = 128 channels, h = H/16, w = W/16.
The posterior's mode is stored, never a sample; statistics are applied in fp32.
Reference: diffusers `Flux2Pipeline._encode_vae_image` and the end of `__call__`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2

from flux2_core.errors import SetupError
from flux2_core.latents import denormalise, normalise, patchify, unpatchify
from flux2_core.model_folder import ModelFolder


class Vae:
    """The VAE on one device, in fp32."""

    def __init__(self, model: ModelFolder, *, device: str = "cpu") -> None:
        self.device = torch.device(device)
        try:
            vae: Any = AutoencoderKLFlux2.from_pretrained(model.path / "vae", torch_dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise SetupError(f"{model.path / 'vae'}: cannot be loaded ({error})") from error
        self.vae = vae.to(self.device).eval().requires_grad_(False)
        self.mean_c = self.vae.bn.running_mean.float()
        self.std_c = torch.sqrt(self.vae.bn.running_var.float() + self.vae.config.batch_norm_eps)

    @torch.inference_mode()
    def encode(self, pixels_B3HW: torch.Tensor) -> torch.Tensor:
        """Encode pictures in [-1, 1], sides multiples of 16, to latents (B, 128, H/16, W/16) in fp32."""
        posterior = self.vae.encode(pixels_B3HW.to(self.device, torch.float32)).latent_dist
        return normalise(patchify(posterior.mode()), self.mean_c, self.std_c)

    @torch.inference_mode()
    def decode(self, latents_Bchw: torch.Tensor) -> torch.Tensor:
        """Decode latents to pictures (B, H, W, 3) uint8."""
        latents = denormalise(latents_Bchw.to(self.device, torch.float32), self.mean_c, self.std_c)
        pixels_B3HW = self.vae.decode(unpatchify(latents), return_dict=False)[0]
        scaled = (pixels_B3HW / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
        return scaled.round().to(torch.uint8).cpu()
