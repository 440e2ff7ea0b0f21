"""Publishing a cache: the samples table and the index that `cache` writes, and the leases that keep what they name."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from flux2_core.cache import sealed
from flux2_core.cache.index import CACHE, TABLES, TEXTS, WRITTEN, Index, index_uri, settings, settings_of, within
from flux2_core.cache.leases import Lease
from flux2_core.config.sections import Config
from flux2_core.data.texts import common_texts
from flux2_core.run.folder import RunFolder
from flux2_core.store import objects, parquet, schemas

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow's stream format

_announced: dict[str, Lease] = {}  # of the `cache` that this process is at


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
    uri, tree = index_uri(config), asdict(index)
    for place in (tree["text"], tree["latents"]):
        place["uri"] = within(config, place["uri"])
    tree["samples"] = within(config, tree["samples"])
    data = sealed.encode(tree | _named(config))
    objects.write(uri, data)
    if not (folder := RunFolder(config)).finished():  # else it names what the LoRA was trained on
        objects.write(str(folder.index), data)
    return uri


def keep(config: Config) -> None:
    """Give a run that only trains its own copy of the index, by which `gc` knows what it needs."""
    own = RunFolder(config).index
    if settings_of(own) != settings(config):
        objects.write(str(own), objects.read(index_uri(config)))


def named_by(config: Config, index: Index) -> dict[str, Any]:
    """What must stay while an index is trained from: the words of a lease."""
    tables = {name: asdict(getattr(index, name)) | {"uri": within(config, getattr(index, name).uri)} for name in TABLES}
    return {"samples": within(config, index.samples), **_named(config), **tables}


def trained_on_other_data(config: Config, samples: str) -> str | None:
    """What to tell about a finished run whose pictures or captions were edited and cached since; None: nothing.

    Args:
        config: of the run.
        samples: name of the samples table that its LoRA was trained on.
    """
    uri = index_uri(config)
    tree = sealed.decode(objects.read(uri)) if objects.exists(uri) else None
    if tree is None or (now := tree["samples"].rsplit("/", 1)[-1]) == samples:
        return None
    lora = RunFolder(config).lora_files[0]
    return (
        f"run {config.run} is finished, and its pictures or captions have changed since: its LoRA was trained on "
        f"{samples}, cached now is {now}. To train on that, from the start: run=NAME; or on from this LoRA: run=NAME "
        f"lora.init={lora}"
    )


def announce(config: Config, samples: pa.Table) -> None:
    """Lease the rows that a `cache` is about to use, before it looks for them, so that a `gc` beside it leaves them."""
    withdraw(config)
    _announced[index_uri(config)] = Lease(
        config, "cache", {"samples": within(config, _samples_uri(config, samples)), **_named(config)}
    )
    write_samples(config, samples)


def withdraw(config: Config) -> None:
    """Give back this process's lease: the index names the rows by now."""
    if lease := _announced.pop(index_uri(config), None):
        lease.release()


def _samples_uri(config: Config, samples: pa.Table) -> str:
    """Named by a hash of the table as an Arrow stream, of which one batch is in memory at a time."""
    content = hashlib.sha256(samples.schema.serialize())
    for batch in samples.to_batches():
        content.update(batch.serialize())
    content.update(END_OF_STREAM)
    return objects.join(config.output.cache, "samples", f"{content.hexdigest()[:32]}.parquet")


def _named(config: Config) -> dict[str, Any]:
    return {TEXTS: list(common_texts(config).values()), WRITTEN: time.time(), CACHE: config.output.cache.rstrip("/")}
