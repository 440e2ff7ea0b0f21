"""What `plan` says: samples, buckets, token lengths, rows cached and missing, bytes. No model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from flux2_core import cache, objects, recipes, sampleplan
from flux2_core.buckets import Transform
from flux2_core.config import Config
from flux2_core.fingerprint import row_key
from flux2_core.latents import CHANNELS, PIXELS_PER_TOKEN
from flux2_core.model_folder import ModelFolder
from flux2_core.prompt_rows import DTYPES
from flux2_core.sampleplan import SamplePlan
from flux2_core.store import Table
from flux2_core.text_encoder import PromptTokenizer

LISTED = 10


def survey(
    config: Config, model: ModelFolder, *, mapper: Callable[..., Iterator[Any]] = sampleplan.threads
) -> SamplePlan:
    """Scan and inspect the data, and give every row its key; nothing is loaded or written."""
    text, latents = recipes.text_fingerprint(model, config), recipes.latents_fingerprint(model, config)

    def latent_key(sha256: str, t: Transform) -> str:
        sizes = (t.bucket_height, t.bucket_width, t.resize_height, t.resize_width, t.crop_top, t.crop_left)
        return row_key(latents, sha256, *sizes, t.flip)

    return sampleplan.build(
        config, text_key=lambda caption: cache.text_key(text, caption), latent_key=latent_key, mapper=mapper
    )


def describe(config: Config, model: ModelFolder, planned: SamplePlan) -> dict[str, Any]:
    """The plan as one JSON object; `refused` holds the reason where the data would be refused."""
    rows = planned.samples.to_pylist()
    texts = cache.texts(config, planned.samples)
    text_print, latents_print = recipes.text_fingerprint(model, config), recipes.latents_fingerprint(model, config)
    text_keys = {cache.text_key(text_print, text) for text in texts}
    pixels = {row["latent_key"]: row["bucket_height"] * row["bucket_width"] for row in rows}
    latents = {key: count // PIXELS_PER_TOKEN**2 for key, count in pixels.items()}
    tokenizer = PromptTokenizer(model, max_length=config.text.max_length)
    lengths = [tokenizer.count(text) for text in texts]
    kept = [min(length, config.text.max_length) for length in lengths]
    if text_print["pads"] == "stored":
        kept = [config.text.max_length] * len(texts)
    result = {
        "run": config.run,
        "samples": {
            "kept": len({row["id"] for row in rows}),
            "ids": list(dict.fromkeys(row["id"] for row in rows)),
            "validation": len({row["id"] for row in rows if row["split"] == "validation"}),
            "quarantined": [{key: row[key] for key in ("path", "reason")} for row in planned.quarantine.to_pylist()],
        },
        "buckets": _buckets(rows),
        "rows": {
            "text": _counts(cache.text_uri(config, text_print), text_keys),
            "latents": _counts(cache.latents_uri(config, latents_print), set(latents)),
        },
        "bytes": {
            "text": sum(kept) * text_print["width"] * DTYPES[config.text.dtype].itemsize,
            "latents": sum(latents.values()) * CHANNELS * DTYPES[config.latents.dtype].itemsize,
        },
        "tokens": {"longest": max(lengths), "mean": round(sum(lengths) / len(lengths), 1)},
        "warnings": [*planned.warnings, *_truncations(texts, lengths, config.text.max_length)],
    }
    reason = sampleplan.refusal(config, planned)
    return result | {"refused": reason} if reason else result


def _buckets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    counts = Counter((row["bucket_height"], row["bucket_width"]) for row in rows)
    lost = Counter[tuple[int, int]]()
    for row in rows:
        lost[row["bucket_height"], row["bucket_width"]] += row["pixels_lost"]
    return [
        {"height": size[0], "width": size[1], "samples": count, "pixels_lost": round(lost[size] / count, 4)}
        for size, count in sorted(counts.items())
    ]


def _counts(uri: str, keys: set[str]) -> dict[str, int]:
    there = next(iter(objects.listing(uri)), None) is not None
    cached = len(Table.open(uri).present(keys)) if there else 0
    return {"needed": len(keys), "cached": cached, "missing": len(keys) - cached}


def _truncations(texts: list[str], lengths: list[int], limit: int) -> list[str]:
    cut = [(length, text) for text, length in zip(texts, lengths, strict=True) if length > limit]
    named = [f"{length} tokens: {text[:60]!r}..." for length, text in cut[:LISTED]]
    head = f"{len(cut)} captions are longer than text.max_length={limit} tokens and lose their end"
    return [f"{head} ({'; '.join(named)})"] if cut else []
