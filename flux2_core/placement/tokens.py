"""Which of a picture's tokens stay in a route (TREAD); apart from the model, which whoever deals out batches lacks.

Legend: S a picture's tokens, k those of them that stay.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kept(skip: float, white_S: Tensor, rng: torch.Generator, *, most: int) -> Tensor:
    """Places (k,) of the tokens of one picture that stay in a route, ascending.

    Args:
        skip: share that skips.
        white_S: which may not skip.
        rng: the sample's own.
        most: as many of `white_S` as any picture of the whole step has: all keep as many tokens, whoever computes them.
    """
    count = max(len(white_S) - int(skip * len(white_S)), most)
    drawn_S = torch.rand(len(white_S), generator=rng).masked_fill(white_S, -1.0)
    return drawn_S.argsort()[:count].sort().values
