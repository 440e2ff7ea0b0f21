"""Where a configuration's tables are, and the index that ties them together.

An index is a small JSON object that `cache` writes last: the immutable samples table and the versions and fingerprints
of both tensor tables. It is found by the hash of the sections that decide what is cached, so `train` finds exactly what
`cache` made, without the data folder and without any encoder file.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from flux2_core.cache import sealed
from flux2_core.cache import settings as asked
from flux2_core.config.sections import Config
from flux2_core.errors import DataError
from flux2_core.model.folder import ModelFolder
from flux2_core.run.folder import RunFolder
from flux2_core.store import objects, schemas
from flux2_core.store.hashing import differing, digest, first_difference

# Of an index, for `gc`: texts beside those of the samples, when it was written (seconds since 1970), of which cache
TEXTS, WRITTEN, CACHE = "texts", "written", "cache"
TABLES = ("text", "latents")
COMPARED = 200  # indexes; each is a request of 30 ms on object storage
# Settings younger than caches, left out where they ask for what was always done
LATER = {"text.tokens": "reference", "latents.precision": "fp32"}
# likewise, where they are empty
LATER_OF_DATA = ("caption_edits", "skip_captions", "preferred", "rejected", "reference_size")


@dataclass(frozen=True)
class TableRef:
    """A tensor table at one version."""

    uri: str
    version: int
    fingerprint: dict[str, Any]


@dataclass(frozen=True)
class Index:
    """What one configuration's cache consists of."""

    contract: int
    samples: str
    rows: int
    text: TableRef
    latents: TableRef
    settings: dict[str, Any]


def settings(config: Config) -> dict[str, Any]:
    """The settings that decide what is cached, flat and dotted; validation prompts are looked up by their own keys."""
    tree: dict[str, Any] = {
        "model.path": config.model.path,
        "model.revision": config.model.revision,
        "validate.held_out": config.validation.held_out,
    }
    for position, data in enumerate(config.data):
        named = data.model_dump(mode="json", exclude={"check_images", "drop_references", "noise", "steps"})
        named["regularisation"] = bool(data.regularisation)  # a prior reads the same rows
        tree |= {f"data.{position}.{key}": value for key, value in named.items() if value or key not in LATER_OF_DATA}
    shown = {f"validate.prompt.{n}.references": list(one.references) for n, one in enumerate(config.validation.prompt)}
    if any(shown.values()):  # what previews show the model is cached for its size
        tree |= {key: value for key, value in shown.items() if value} | {"validate.size": config.validation.size}
    tree |= {f"text.{key}": value for key, value in config.text.model_dump(mode="json").items()}
    tree |= {f"latents.{key}": value for key, value in config.latents.model_dump(mode="json").items()}
    tree |= {f"slider.{key}": value for key, value in config.slider.model_dump(mode="json").items() if value}
    return {key: value for key, value in tree.items() if (key, value) not in LATER.items()}


def text_uri(config: Config, fingerprint: Mapping[str, Any]) -> str:
    """Table of the text rows of one fingerprint."""
    return objects.join(config.output.cache, "text", digest(dict(fingerprint))[:16] + ".lance")


def latents_uri(config: Config, fingerprint: Mapping[str, Any]) -> str:
    """Table of the latent rows of one fingerprint."""
    return objects.join(config.output.cache, "latents", digest(dict(fingerprint))[:16] + ".lance")


def read_index(config: Config, model: ModelFolder) -> Index:
    """Find the index of a configuration and check it against the settings.

    Raises:
        DataError: nothing is cached for it; names the setting that differs from the nearest cached one. Or the index
            is damaged, or of another contract version.
    """
    own = RunFolder(config).index
    tree = sealed.decode(own.read_bytes()) if settings_of(own) == settings(config) else None
    if tree is None:
        try:
            tree = sealed.decode(objects.read(index_uri(config)))
        except FileNotFoundError:
            raise DataError(_nothing(config)) from None
    if tree is None:
        raise DataError(f"{index_uri(config)}: damaged; run `cacheloom cache` again to rewrite it")
    if tree["contract"] != schemas.CONTRACT_VERSION:
        raise DataError(
            f"{index_uri(config)} was written under contract {tree['contract']}, this is contract "
            f"{schemas.CONTRACT_VERSION}: run `cacheloom cache` again to rewrite it"
        )
    text, latents = (
        TableRef(**{**tree[name], "uri": objects.join(config.output.cache, tree[name]["uri"])}) for name in TABLES
    )
    samples = objects.join(config.output.cache, tree["samples"])
    kept = {name: value for name, value in tree.items() if name not in (TEXTS, WRITTEN, CACHE)}
    index = Index(**{**kept, "samples": samples, "text": text, "latents": latents})
    for name, table, wanted in (
        ("text", index.text, asked.text_settings(model, config)),
        ("latents", index.latents, asked.latents_settings(config)),
    ):
        found = {key: table.fingerprint.get(key) for key in wanted}
        if difference := first_difference(wanted, found):
            raise DataError(
                f"{table.uri}: its {name} rows were made otherwise ({difference}, as {platform.node()} has the model): "
                "run `cacheloom cache` again"
            )
    return index


def missing_message(kind: str, uri: str, missing: Sequence[str], total: int) -> str:
    """Why training is refused when rows are not cached."""
    return (
        f"{uri}: {len(missing)} of {total} {kind} rows are missing, the first is for {missing[0]!r}: "
        "run `cacheloom cache` with this configuration"
    )


def index_uri(config: Config) -> str:
    """Where the index of a configuration is."""
    return objects.join(config.output.cache, "samples", digest(settings(config))[:32] + ".json")


def settings_of(index: Path) -> dict[str, Any] | None:
    """The settings in a run's own index; None where there is none, or a damaged one."""
    tree = sealed.decode(index.read_bytes()) if index.is_file() else None
    return tree and tree["settings"]


def within(config: Config, uri: str) -> str:
    """A place in the cache, relative to it."""
    return uri.removeprefix(config.output.cache.rstrip("/") + "/")


def nearest(config: Config) -> list[tuple[list[str], dict[str, Any]]]:
    """Indexes of a cache as they are stored, with the settings in which each differs; the nearest first, the newest."""
    ours = settings(config)
    every = (uri for uri, _ in objects.listing(objects.join(config.output.cache, "samples")) if uri.endswith(".json"))
    trees = (sealed.decode(objects.read(uri)) for uri in islice(every, COMPARED))
    found = [(sorted(differing(ours, tree["settings"])), tree) for tree in trees if tree is not None]
    return sorted(found, key=lambda each: (len(each[0]), -each[1].get(WRITTEN, 0)))


def _nothing(config: Config) -> str:
    nothing, ours = f"{config.output.cache}: nothing is cached for this configuration", settings(config)
    if not (known := nearest(config)):
        return f"{nothing}: run `cacheloom cache` first"
    keys, theirs = known[0][0], known[0][1]["settings"]
    named = "; ".join(f"{key} is {ours.get(key)!r}, cached with {theirs.get(key)!r}" for key in keys[:3])
    return f"{nothing} ({named}): run `cacheloom cache` first"
