"""Decoding: Pillow's every pixel, or for plain JPEGs libjpeg-turbo's scaled decoding, which skips most of the work."""

from __future__ import annotations

import contextlib

import simplejpeg
from PIL import Image

from flux2_core.config import Latents

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
    if latents.decoder == "fast" and image.format in ("JPEG", "MPO") and image.mode in _SPACES:
        with contextlib.suppress(ValueError):  # raised for damage; not asking for speed at the price of quality
            array = simplejpeg.decode_jpeg(data, _SPACES[image.mode], min_height=height, min_width=width, strict=True)
            shrunk = Image.fromarray(array[..., 0] if image.mode == "L" else array)
            shrunk.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
            return shrunk
    image.load()
    return image
