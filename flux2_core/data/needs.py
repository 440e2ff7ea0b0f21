"""What a method takes from the data: texts and latents that must be cached before it can train.

A method is what a training step minimises. It has two halves under one name: what it needs, here, where `plan`, `cache`
and training all ask for it, and what it computes, in `flux2_core.train.methods`, which nothing before training sees.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from flux2_core.config.sections import Config
from flux2_core.errors import choose

TRIGGER_ONLY, CLASS_ONLY, DOP = "trigger_only", "class_only", "dop"  # roles of a sample's texts
NULL_TEXT = ""


class Latents(NamedTuple):
    """A kind of latents that a sample can have."""

    whose: str
    """Words before the sample's id."""
    parts: Callable[[Mapping[str, Any]], list[Any]]
    """Those parts of a sample's row that have a latent key."""
    keys: Callable[[pa.Table], pa.ChunkedArray]
    """All their keys, of many samples."""


LATENTS = {
    "picture": Latents("", lambda row: [row], lambda samples: samples.column("latent_key")),
    "mask": Latents(
        "the mask of ",
        lambda row: [row["mask"]] if row["mask"] else [],
        lambda samples: pc.struct_field(samples.column("mask"), "latent_key"),
    ),
    "references": Latents(
        "a reference of ",
        lambda row: row["references"],
        lambda samples: pc.struct_field(pc.list_flatten(samples.column("references")), "latent_key"),
    ),
    "rejected": Latents(
        "the rejected picture of ",
        lambda row: [row["rejected"]] if row.get("rejected") else [],  # a column only where there are pairs
        lambda samples: _rejected(samples),
    ),
}
SEEN = frozenset({"picture", "references"})  # by the model


def _rejected(samples: pa.Table) -> pa.ChunkedArray:
    if "rejected" not in samples.column_names:
        return pa.chunked_array([pa.nulls(samples.num_rows, pa.string())])
    return pc.struct_field(samples.column("rejected"), "latent_key")


class Needs(NamedTuple):
    """What must be cached for a method, beside captions."""

    roles: frozenset[str]
    """Of samples' texts."""
    texts: dict[str, str]
    """Texts that belong to no sample, by role."""
    latents: frozenset[str]
    """Of samples: keys of `LATENTS`."""


def _flow(config: Config) -> Needs:
    roles = frozenset({TRIGGER_ONLY} if config.train.trigger_dropout else ())
    return Needs(roles, {"null": NULL_TEXT}, SEEN | {"mask"})


NEEDS: dict[str, Callable[[Config], Needs]] = {
    "flow": _flow,
    "preference": lambda config: _flow(config)._replace(latents=frozenset(LATENTS)),
    "rollout": _flow,
    "slider": lambda config: Needs(frozenset(), config.slider.texts, frozenset()),
    "dop": lambda config: Needs(frozenset({DOP, CLASS_ONLY}), {}, SEEN),
    "blank": lambda config: Needs(frozenset(), {"null": NULL_TEXT}, SEEN),
}


def of(config: Config) -> Needs:
    """What all methods of a configuration need together."""
    each = [choose(NEEDS, name, setting="method")(config) for name in config.methods]
    return Needs(*(reduce(or_, parts) for parts in zip(*each, strict=True)))
