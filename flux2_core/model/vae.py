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
from safetensors.torch import load_file

from flux2_core import accelerator
from flux2_core.errors import DataError, SetupError
from flux2_core.model.folder import ModelFolder
from flux2_core.model.latents import CHANNELS, denormalise, normalise, patchify, to_model, unpatchify
from flux2_core.model.seeded import fixed

APART = 0.02  # bf16's latents from fp32's, over their deviation: decoded, under half of one of 255 levels


class Vae:
    """The VAE on one device, in fp32; on a GPU with channels last, which its convolutions are fastest in.

    Args:
        model: Where it lies.
        device: Where it runs, in torch's words.
        compiler: A backend of `torch.compile` for the encoder (`inductor`): one graph for all buckets.
        precision: What it encodes in, "fp32" or "bf16"; pictures are decoded in fp32.

    Raises:
        DataError: in bf16 it makes other latents.
        SetupError: its files are missing or incomplete, or its statistics cannot be right.
    """

    def __init__(
        self, model: ModelFolder, *, device: str = "cpu", compiler: str | None = None, precision: str = "fp32"
    ) -> None:
        self.device = torch.device(device)
        folder, vae = model.path / "vae", load(model)
        layout = torch.channels_last if accelerator.is_gpu(self.device) else torch.preserve_format
        self.vae = vae.to(self.device, memory_format=layout).eval().requires_grad_(False)
        self.mean_c, self.std_c = _statistics(self.vae, folder)
        if precision == "bf16":
            self._round(folder)
        if compiler:
            self.vae.encoder.compile(backend=compiler, dynamic=True)

    @torch.inference_mode()
    def encode(self, pixels_BHW3: torch.Tensor) -> torch.Tensor:
        """Encode 8-bit pictures, sides multiples of 16, to latents (B, 128, H/16, W/16) in fp32."""
        return _encode(self.vae, pixels_BHW3.to(self.device), self.mean_c, self.std_c)

    def _round(self, folder: Path) -> None:
        """Have the encoder in bf16, once it is seen on this device what that changes of a picture with everything."""
        row, column = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
        edges, fine = (row // 32 + column // 32) % 2 * 128, row * column * 40503 // 77 % 64
        pixels_1HW3 = torch.stack([row // 2 + edges, column // 2 + fine, edges + fine], dim=-1)[None].to(torch.uint8)
        exact = self.encode(pixels_1HW3)
        for part in (self.vae.encoder, self.vae.quant_conv):
            if part is not None:
                part.to(torch.bfloat16)
        off, spread = self.encode(pixels_1HW3) - exact, exact - exact.mean((2, 3), keepdim=True)
        if not (apart := float(off.norm() / spread.norm())) <= APART:
            raise DataError(
                f'{folder}: latents.precision="bf16" moves its latents by {apart:.2%} (at most {off.abs().max():.3f}), '
                f'and {APART:.0%} are allowed: set latents.precision="fp32"'
            )

    @torch.inference_mode()
    def decode(self, latents_Bchw: torch.Tensor) -> torch.Tensor:
        """Decode latents to pictures (B, H, W, 3) uint8."""
        latents = denormalise(latents_Bchw.to(self.device, torch.float32), self.mean_c, self.std_c)
        pixels_B3HW = self.vae.decode(unpatchify(latents), return_dict=False)[0]
        scaled = (pixels_B3HW / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255
        return scaled.round().to(torch.uint8).cpu()


@torch.inference_mode()
def golden_latents() -> list[float]:
    """Some values of the latents that a VAE of fixed small sizes and weights makes of fixed pixels, in fp32 on the CPU.

    A version of torch or diffusers that keeps them computes as before; processors differ by 1e-6 of them.
    """
    sizes = {"block_out_channels": (16, 16, 32, 32), "layers_per_block": 1, "norm_num_groups": 8, "sample_size": 64}
    vae: Any = AutoencoderKLFlux2(**sizes).eval()
    for number, (name, value) in enumerate(vae.state_dict().items()):
        if value.is_floating_point():
            value.copy_(fixed(name.replace("running_var", "weight"), value.shape, number))
    pixels_1HW3 = (torch.arange(48 * 64 * 3) * 40503 // 77 % 256).to(torch.uint8).view(1, 48, 64, 3)
    latents = _encode(vae, pixels_1HW3, *_statistics(vae, Path("the self-test")))
    return [round(value, 6) for value in latents.flatten()[::17].tolist()]


def _encode(vae: Any, pixels_BHW3: torch.Tensor, mean_c: torch.Tensor, std_c: torch.Tensor) -> torch.Tensor:
    pixels_B3HW = to_model(pixels_BHW3).to(vae.encoder.conv_in.weight.dtype)
    return normalise(patchify(vae.encode(pixels_B3HW).latent_dist.mode().float()), mean_c, std_c)


def load(model: ModelFolder) -> Any:
    """diffusers' VAE with the tensors of exactly the files that its fingerprint hashes (`tensor_files`).

    `from_pretrained` chooses among the files of a folder itself, a `.bin` beside a `.safetensors` of another name too.

    Raises:
        SetupError: its files are missing, incomplete, or of another model.
    """
    folder = model.path / "vae"
    files = model.tensor_files("vae")
    vae = AutoencoderKLFlux2.from_config(model.config("vae"))
    tensors = {name: tensor for file in dict.fromkeys(files.values()) for name, tensor in load_file(file).items()}
    own = vae.state_dict()
    if missing := sorted(name for name in own.keys() - tensors.keys() if not name.endswith("num_batches_tracked")):
        raise SetupError(f"{folder}: the files lack {missing[0]} and {len(missing) - 1} more; download them again")
    if unexpected := sorted(tensors.keys() - own.keys()):
        raise SetupError(
            f"{files[unexpected[0]]}: holds {unexpected[0]}, which a VAE of this configuration does not have; the "
            "files and config.json are of different models"
        )
    try:
        vae.load_state_dict(own | tensors)
    except RuntimeError as error:  # shapes
        raise SetupError(f"{folder}: cannot be loaded ({error}); download the model again") from error
    return vae


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
