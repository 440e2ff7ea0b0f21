"""Sound tensors: what an encoder made is judged before its row is committed, so that no bad row is ever cached.

Legend: c = 128 channels of a latent token, h and w in tokens.
"""

from __future__ import annotations

import torch

from flux2_core.errors import DataError
from flux2_core.model.latents import CHANNELS


def check_latent(latent_chw: torch.Tensor, *, height: int, width: int, dtype: torch.dtype) -> None:
    """Judge one latent as it would be stored.

    Args:
        latent_chw: One picture's latent.
        height: Tokens that it must have.
        width: Tokens that it must have.
        dtype: Precision that the table holds.

    Raises:
        DataError: the reason, without the picture's name.
    """
    wanted = (CHANNELS, height, width)
    if tuple(latent_chw.shape) != wanted:
        raise DataError(f"made a latent of shape {tuple(latent_chw.shape)}, {wanted} is right: check model.path")
    check_values(latent_chw, dtype=dtype, of="latents")


def check_rows(rows_ND: torch.Tensor, *, count: int, width: int, dtype: torch.dtype) -> None:
    """Judge one prompt's rows before they are stored.

    Args:
        rows_ND: Rows of one text, or the pad row.
        count: Rows that it must have.
        width: Values that a row must have.
        dtype: Precision that the table holds (before `text.int8_rows`).

    Raises:
        DataError: the reason, without the text.
    """
    if tuple(rows_ND.shape) != (count, width):
        raise DataError(f"made rows of shape {tuple(rows_ND.shape)}, {(count, width)} is right: check model.path")
    check_values(rows_ND, dtype=dtype, of="text")
    if not rows_ND.any(dim=1).all():
        raise DataError("made a row of nothing but zeros: check the files at model.path")


def check_values(tensor: torch.Tensor, *, dtype: torch.dtype, of: str) -> None:
    """Judge the numbers of a tensor that is about to be stored.

    Args:
        tensor: Values in their stored precision.
        dtype: Precision that the table holds.
        of: Section of the configuration that sets the precision, for the message.

    Raises:
        DataError: another precision, NaN, infinity, or nothing but zeros.
    """
    if tensor.dtype != dtype:
        raise DataError(f"made {tensor.dtype} where the table holds {dtype}: cache again from the start")
    if tensor.isnan().any():
        raise DataError(f'made NaN (not a number): check the files at model.path, or use {of}.dtype="fp32"')
    if not tensor.isfinite().all():
        raise DataError(f'made infinity, over the range of {dtype}: use {of}.dtype="fp32"')
    if not tensor.any():
        raise DataError("made nothing but zeros: check the files at model.path")
