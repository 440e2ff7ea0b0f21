"""Looking into the cache: what training sees of one sample, whether rows are whole, what the tables hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flux2_core import cache, objects, recipes, seals, tables
from flux2_core.config import Config
from flux2_core.errors import DataError
from flux2_core.fingerprint import digest
from flux2_core.latents import image_ids, text_ids
from flux2_core.model_folder import ModelFolder
from flux2_core.prompt_rows import PAD_KEY
from flux2_core.run_folder import RunFolder
from flux2_core.store import Table
from flux2_core.store_reader import Reader
from flux2_core.training_data import TrainingData

READ_AT_ONCE = 16  # a dev caption of raw rows is up to 16 MB


def tensors_of(config: Config, model: ModelFolder, sample_id: str) -> dict[str, torch.Tensor]:
    """The tensors that training sees for a sample: `ID`, or `ID#n` for variant n.

    Returns:
        `latents` (128, H/16, W/16) in fp32, `prompt_embeds` (L, D) of the first caption, `prompt_embeds.caption1`, ...
        of further ones, `prompt_embeds.null`, `prompt_embeds.preview0`, ..., `img_ids` (S, 4), `txt_ids` (L, 4).

    Raises:
        DataError: there is no such sample; says where it is, or which there are.
    """
    data = TrainingData(config, model)
    row = _find(config, data, sample_id)
    latents = data.latent_rows([row])[0]
    keys = {"prompt_embeds": row["text_keys"][0], "prompt_embeds.null": data.key(cache.NULL_TEXT)}
    keys |= {f"prompt_embeds.caption{n}": key for n, key in enumerate(row["text_keys"]) if n}
    keys |= {f"prompt_embeds.preview{n}": data.key(prompt) for n, prompt in enumerate(data.prompts)}
    prompts = data.prompt_rows(list(keys.values()))
    return {
        "latents": latents,
        **{name: rows_LD.clone() for name, rows_LD in zip(keys, prompts, strict=True)},
        "img_ids": image_ids(latents.shape[1], latents.shape[2]),
        "txt_ids": text_ids(prompts.shape[1]),
    }


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors to a safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
    temporary.replace(path)


def verify_rows(config: Config, model: ModelFolder) -> dict[str, Any]:
    """Read every row that this configuration needs; list what is corrupt and what is missing."""
    index = cache.read_index(config, model)
    samples = tables.read_parquet(index.samples)
    text = {cache.text_key(index.text.fingerprint, t): t for t in cache.texts(config, samples)}
    if index.text.fingerprint["pads"] != "stored":
        text[PAD_KEY] = "the pad row"
    latents = dict(zip(samples.column("latent_key").to_pylist(), samples.column("id").to_pylist(), strict=True))
    corrupt: list[dict[str, str]] = []
    missing: list[dict[str, str]] = []
    for table, wanted in ((index.text, text), (index.latents, latents)):
        reader = Reader(Table.open(table.uri, version=table.version), wanted)
        gone = set(reader.missing)
        missing += [{"uri": table.uri, "key": key, "of": wanted[key]} for key in reader.missing]
        for key, reason in _corrupt(reader, [key for key in wanted if key not in gone]):
            corrupt.append({"uri": table.uri, "key": key, "of": wanted[key], "reason": reason})
        corrupt += [
            {"uri": table.uri, "key": name, "of": name, "reason": "the file is not what was written"}
            for name in seals.damaged(table.uri)
        ]
    return {"rows": len(text) + len(latents), "corrupt": corrupt, "missing": missing}


def stat_tables(config: Config, model: ModelFolder) -> dict[str, Any]:
    """Both tensor tables of this configuration and the number of its samples; zeros where nothing is cached."""
    text, latents = recipes.text_fingerprint(model, config), recipes.latents_fingerprint(model, config)
    try:
        rows = cache.read_index(config, model).rows
    except DataError:  # nothing cached for this configuration; its tables may still hold rows of others
        rows = 0
    return {
        "text": _stat(cache.text_uri(config, text), text),
        "latents": _stat(cache.latents_uri(config, latents), latents),
        "samples": rows,
    }


def _stat(uri: str, fingerprint: dict[str, Any]) -> dict[str, Any]:
    named = {"uri": uri, "fingerprint": digest(fingerprint), "fields": fingerprint}
    if next(iter(objects.listing(uri)), None) is None:
        return named | {"version": 0, "rows": 0, "bytes": 0}
    table = Table.open(uri)
    return named | {"version": table.version, "rows": table.rows(), "bytes": table.size_bytes()}


def _corrupt(reader: Reader, keys: list[str]) -> Iterator[tuple[str, str]]:
    """Keys of rows that cannot be read, with the reason; rows are read by the batch, singly where one fails."""
    for start in range(0, len(keys), READ_AT_ONCE):
        part = keys[start : start + READ_AT_ONCE]
        try:
            reader.fetch(part)
        except DataError as error:
            if len(part) == 1:
                yield part[0], str(error)
            else:
                for key in part:
                    yield from _corrupt(reader, [key])


def _find(config: Config, data: TrainingData, sample_id: str) -> dict[str, Any]:
    everything = [*data.train, *data.validation]
    name, _, variant = sample_id.rpartition("#")
    wholes = [row for row in everything if row["id"] == sample_id]  # a file's name may have a # in it
    variants = [row for row in everything if row["id"] == name and str(row["variant"]) == variant]
    if found := wholes or variants:
        return found[0]
    left_out = RunFolder(config).quarantine
    if left_out.is_file():
        for row in tables.read_parquet(str(left_out)).to_pylist():
            for path in (Path(row["path"]), Path(row["path"]).with_suffix("")):
                if f"/{path.as_posix()}".endswith(f"/{sample_id}"):
                    raise DataError(f"{sample_id}: quarantined ({row['reason']})")
    known = ", ".join(dict.fromkeys(row["id"] for row in data.train[:5]))
    raise DataError(f"{sample_id}: no such sample; there are {known}, ... (`cacheloom plan --json` lists all)")
