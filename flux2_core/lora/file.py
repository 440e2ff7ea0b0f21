"""LoRA files: an adapter read from either naming, and written byte for byte the same each time.

Files carry the strength inside `lora_B`, so that alpha equals the rank for every reader, whether it looks at the
metadata or not. safetensors' own writer puts the metadata in a random order; ours sorts it, so that equal runs give
equal files.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from flux2_core.errors import DataError
from flux2_core.lora.metadata import PEFT_KEY, Paths, peft_config
from flux2_core.lora.names import (
    DIFFUSERS_PREFIX,
    A,
    Adapter,
    B,
    from_bfl,
    pairs,
    plain,
    split,
    to_comfyui,
    to_diffusers,
)
from flux2_core.model.tensor_bytes import DTYPES
from flux2_core.store import atomic

SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def from_file(path: str | Path) -> Adapter:
    """Read an adapter back from either kind of file, as fp32 with every strength (`.alpha`, metadata) inside `lora_B`.

    Raises:
        DataError: no such file, not safetensors, or a key that is no LoRA of a FLUX.2 block.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).float() for key in sorted(file.keys())}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; give the .safetensors file of a FLUX.2 LoRA") from None
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a safetensors file ({error}); give the file of a FLUX.2 LoRA") from None
    alphas = {plain(key)[: -len(".alpha")]: tensors.pop(key).item() for key in list(tensors) if key.endswith(".alpha")}
    peft = json.loads(metadata.get(PEFT_KEY) or "{}")
    config = {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in peft.items()}
    adapter: Adapter = {}
    for module, (a_RI, b_OR) in pairs({plain(key): tensor for key, tensor in tensors.items()}).items():
        names = from_bfl(module)
        scaled_OR = b_OR * _strength(module, names[0], rank=len(a_RI), alphas=alphas, config=config)
        parts = {0: (a_RI, scaled_OR)} if len(names) == 1 else split(a_RI, scaled_OR)
        for part, (part_a, part_b) in parts.items():
            adapter[f"{names[part]}.{A}"], adapter[f"{names[part]}.{B}"] = part_a.clone(), part_b.clone()
    if not adapter:
        raise DataError(f"{path}: holds no LoRA weights; give the file of a FLUX.2 LoRA")
    return adapter


def write(
    folder: Path,
    name: str,
    adapter: Mapping[str, torch.Tensor],
    *,
    scale: float,
    metadata: Mapping[str, str],
    dtype: str = "bf16",
) -> Paths:
    """Write `<name>.safetensors` (diffusers) and `<name>-comfyui.safetensors`, each whole or not at all.

    Args:
        folder: made if missing.
        name: of the run.
        adapter: fp32 weights.
        scale: alpha / rank (or alpha / sqrt(rank)), goes into `lora_B` before the cast.
        metadata: see `describe`; text to text.
        dtype: `bf16`, `fp16` or `fp32`.

    Raises:
        DataError: the adapter cannot be named, or holds a value that is not finite.
    """
    broken = sorted(key for key, tensor in adapter.items() if not torch.isfinite(tensor).all())
    if broken:
        raise DataError(f"{broken[0]} holds NaN or infinity: the training diverged; lower train.learning_rate")
    paths = Paths(folder / f"{name}.safetensors", folder / f"{name}-comfyui.safetensors")
    for path, name_as in ((paths.diffusers, to_diffusers), (paths.comfyui, to_comfyui)):
        named = name_as(adapter, scale=scale)
        header = {**metadata, PEFT_KEY: json.dumps(peft_config(named), sort_keys=True), "format": "pt"}
        with atomic.writing(path) as stream:
            _serialise(stream, {key: tensor.to(DTYPES[dtype]) for key, tensor in named.items()}, header)
    return paths


def _strength(module: str, part: str, *, rank: int, alphas: Mapping[str, float], config: Mapping[str, Any]) -> float:
    """What a file's `lora_B` is to be multiplied with: its own `.alpha`, else peft's configuration, else 1."""
    if module in alphas:
        return alphas[module] / rank
    if "lora_alpha" not in config:
        return 1.0
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    special = (alpha for pattern, alpha in patterns.items() if re.match(rf"(.*\.)?({pattern})$", part))
    alpha = float(next(special, config["lora_alpha"]))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _serialise(stream: BinaryIO, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """The safetensors format: u64 length, JSON header padded to 8 bytes, then the tensors one after another."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for key, tensor in sorted(tensors.items()):
        end = offset + tensor.nbytes
        header[key] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for _, tensor in sorted(tensors.items()):
        stream.write(tensor.contiguous().view(torch.uint8).numpy().data)
