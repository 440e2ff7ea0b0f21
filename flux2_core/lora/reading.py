"""LoRA files read back, in diffusers' names or in BFL's (ComfyUI's), whoever wrote them and however strong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flux2_core.errors import DataError
from flux2_core.lora.names import DIFFUSERS_PREFIX, PEFT_KEY, A, Adapter, B, from_bfl, pairs, plain, split


def from_file(path: str | Path) -> Adapter:
    """Read an adapter back from either kind of file, as fp32 with every strength (`.alpha`, metadata) inside `lora_B`.

    Raises:
        DataError: no such file, not safetensors, or a key that is no LoRA of a FLUX.2 block.
    """
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; give the .safetensors file of a FLUX.2 LoRA")
    try:
        with safe_open(str(path), framework="pt") as file:
            peft = json.loads((file.metadata() or {}).get(PEFT_KEY) or "{}")
            if not isinstance(peft, dict):
                raise ValueError(f"its {PEFT_KEY} is no object")
            tensors = {key: file.get_tensor(key).float() for key in sorted(file.keys())}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a safetensors file ({error}); give the file of a FLUX.2 LoRA") from None
    alphas = {plain(key)[: -len(".alpha")]: tensors.pop(key).item() for key in list(tensors) if key.endswith(".alpha")}
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
