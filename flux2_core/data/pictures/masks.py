"""Masks: which part of a picture is learned, as one byte per token, cut out of the mask as the picture is of its file.

Legend: h and w in tokens of 16 x 16 px.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from flux2_core.config.sections import Latents
from flux2_core.data.pictures import load as pictures_load
from flux2_core.data.pictures.buckets import CELL
from flux2_core.data.pictures.transform import Transform
from flux2_core.errors import DataError

_READING = Latents(decoder="pil", background="#000000")  # what is transparent in a mask is not learned


def load(uri: str, transform: Transform, *, sha256: str | None = None) -> npt.NDArray[np.uint8]:
    """A mask's tokens (h, w): 255 is learned, 0 is not; the mean over each token's pixels, rounded.

    Args:
        uri: A picture of any size; it is scaled to that of the picture that it belongs to.
        transform: That picture's.
        sha256: Hash that the file must still have.

    Raises:
        DataError: no readable picture, changed since it was planned, or nothing is white within the crop; names it.
    """
    grey_HW = np.asarray(
        Image.fromarray(pictures_load.load(uri, transform, latents=_READING, sha256=sha256)).convert("L")
    )
    cells = grey_HW.reshape(transform.bucket_height // CELL, CELL, transform.bucket_width // CELL, CELL)
    sums = cells.sum(axis=(1, 3), dtype=np.uint32)
    tokens_hw = ((sums + CELL * CELL // 2) // (CELL * CELL)).astype(np.uint8)
    if not tokens_hw.any():
        raise DataError(f"{uri}: the mask is black all over the crop: nothing would be learned; use a lighter one")
    return tokens_hw
