"""The VAE: pictures to normalised, patchified latents and back.

Legend: B batch, H and W pixels, c = 128 channels, h = H/16, w = W/16.
The posterior's mode is stored, never a sample; statistics are applied in fp32.
Reference: diffusers `Flux2Pipeline._encode_vae_image` and the end of `__call__`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2

from flux2_core import accelerator
from flux2_core.errors import SetupError
from flux2_core.model.folder import ModelFolder
from flux2_core.model.latents import CHANNELS, denormalise, normalise, patchify, to_model, unpatchify


class Vae:
    """The VAE on one device, in fp32; on a GPU with channels last, which its convolutions are fastest in.

    Args:
        model: Where it lies.
        device: Where it runs, in torch's words.
        compiler: A backend of `torch.compile` for the encoder (`inductor`): one graph for all buckets.

    Raises:
        SetupError: its files are missing or incomplete, or its statistics cannot be right.
    """

    def __init__(self, model: ModelFolder, *, device: str = "cpu", compiler: str | None = None) -> None:
        self.device = torch.device(device)
        folder = model.path / "vae"
        try:
            vae, loading = AutoencoderKLFlux2.from_pretrained(
                folder, torch_dtype=torch.float32, output_loading_info=True
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise SetupError(f"{folder}: cannot be loaded ({error}); download the model again") from error
        if missing := sorted(name for name in loading["missing_keys"] if not name.endswith("num_batches_tracked")):
            raise SetupError(f"{folder}: the files lack {missing[0]} and {len(missing) - 1} more; download them again")
        layout = torch.channels_last if accelerator.is_gpu(self.device) else torch.preserve_format
        self.vae = vae.to(self.device, memory_format=layout).eval().requires_grad_(False)
        if compiler:
            self.vae.encoder.compile(backend=compiler, dynamic=True)
        self.mean_c, self.std_c = _statistics(self.vae, folder)

    @torch.inference_mode()
    def encode(self, pixels_BHW3: torch.Tensor) -> torch.Tensor:
        """Encode 8-bit pictures, sides multiples of 16, to latents (B, 128, H/16, W/16) in fp32."""
        posterior = self.vae.encode(to_model(pixels_BHW3.to(self.device))).latent_dist
        return normalise(patchify(posterior.mode()), self.mean_c, self.std_c)

    @torch.inference_mode()
    def decode(self, latents_Bchw: torch.Tensor) -> torch.Tensor:
        """Decode latents to pictures (B, H, W, 3) uint8."""
        latents = denormalise(latents_Bchw.to(self.device, torch.float32), self.mean_c, self.std_c)
        pixels_B3HW = self.vae.decode(unpatchify(latents), return_dict=False)[0]
        scaled = (pixels_B3HW / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
        return scaled.round().to(torch.uint8).cpu()


def _statistics(vae: Any, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each channel of a token, in fp32."""
    mean_c, var_c = vae.bn.running_mean.float(), vae.bn.running_var.float()
    wrong = None
    if mean_c.shape != (CHANNELS,) or var_c.shape != (CHANNELS,):
        wrong = f"have {len(mean_c)} and {len(var_c)} values instead of {CHANNELS}"
    elif not (mean_c.isfinite().all() and var_c.isfinite().all()):
        wrong = "hold NaN or infinity"
    elif (var_c < 0).any():
        wrong = f"hold a negative variance ({var_c.min():.3g})"
    elif not var_c.any():
        wrong = "hold no variance at all"
    if wrong:
        raise SetupError(f"{folder}: the batch norm's statistics {wrong}; download the model again")
    return mean_c, torch.sqrt(var_c + vae.config.batch_norm_eps)
