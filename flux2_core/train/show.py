"""The exact tensors that training sees for one sample."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from flux2_core.config.sections import Config
from flux2_core.data import needs, texts
from flux2_core.errors import DataError
from flux2_core.model.folder import ModelFolder
from flux2_core.model.latents import image_ids, reference_ids, text_ids
from flux2_core.run.folder import RunFolder
from flux2_core.store import atomic, parquet, schemas
from flux2_core.train.batches import TrainingData


def tensors_of(config: Config, model: ModelFolder, sample_id: str) -> dict[str, torch.Tensor]:
    """The tensors that training sees for a sample: `ID`, or `ID#n` for variant n.

    Returns:
        `latents` (128, H/16, W/16) in fp32, `prompt_embeds` (L, D) of the first caption, `prompt_embeds.caption1`, ...
        of further ones, `prompt_embeds.null`, `prompt_embeds.preview0`, ..., `img_ids` (S, 4), `txt_ids` (L, 4); as far
        as the configuration needs them `prompt_embeds.trigger_only`, `.class_only`, `.dop` (`.dop1`, ... of further
        captions) and `.negative`. With masks `mask` (H/16, W/16), the share of each token's loss; with references
        `reference.0`, ... (128, h, w) and `reference_ids` (S, 4) of them all, in order. Of a pair also `rejected`.

    Raises:
        DataError: there is no such sample; says where it is, or which there are.
    """
    data = TrainingData(config, model)
    row = _find(config, data, sample_id)
    latents = data.pictures([row])[0]
    keys = {"prompt_embeds": row["text_keys"][0]}
    keys |= {f"prompt_embeds.caption{n}": key for n, key in enumerate(row["text_keys"]) if n}
    keys |= {f"prompt_embeds.{name}": key for name, key in texts.named(row["roles"], needs.of(config).roles)}
    keys |= {f"prompt_embeds.{name}": data.key(text) for name, text in texts.common_texts(config).items()}
    prompts = data.prompt_rows(list(keys.values()))
    beside = {} if (mask_1hw := data.masks([row])) is None else {"mask": mask_1hw[0]}
    references = [latents_1chw[0] for latents_1chw in data.references([row])]
    if references:
        beside |= {f"reference.{n}": latents_chw for n, latents_chw in enumerate(references)}
        ids = [reference_ids(each.shape[1], each.shape[2], n) for n, each in enumerate(references)]
        beside["reference_ids"] = torch.cat(ids)
    if row.get(schemas.REJECTED):
        beside["rejected"] = data.latent_rows([row[schemas.REJECTED]])[0]
    return beside | {
        "latents": latents,
        **{name: rows_LD.clone() for name, rows_LD in zip(keys, prompts, strict=True)},
        "img_ids": image_ids(latents.shape[1], latents.shape[2]),
        "txt_ids": text_ids(prompts.shape[1]),
    }


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors to a safetensors file, whole or not at all."""
    atomic.write(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _find(config: Config, data: TrainingData, sample_id: str) -> dict[str, Any]:
    name, _, variant = sample_id.rpartition("#")
    found: dict[str, Any] | None = None
    for row in chain(data.train, data.validation):
        if row["id"] == sample_id:  # a file's name may have a # in it
            return row
        if row["id"] == name and str(row["variant"]) == variant:
            found = found or row
    if found:
        return found
    left_out = RunFolder(config).quarantine
    if left_out.is_file():
        for row in parquet.read_parquet(str(left_out)).to_pylist():
            for path in (Path(row["path"]), Path(row["path"]).with_suffix("")):
                if f"/{path.as_posix()}".endswith(f"/{sample_id}"):
                    raise DataError(f"{sample_id}: quarantined ({row['reason']})")
    known = ", ".join(dict.fromkeys(row["id"] for row in data.train[:5]))
    raise DataError(f"{sample_id}: no such sample; there are {known}, ... (`cacheloom plan --json` lists all)")
