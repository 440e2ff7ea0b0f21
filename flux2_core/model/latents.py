"""The latent geometry of FLUX.2 as pure functions: patchify, normalise, and position ids.

Legend: B batch, C = 32 VAE channels, c = 128 = C * 2 * 2, h = H/16, w = W/16 in tokens, S = h * w.
Reference: diffusers `Flux2Pipeline._patchify_latents`, `_prepare_latent_ids`, `_prepare_text_ids`.
"""

from __future__ import annotations

import functools

import torch

CHANNELS = 128  # of a token: the VAE's 32 times a patch of 2 x 2
PATCH = 2
PIXELS_PER_TOKEN = 16
REFERENCE_TIME = 10  # of the first reference picture's position ids; the target's is 0


def to_model(pixels_BHW3: torch.Tensor) -> torch.Tensor:
    """8-bit RGB to fp32 (B, 3, H, W) in [-1, 1], in torchvision's order of operations, bit-equal to it.

    The divisors are tensors: a GPU would multiply by the rounded reciprocal of a number.
    """
    unit_B3HW = pixels_BHW3.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    most, half = (torch.tensor(value, device=unit_B3HW.device) for value in (255.0, 0.5))
    return unit_B3HW.div_(most).sub_(half).div_(half)


def patchify(latents_BCHW: torch.Tensor) -> torch.Tensor:
    """(B, C, H/8, W/8) -> (B, 4C, H/16, W/16), channels in the order (C, row, column)."""
    b, c, height, width = latents_BCHW.shape
    split = latents_BCHW.view(b, c, height // PATCH, PATCH, width // PATCH, PATCH)
    return split.permute(0, 1, 3, 5, 2, 4).reshape(b, c * PATCH * PATCH, height // PATCH, width // PATCH)


def unpatchify(latents_Bchw: torch.Tensor) -> torch.Tensor:
    """Inverse of `patchify`."""
    b, c, height, width = latents_Bchw.shape
    split = latents_Bchw.reshape(b, c // (PATCH * PATCH), PATCH, PATCH, height, width)
    return split.permute(0, 1, 4, 2, 5, 3).reshape(b, c // (PATCH * PATCH), height * PATCH, width * PATCH)


def normalise(latents_Bchw: torch.Tensor, mean_c: torch.Tensor, std_c: torch.Tensor) -> torch.Tensor:
    """Bring patchified latents to zero mean and unit variance per channel, by the VAE's running statistics."""
    return (latents_Bchw - mean_c.view(1, -1, 1, 1)) / std_c.view(1, -1, 1, 1)


def denormalise(latents_Bchw: torch.Tensor, mean_c: torch.Tensor, std_c: torch.Tensor) -> torch.Tensor:
    """Inverse of `normalise`."""
    return latents_Bchw * std_c.view(1, -1, 1, 1) + mean_c.view(1, -1, 1, 1)


def to_tokens(latents_Bchw: torch.Tensor) -> torch.Tensor:
    """(B, c, h, w) -> (B, S, c), row by row."""
    return latents_Bchw.flatten(2).transpose(1, 2)


def from_tokens(tokens_BSc: torch.Tensor, *, height: int, width: int) -> torch.Tensor:
    """(B, S, c) -> (B, c, h, w)."""
    return tokens_BSc.transpose(1, 2).unflatten(2, (height, width))


def image_ids(height: int, width: int, *, time: int = 0) -> torch.Tensor:
    """Position ids (S, 4) int64 of an image of h x w tokens: (time, row, column, 0)."""
    return torch.cartesian_prod(torch.tensor([time]), torch.arange(height), torch.arange(width), torch.tensor([0]))


def reference_ids(height: int, width: int, index: int) -> torch.Tensor:
    """Position ids (S, 4) of the reference picture at place `index` (from 0): time 10, 20, 30, ..."""
    return image_ids(height, width, time=REFERENCE_TIME * (index + 1))


def mask_from_bytes(payload: bytes | memoryview, *, height: int, width: int) -> torch.Tensor:
    """A mask row's payload as fp32 (h, w): the share (0..1) of each token's loss that counts."""
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(height, width).float() / 255


def text_ids(length: int) -> torch.Tensor:
    """Position ids (L, 4) int64 of a prompt: (0, 0, 0, position)."""
    ids = torch.zeros(length, 4, dtype=torch.int64)
    ids[:, 3] = torch.arange(length)
    return ids


@functools.lru_cache(maxsize=64)  # sizes come back in every step; made on the CPU, they are a copy to the card each
def position_ids(device: torch.device, rows: int, *sizes: tuple[int, int]) -> dict[str, torch.Tensor]:
    """`img_ids` of an image and its references of (h, w) tokens, `txt_ids` of a prompt; shared, so only to be read."""
    ids = [image_ids(*sizes[0]), *(reference_ids(*size, place) for place, size in enumerate(sizes[1:]))]
    return {"img_ids": torch.cat(ids).to(device), "txt_ids": text_ids(rows).to(device)}
