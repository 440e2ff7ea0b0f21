"""What a cache holds: rows, bytes and versions of its tables."""

from __future__ import annotations

import time
from typing import Any

from flux2_core.cache import fingerprints, index
from flux2_core.config.sections import Config
from flux2_core.errors import DataError
from flux2_core.model.folder import ModelFolder
from flux2_core.store import objects
from flux2_core.store.hashing import digest
from flux2_core.store.table import Table


def stat_tables(config: Config, model: ModelFolder) -> dict[str, Any]:
    """Both tensor tables of this configuration and the number of its samples; zeros where nothing is cached.

    `bytes` counts older versions too, which `gc` removes; `age_days` is that of the newest version.
    """
    text, latents = fingerprints.text_fingerprint(model, config), fingerprints.latents_fingerprint(model, config)
    try:
        rows = index.read_index(config, model).rows
    except DataError:  # nothing cached for this configuration; its tables may still hold rows of others
        rows = 0
    return {
        "text": _stat(index.text_uri(config, text), text),
        "latents": _stat(index.latents_uri(config, latents), latents),
        "samples": rows,
    }


def _stat(uri: str, fingerprint: dict[str, Any]) -> dict[str, Any]:
    named = {"uri": uri, "fingerprint": digest(fingerprint), "fields": fingerprint}
    sizes = [size for _, size in objects.listing(uri)]
    if not sizes:
        return named | {"version": 0, "rows": 0, "bytes": 0, "files": 0, "age_days": None, "compaction_due": False}
    table = Table.open(uri)
    return named | {
        "version": table.version,
        "rows": table.rows(),
        "bytes": sum(sizes),
        "files": len(sizes),
        "age_days": (time.time() - table.written_s()) / 86400,
        "compaction_due": table.compaction_due(),
    }
