"""Texts: which ones a sample can have, in which roles, and which of them a configuration needs.

A role's text is planned for every sample that can have it, and encoded only where the configuration uses it; texts are
rows of the one text table, so each is encoded once, whoever needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from flux2_core.config.dataset import Data
from flux2_core.config.sections import Config
from flux2_core.data import needs, words
from flux2_core.data.needs import CLASS_ONLY, DOP, TRIGGER_ONLY
from flux2_core.errors import DataError, UsageError


def of_sample(data: Data, texts: Sequence[str]) -> list[tuple[str, str]]:
    """(role, text) of a sample with these resolved captions; `dop` once per caption, in their order."""
    if data.regularisation:
        return []
    found = [(TRIGGER_ONLY, data.trigger)] if data.trigger else []
    if data.class_name:
        found.append((CLASS_ONLY, data.class_name))
    if data.trigger and data.class_name:
        found += [(DOP, words.exchange(text, data.trigger, data.class_name)) for text in texts]
    return found


def named(parts: Sequence[Mapping[str, str]], wanted: frozenset[str]) -> Iterator[tuple[str, str]]:
    """(name, key) of a sample's roles among `wanted`; the second text of a role is `dop1`, and so on."""
    seen = Counter[str]()
    for part in parts:
        if (role := part["role"]) in wanted:
            yield f"{role}{seen[role] or ''}", part["key"]
            seen[role] += 1


def prompts(config: Config) -> list[str]:
    """The preview prompts with their trigger in place.

    Raises:
        DataError: a prompt has a `[trigger]` and none is set.
        UsageError: it has a misspelt one.
    """
    resolved, plain = [], len(config.validation.prompts)
    for place, prompt in enumerate(config.validation.drawn):
        try:
            resolved.append(words.resolve_prompt(prompt.text, config))
        except (DataError, UsageError) as error:
            key = f"prompts.{place}" if place < plain else f"prompt.{place - plain}.text"
            raise type(error)(f"validate.{key}: {error}") from None
    return resolved


def texts(config: Config, samples: pa.Table) -> list[str]:
    """Every text that must have a row, each once: captions, the roles in use, and those of no sample."""
    own = [pc.list_flatten(samples.column("captions")), in_roles(samples, "text", needs.of(config).roles)]
    found = (text for column in own for text in column.unique().to_pylist())
    return list(dict.fromkeys([*common_texts(config).values(), *found]))


def in_roles(samples: pa.Table, field: str, roles: frozenset[str]) -> pa.ChunkedArray:
    """One field (`text` or `key`) of all samples' texts in these roles."""
    parts = pc.list_flatten(samples.column("roles"))
    used = pc.is_in(pc.struct_field(parts, "role"), value_set=pa.array(sorted(roles), pa.string()))
    return pc.struct_field(parts, field).filter(used)


def common_texts(config: Config) -> dict[str, str]:
    """Texts by role that belong to no sample: `null`, `preview0`, ..., `negative`."""
    named = {**needs.of(config).texts, **{f"preview{n}": prompt for n, prompt in enumerate(prompts(config))}}
    return named if config.validation.negative is None else named | {"negative": config.validation.negative}
