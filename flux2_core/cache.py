"""Where a configuration's tables are, and the index that ties them together.

An index is a small JSON object that `cache` writes last: the immutable samples table and the versions and fingerprints
of both tensor tables. It is found by the hash of the sections that decide what is cached, so `train` finds exactly what
`cache` made, without the data folder and without any encoder file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from flux2_core import objects, recipes, tables
from flux2_core.config import Config
from flux2_core.errors import DataError
from flux2_core.fingerprint import digest, first_difference, row_key
from flux2_core.model_folder import ModelFolder
from flux2_core.run_folder import RunFolder

NULL_TEXT = ""
SEAL = "seal"  # of an index: hash of everything else in it


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
    return tree


def text_uri(config: Config, fingerprint: Mapping[str, Any]) -> str:
    """Table of the text rows of one fingerprint."""
    return objects.join(config.output.cache, "text", digest(dict(fingerprint))[:16] + ".lance")


def latents_uri(config: Config, fingerprint: Mapping[str, Any]) -> str:
    """Table of the latent rows of one fingerprint."""
    return objects.join(config.output.cache, "latents", digest(dict(fingerprint))[:16] + ".lance")


def text_key(fingerprint: Mapping[str, Any], text: str) -> str:
    """Key of a text's row."""
    return row_key(fingerprint, text)


def write_samples(config: Config, samples: pa.Table) -> str:
    """Store a samples table under the hash of its content; return its URI."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, samples.schema) as writer:
        writer.write_table(samples)
    name = hashlib.sha256(sink.getvalue()).hexdigest()[:32]
    uri = objects.join(config.output.cache, "samples", f"{name}.parquet")
    if not objects.exists(uri):
        tables.write_parquet(uri, samples, {"contract": str(tables.CONTRACT_VERSION)})
    return uri


def write_index(config: Config, index: Index) -> str:
    """Publish an index; the last thing that `cache` does. Places in it are relative to the cache, which may move.

    The run keeps a copy: two people may share a cache and have different pictures at the same path.
    """
    uri, tree = _index_uri(config), asdict(index)
    root = config.output.cache.rstrip("/") + "/"
    for place in (tree["text"], tree["latents"]):
        place["uri"] = place["uri"].removeprefix(root)
    tree["samples"] = tree["samples"].removeprefix(root)
    data = json.dumps(tree | {SEAL: digest(tree)}, indent=1, sort_keys=True).encode()
    objects.write(uri, data)
    objects.write(str(RunFolder(config).index), data)
    return uri


def read_index(config: Config, model: ModelFolder) -> Index:
    """Find the index of a configuration and check it against the settings.

    Raises:
        DataError: nothing is cached for it; names the setting that differs from the nearest cached one. Or the index
            is damaged, or of another contract version.
    """
    tree = _index(own.read_bytes()) if (own := RunFolder(config).index).is_file() else None
    if tree is None or tree["settings"] != settings(config):
        try:
            tree = _index(objects.read(_index_uri(config)))
        except FileNotFoundError:
            raise DataError(_nearest(config)) from None
    if tree is None:
        raise DataError(f"{_index_uri(config)}: damaged; run `cacheloom cache` again to rewrite it")
    if tree["contract"] != tables.CONTRACT_VERSION:
        raise DataError(
            f"{_index_uri(config)} was written under contract {tree['contract']}, this is contract "
            f"{tables.CONTRACT_VERSION}: run `cacheloom cache` again to rewrite it"
        )
    text, latents = (
        TableRef(**{**tree[name], "uri": objects.join(config.output.cache, tree[name]["uri"])})
        for name in ("text", "latents")
    )
    samples = objects.join(config.output.cache, tree["samples"])
    index = Index(**{**tree, "samples": samples, "text": text, "latents": latents})
    for name, table, wanted in (
        ("text", index.text, recipes.text_settings(model, config)),
        ("latents", index.latents, recipes.latents_settings(config)),
    ):
        found = {key: table.fingerprint.get(key) for key in wanted}
        if difference := first_difference(wanted, found):
            raise DataError(
                f"{table.uri}: its {name} rows were made otherwise ({difference}): run `cacheloom cache` again"
            )
    return index


def prompts(config: Config) -> list[str]:
    """The preview prompts with their trigger in place.

    Raises:
        DataError: a prompt has a `[trigger]` and none is set.
    """
    from flux2_core import captions

    resolved = []
    for place, prompt in enumerate(config.validation.prompts):
        try:
            resolved.append(captions.resolve(prompt, trigger=config.trigger))
        except DataError as error:
            raise DataError(f"validate.prompts.{place}: {error}") from None
    return resolved


def texts(config: Config, samples: pa.Table) -> list[str]:
    """Every text that must have a row, each once: captions, the empty caption, preview prompts."""
    captions_of = (caption for row in samples.column("captions").to_pylist() for caption in row)
    return list(dict.fromkeys([NULL_TEXT, *prompts(config), *captions_of]))


def missing_message(kind: str, uri: str, missing: Sequence[str], total: int) -> str:
    """Why training is refused when rows are not cached."""
    return (
        f"{uri}: {len(missing)} of {total} {kind} rows are missing, the first is for {missing[0]!r}: "
        "run `cacheloom cache` with this configuration"
    )


def _index_uri(config: Config) -> str:
    return objects.join(config.output.cache, "samples", digest(settings(config))[:32] + ".json")


def _index(data: bytes) -> dict[str, Any] | None:
    """An index as it was written, or None where a bit of it has changed since."""
    try:
        tree = json.loads(data)
        seal = tree.pop(SEAL)
    except (ValueError, KeyError, AttributeError):
        return None
    return tree if seal == digest(tree) else None


def _nearest(config: Config) -> str:
    ours, best = settings(config), None
    for uri, _ in objects.listing(objects.join(config.output.cache, "samples")):
        if uri.endswith(".json") and (tree := _index(objects.read(uri))) is not None:
            theirs = tree["settings"]
            differing = [key for key in sorted({*ours, *theirs}) if ours.get(key) != theirs.get(key)]
            if best is None or len(differing) < len(best[0]):
                best = differing, theirs
    nothing = f"{config.output.cache}: nothing is cached for this configuration"
    if best is None:
        return f"{nothing}: run `cacheloom cache` first"
    named = "; ".join(f"{key} is {ours.get(key)!r}, cached with {best[1].get(key)!r}" for key in best[0][:3])
    return f"{nothing} ({named}): run `cacheloom cache` first"
