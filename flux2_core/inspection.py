"""Looking into the cache: what training sees of one sample, whether rows are whole, what the tables hold."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from flux2_core import cache, objects, recipes, roles, tables
from flux2_core.config import Config
from flux2_core.errors import DataError
from flux2_core.fingerprint import digest
from flux2_core.latents import image_ids, reference_ids, text_ids
from flux2_core.model_folder import ModelFolder
from flux2_core.run_folder import RunFolder
from flux2_core.store import Table
from flux2_core.training_data import TrainingData

READ_AT_ONCE = 16  # a dev caption of raw rows is up to 16 MB


def tensors_of(config: Config, model: ModelFolder, sample_id: str) -> dict[str, torch.Tensor]:
    """The tensors that training sees for a sample: `ID`, or `ID#n` for variant n.

    Returns:
        `latents` (128, H/16, W/16) in fp32, `prompt_embeds` (L, D) of the first caption, `prompt_embeds.caption1`, ...
        of further ones, `prompt_embeds.null`, `prompt_embeds.preview0`, ..., `img_ids` (S, 4), `txt_ids` (L, 4); as far
        as the configuration needs them `prompt_embeds.trigger_only`, `.class_only`, `.dop` (`.dop1`, ... of further
        captions) and `.negative`. With masks `mask` (H/16, W/16), the share of each token's loss; with references
        `reference.0`, ... (128, h, w) and `reference_ids` (S, 4) of them all, in order.

    Raises:
        DataError: there is no such sample; says where it is, or which there are.
    """
    data = TrainingData(config, model)
    row = _find(config, data, sample_id)
    latents = data.latent_rows([row])[0]
    keys = {"prompt_embeds": row["text_keys"][0]}
    keys |= {f"prompt_embeds.caption{n}": key for n, key in enumerate(row["text_keys"]) if n}
    keys |= {f"prompt_embeds.{name}": key for name, key in roles.named(row["roles"], roles.needed(config))}
    keys |= {f"prompt_embeds.{name}": data.key(text) for name, text in cache.common_texts(config).items()}
    prompts = data.prompt_rows(list(keys.values()))
    beside = {} if (mask_1hw := data.masks([row])) is None else {"mask": mask_1hw[0]}
    references = [latents_1chw[0] for latents_1chw in data.references([row])]
    if references:
        beside |= {f"reference.{n}": latents_chw for n, latents_chw in enumerate(references)}
        ids = [reference_ids(each.shape[1], each.shape[2], n) for n, each in enumerate(references)]
        beside["reference_ids"] = torch.cat(ids)
    return beside | {
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


def stat_tables(config: Config, model: ModelFolder) -> dict[str, Any]:
    """Both tensor tables of this configuration and the number of its samples; zeros where nothing is cached.

    `bytes` counts older versions too, which `gc` removes; `age_days` is that of the newest version.
    """
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
