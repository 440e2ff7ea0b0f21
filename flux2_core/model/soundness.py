"""Sound tensors: what an encoder made is judged before its row is committed, so that no bad row is ever cached.

Legend: c = 128 channels of a latent token, h and w in tokens; N rows of a text, D their width.
"""

from __future__ import annotations

import torch

from flux2_core.errors import DataError
from flux2_core.model.latents import CHANNELS


def check_latent(latent_chw: torch.Tensor, *, height: int, width: int, dtype: torch.dtype) -> None:
    """Judge one picture's latent, of so many tokens each way, as it would be stored.

    Raises:
        DataError: the reason, without the picture's name.
    """
    _check(latent_chw, (CHANNELS, height, width), dtype, of="latents", what="a latent")


def check_rows(rows_ND: torch.Tensor, *, count: int, width: int, dtype: torch.dtype) -> None:
    """Judge the rows of one text, or the pad row, before they are stored (and before `text.int8_rows` rounds them).

    Raises:
        DataError: the reason, without the text.
    """
    _check(rows_ND, (count, width), dtype, of="text", what="rows")
    if not rows_ND.any(dim=1).all():
        raise DataError("made a row of nothing but zeros: check the files at model.path")


def _check(tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, of: str, what: str) -> None:
    """`of`: the section of the configuration that sets the precision."""
    if tuple(tensor.shape) != shape:
        raise DataError(f"made {what} of shape {tuple(tensor.shape)}, {shape} is right: check model.path")
    if tensor.dtype != dtype:
        raise DataError(f"made {tensor.dtype} where the table holds {dtype}: cache again from the start")
    if tensor.isnan().any():
        raise DataError(f'made NaN (not a number): check the files at model.path, or use {of}.dtype="fp32"')
    if not tensor.isfinite().all():
        raise DataError(f'made infinity, over the range of {dtype}: use {of}.dtype="fp32"')
    if not tensor.any():
        raise DataError("made nothing but zeros: check the files at model.path")
