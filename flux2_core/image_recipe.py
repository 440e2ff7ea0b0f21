"""What pixels are made of besides the file and the transform: the part of a fingerprint that training can recompute.

It stands apart from the code that follows it (`images`, `colour`, `decoding`, `masks`), so that training carries none.
"""

from __future__ import annotations

from importlib.metadata import version

import PIL
from PIL import features

from flux2_core.config import Latents


def recipe(latents: Latents) -> dict[str, str | None]:
    """Everything that the pixels depend on besides the file and the transform; part of the latents' fingerprint."""
    made = {
        "orientation": "EXIF applied",
        "frame": "first",
        "colour": "ICC to sRGB, perceptual; without a profile taken as sRGB",
        "alpha": f"over {latents.background.lower()}, before resizing",
        "sixteen_bit": "grey (x+128)//257, colour high byte",
        "resize": "PIL BILINEAR, antialiased",
        "range": "((x/255)-0.5)/0.5 in fp32",
        "mask": "alpha over black, grey, resized and cropped like the picture, mean of 16x16 px in 8 bits",
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "littlecms2": features.version("littlecms2"),
    }
    if latents.decoder == "fast":
        with_torch = f"then bilinear, antialiased by torch {version('torch').partition('+')[0]}, then colour"
        shrunk = f"undamaged RGB and grey JPEGs at the least n/8 that covers the resized picture, {with_torch}"
        made["decoder"] = f"simplejpeg {version('simplejpeg')}: {shrunk}; others by Pillow"
    return made
