"""What a method takes from the data: texts and latents that must be cached before it can train.

A method is what a training step minimises. It has two halves under one name: what it needs, here, where `plan`, `cache`
and training all ask for it, and what it computes, in `flux2_core.train.methods`, which nothing before training sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flux2_core.config.sections import Config
from flux2_core.errors import choose

TRIGGER_ONLY, CLASS_ONLY, DOP = "trigger_only", "class_only", "dop"  # roles of a sample's texts
NULL_TEXT = ""

# latents of a sample: words before its id, and those parts of its row that have a latent key
LATENTS: dict[str, tuple[str, Callable[[Mapping[str, Any]], list[Any]]]] = {
    "picture": ("", lambda row: [row]),
    "mask": ("the mask of ", lambda row: [row["mask"]] if row["mask"] else []),
    "references": ("a reference of ", lambda row: row["references"]),
}


@dataclass(frozen=True)
class Needs:
    """What must be cached beside captions."""

    roles: frozenset[str] = frozenset()
    """Of samples' texts."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Texts that belong to no sample, by role."""
    latents: frozenset[str] = frozenset()
    """Of samples: keys of `LATENTS`."""


def _flow(config: Config) -> Needs:
    roles = {TRIGGER_ONLY} if config.train.trigger_dropout else set[str]()
    return Needs(frozenset(roles), {"null": NULL_TEXT}, frozenset(LATENTS))


NEEDS: dict[str, Callable[[Config], Needs]] = {
    "flow": _flow,
    "dop": lambda _: Needs(roles=frozenset({DOP, CLASS_ONLY}), latents=frozenset({"picture", "references"})),
    "blank": lambda _: Needs(texts={"null": NULL_TEXT}, latents=frozenset({"picture", "references"})),
}


def of(config: Config) -> Needs:
    """What all methods of a configuration need together."""
    each = [choose(NEEDS, name, setting="method")(config) for name in config.methods]
    return Needs(
        roles=frozenset().union(*(needs.roles for needs in each)),
        texts={role: text for needs in each for role, text in needs.texts.items()},
        latents=frozenset().union(*(needs.latents for needs in each)),
    )
