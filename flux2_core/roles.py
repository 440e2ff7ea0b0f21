"""Text roles: which texts a configuration needs beside captions, and which of them a sample has.

A role's text is planned for every sample that can have it, and encoded only where the configuration uses it; texts are
rows of the one text table, so each is encoded once, whoever needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from flux2_core import captions
from flux2_core.config import Config, Data

TRIGGER_ONLY, CLASS_ONLY, DOP = "trigger_only", "class_only", "dop"  # of a sample
NULL_TEXT = ""


def of_sample(data: Data, texts: Sequence[str]) -> list[tuple[str, str]]:
    """(role, text) of a sample with these resolved captions; `dop` once per caption, in their order."""
    if data.regularisation:
        return []
    found = [(TRIGGER_ONLY, data.trigger)] if data.trigger else []
    if data.class_name:
        found.append((CLASS_ONLY, data.class_name))
    if data.trigger and data.class_name:
        found += [(DOP, captions.exchange(text, data.trigger, data.class_name)) for text in texts]
    return found


def needed(config: Config) -> frozenset[str]:
    """Roles of samples that training draws on."""
    train = config.train
    roles = {TRIGGER_ONLY} if train.trigger_dropout else set()
    if train.preservation == "dop":
        roles |= {DOP, CLASS_ONLY}
    return frozenset(roles)


def named(parts: Sequence[Mapping[str, str]], wanted: frozenset[str]) -> Iterator[tuple[str, str]]:
    """(name, key) of a sample's roles among `wanted`; the second text of a role is `dop1`, and so on."""
    seen = Counter[str]()
    for part in parts:
        if (role := part["role"]) in wanted:
            yield f"{role}{seen[role] or ''}", part["key"]
            seen[role] += 1
