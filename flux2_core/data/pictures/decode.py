"""Decoding: Pillow's every pixel, or for plain JPEGs libjpeg-turbo's scaled decoding, which skips most of the work."""

from __future__ import annotations

import contextlib

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from flux2_core.config.sections import Latents

Array = npt.NDArray[np.uint8]
_SPACES = {"RGB": "RGB", "L": "GRAY"}  # Pillow's mode -> simplejpeg's name


def pixels(image: Image.Image, data: bytes, *, latents: Latents, height: int, width: int) -> Image.Image:
    """The decoded pixels of an opened picture, as stored (not turned), with its ICC profile.

    With `decoder = "fast"` a JPEG comes in the least of the sizes 1/8, 2/8, ... 8/8 that is at least height x width.
    Whatever that decoder does not take (other formats, CMYK, any damage) goes through Pillow, which judges it.

    Args:
        image: The picture, opened by Pillow.
        data: The bytes of its file.
        latents: Which decoder.
        height: Least height in px, as stored.
        width: Least width in px, as stored.
    """
    return picture(_shrunk(image, data, latents=latents, height=height, width=width), image)


def resized(image: Image.Image, data: bytes, *, latents: Latents, height: int, width: int) -> Array | None:
    """As `pixels`, but scaled to exactly height x width; None for what only Pillow takes (`picture` decodes it).

    Bilinear and antialiased, within one level of Pillow's at a third of its price. Torch adds in whole numbers here:
    the bytes are the same with AVX2, with AVX-512 and without.
    """
    array_HWC = _shrunk(image, data, latents=latents, height=height, width=width)
    if array_HWC is None:
        return None
    import torch  # only where pictures are encoded: `plan` starts without it

    # channels last in a batch of one: torch has vector code for that layout, and copies any other into it
    image_1CHW = torch.from_numpy(array_HWC)[None].permute(0, 3, 1, 2)
    out_1CHW = torch.nn.functional.interpolate(image_1CHW, (height, width), mode="bilinear", antialias=True)
    return out_1CHW[0].permute(1, 2, 0).numpy()


def picture(array_HWC: Array | None, image: Image.Image) -> Image.Image:
    """These pixels of an opened picture, with its ICC profile; without any, those that Pillow decodes."""
    if array_HWC is None:
        image.load()
        return image
    made = Image.fromarray(array_HWC[..., 0] if image.mode == "L" else array_HWC)
    made.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    return made


def _shrunk(image: Image.Image, data: bytes, *, latents: Latents, height: int, width: int) -> Array | None:
    if latents.decoder == "fast" and image.format in ("JPEG", "MPO") and image.mode in _SPACES:
        with contextlib.suppress(ValueError):  # raised for damage; not asking for speed at the price of quality
            return simplejpeg.decode_jpeg(data, _SPACES[image.mode], min_height=height, min_width=width, strict=True)
    return None
