"""Where a configuration's tables are, and the index that ties them together.

An index is a small JSON object that `cache` writes last: the immutable samples table and the versions and fingerprints
of both tensor tables. It is found by the hash of the sections that decide what is cached, so `train` finds exactly what
`cache` made, without the data folder and without any encoder file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from flux2_core.cache import settings as asked
from flux2_core.config.sections import Config
from flux2_core.data.texts import common_texts
from flux2_core.errors import DataError
from flux2_core.model.folder import ModelFolder
from flux2_core.run.folder import RunFolder
from flux2_core.store import objects, parquet, schemas
from flux2_core.store.hashing import digest, first_difference

SEAL = "seal"  # of an index: hash of everything else in it
TEXTS, WRITTEN = "texts", "written"  # for `gc`: texts beside those of the samples, and when, in seconds since 1970
LATER = {"text.tokens": "reference"}  # settings younger than caches, left out where they ask for what was always done
PENDING = ".pending"  # what a `cache` at work is going to need


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
        named = data.model_dump(mode="json", exclude={"check_images"})
        tree |= {f"data.{position}.{key}": value for key, value in named.items()}
    tree |= {f"text.{key}": value for key, value in config.text.model_dump(mode="json").items()}
    tree |= {f"latents.{key}": value for key, value in config.latents.model_dump(mode="json").items()}
    return {key: value for key, value in tree.items() if (key, value) not in LATER.items()}


def text_uri(config: Config, fingerprint: Mapping[str, Any]) -> str:
    """Table of the text rows of one fingerprint."""
    return objects.join(config.output.cache, "text", digest(dict(fingerprint))[:16] + ".lance")


def latents_uri(config: Config, fingerprint: Mapping[str, Any]) -> str:
    """Table of the latent rows of one fingerprint."""
    return objects.join(config.output.cache, "latents", digest(dict(fingerprint))[:16] + ".lance")


def write_samples(config: Config, samples: pa.Table) -> str:
    """Store a samples table under the hash of its content; return its URI."""
    uri = _samples_uri(config, samples)
    if not objects.exists(uri):
        parquet.write_parquet(uri, samples, {"contract": str(schemas.CONTRACT_VERSION)})
    return uri


def write_index(config: Config, index: Index) -> str:
    """Publish an index; the last thing that `cache` does. Places in it are relative to the cache, which may move.

    The run keeps a copy: two people may share a cache and have different pictures at the same path.
    """
    uri, tree = _index_uri(config), asdict(index)
    for place in (tree["text"], tree["latents"]):
        place["uri"] = _within(config, place["uri"])
    tree["samples"] = _within(config, tree["samples"])
    data = encode_index(tree | _named(config))
    objects.write(uri, data)
    objects.write(str(RunFolder(config).index), data)
    return uri


def announce(config: Config, samples: pa.Table) -> None:
    """Name the rows that a `cache` is about to use, before it looks for them, so that a `gc` beside it leaves them."""
    uri = _samples_uri(config, samples)
    tree = {"contract": schemas.CONTRACT_VERSION, "samples": _within(config, uri), **_named(config), **_process()}
    objects.write(_announcement(config), encode_index(tree))
    write_samples(config, samples)


def withdraw(config: Config) -> None:
    """Take back this process's announcement: the index names the rows by now."""
    objects.delete(_announcement(config))


def encode_index(tree: Mapping[str, Any]) -> bytes:
    """Bytes of an index, sealed."""
    return json.dumps({**tree, SEAL: digest(dict(tree))}, indent=1, sort_keys=True).encode()


def decode_index(data: bytes) -> dict[str, Any] | None:
    """An index as it was written, or None where a bit of it has changed since."""
    try:
        tree = json.loads(data)
        seal = tree.pop(SEAL)
    except (ValueError, KeyError, AttributeError):
        return None
    return tree if seal == digest(tree) and encode_index(tree) == data else None


def read_index(config: Config, model: ModelFolder) -> Index:
    """Find the index of a configuration and check it against the settings.

    Raises:
        DataError: nothing is cached for it; names the setting that differs from the nearest cached one. Or the index
            is damaged, or of another contract version.
    """
    tree = decode_index(own.read_bytes()) if (own := RunFolder(config).index).is_file() else None
    if tree is None or tree["settings"] != settings(config):
        try:
            tree = decode_index(objects.read(_index_uri(config)))
        except FileNotFoundError:
            raise DataError(_nearest(config)) from None
    if tree is None:
        raise DataError(f"{_index_uri(config)}: damaged; run `cacheloom cache` again to rewrite it")
    if tree["contract"] != schemas.CONTRACT_VERSION:
        raise DataError(
            f"{_index_uri(config)} was written under contract {tree['contract']}, this is contract "
            f"{schemas.CONTRACT_VERSION}: run `cacheloom cache` again to rewrite it"
        )
    text, latents = (
        TableRef(**{**tree[name], "uri": objects.join(config.output.cache, tree[name]["uri"])})
        for name in ("text", "latents")
    )
    samples = objects.join(config.output.cache, tree["samples"])
    kept = {name: value for name, value in tree.items() if name not in (TEXTS, WRITTEN)}
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


def _index_uri(config: Config) -> str:
    return objects.join(config.output.cache, "samples", digest(settings(config))[:32] + ".json")


def _samples_uri(config: Config, samples: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, samples.schema) as writer:
        writer.write_table(samples)
    name = hashlib.sha256(sink.getvalue()).hexdigest()[:32]
    return objects.join(config.output.cache, "samples", f"{name}.parquet")


def _announcement(config: Config) -> str:
    name = digest([settings(config), _process()])[:32]
    return objects.join(config.output.cache, "samples", name + PENDING)


def _process() -> dict[str, Any]:
    return {"node": platform.node(), "pid": os.getpid()}


def _within(config: Config, uri: str) -> str:
    return uri.removeprefix(config.output.cache.rstrip("/") + "/")


def _named(config: Config) -> dict[str, Any]:
    return {TEXTS: list(common_texts(config).values()), WRITTEN: time.time()}


def _nearest(config: Config) -> str:
    ours, best = settings(config), None
    for uri, _ in objects.listing(objects.join(config.output.cache, "samples")):
        if uri.endswith(".json") and (tree := decode_index(objects.read(uri))) is not None:
            theirs = tree["settings"]
            differing = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
            if best is None or len(differing) < len(best[0]):
                best = differing, theirs
    nothing = f"{config.output.cache}: nothing is cached for this configuration"
    if best is None:
        return f"{nothing}: run `cacheloom cache` first"
    named = "; ".join(f"{key} is {ours.get(key)!r}, cached with {best[1].get(key)!r}" for key in best[0][:3])
    return f"{nothing} ({named}): run `cacheloom cache` first"
