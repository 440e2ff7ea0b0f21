"""TREAD: some of a picture's tokens skip a route of blocks and come back behind it as they were (arXiv 2501.04765).

The tokens are taken out before a block's forward function is called and put back after it, so outside of what
recomputes, streams or compiles that block: what is computed again has its tokens already. Kept are the prompt,
references, and tokens that a mask leaves at least half white; each kept token brings its own rotary row.

Legend: B samples, S a picture's tokens, k those of them that stay in a route, M = S + tokens of references,
L text rows, N = L + M, w inner width, D width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flux2_core.config.routing import Tread
from flux2_core.model import transformer


class Routing:
    """The routes of one transformer: of a pass in `over` the blocks see less, of any other all."""

    def __init__(self, tread: Tread, built: Any) -> None:
        blocks = transformer.blocks(built)
        self.spans = tread.spans(len(blocks))
        self.joint: list[Tensor] = []  # of each route, of what goes through: places among all N
        self.rows = 0  # of text
        self.whole_BMw = torch.empty(0)
        self.rotary: tuple[Tensor, ...] = ()
        if self.spans:
            transformer.rotate_by_sample()
        for route, (start, end, _) in enumerate(self.spans):
            for place in range(start, end + 1):
                ends = place == start, place == end
                blocks[place].forward = functools.partial(self._block, blocks[place].forward, route, ends)

    @contextmanager
    def over(self, routes_RBk: Sequence[Tensor], *, text: int, image: int, references: int) -> Iterator[None]:
        """Take a pass along the routes: through each go the kept ones of `image` tokens; no routes, and all go."""
        self.rows = text
        for kept_Bk in routes_RBk:
            places = torch.arange(text + image + references, device=kept_Bk.device).expand(len(kept_Bk), -1)
            parts = places[:, :text], text + kept_Bk, places[:, text + image :]
            self.joint.append(torch.cat(parts, dim=1))
        try:
            yield
        finally:
            self.joint, self.whole_BMw, self.rotary = [], torch.empty(0), ()

    def _block(self, forward: Callable[..., Any], route: int, ends: tuple[bool, bool], **given: Any) -> Any:
        """A block of a route; the first one leaves tokens out, the last one brings them back."""
        if not self.joint:
            return forward(**given)
        joint_BN, single = self.joint[route], given["encoder_hidden_states"] is None
        there = joint_BN[:, self.rows :] - self.rows
        if ends[0]:
            text_BLw, self.whole_BMw = self._split(given["hidden_states"], single)
            short = torch.cat([text_BLw, self.whole_BMw.gather(1, _wide(there, self.whole_BMw))], dim=1)
            self.rotary = tuple(rows_ND[joint_BN] for rows_ND in given["image_rotary_emb"])
            given["hidden_states"] = short
        found = forward(**given | {"image_rotary_emb": self.rotary})
        if not ends[1]:
            return found
        text_BLw, short = self._split(found if single else found[1], single)
        image = self.whole_BMw.scatter(1, _wide(there, short), short)
        return torch.cat([text_BLw, image], dim=1) if single else (found[0], image)

    def _split(self, hidden: Tensor, single: bool) -> tuple[Tensor, Tensor]:
        """Text, of which a double block's stream has none, and the image's part."""
        rows = self.rows if single else 0
        return hidden[:, :rows], hidden[:, rows:]


def _wide(places: Tensor, like: Tensor) -> Tensor:
    return places.unsqueeze(-1).expand(-1, -1, like.shape[2])
