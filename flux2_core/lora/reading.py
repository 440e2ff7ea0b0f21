"""LoRA files read back, in diffusers' names or in BFL's (ComfyUI's), whoever wrote them and however strong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from flux2_core.config.sections import Lora
from flux2_core.errors import DataError, UsageError
from flux2_core.lora.names import DIFFUSERS_PREFIX, PEFT_KEY, A, Adapter, B, from_bfl, pairs, plain, split
from flux2_core.store.hashing import file_sha256


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
    try:
        adapter = _adapter(tensors, peft)
    except DataError as error:
        raise DataError(f"{path}: not the file of a FLUX.2 LoRA: {error}") from None
    if not adapter:
        raise DataError(f"{path}: holds no LoRA weights; give the file of a FLUX.2 LoRA")
    return adapter


def initial(lora: Lora, wanted: Mapping[str, Sequence[int]]) -> Adapter:
    """The weights of the file `lora.init`, for an adapter whose tensors have the wanted shapes.

    Raises:
        DataError: no such file, or not the file of a FLUX.2 LoRA.
        UsageError: it has other targets or another rank than this configuration.
    """
    weights = from_file(str(lora.init))
    try:
        same_shapes(weights, wanted)
    except UsageError as error:
        raise UsageError(f"lora.init={lora.init}: {error}; set lora.targets and lora.rank as it was trained") from None
    return weights


def presets(lora: Lora) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What the files of `lora.preset` add together: A (R, in) and B (out, R) of each module, strengths inside B.

    Raises:
        DataError: no such file, or not the file of a FLUX.2 LoRA.
    """
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for path, strength in zip(lora.preset, lora.preset_scales or (1.0,) * len(lora.preset), strict=True):
        for module, (a_RI, b_OR) in pairs(from_file(path)).items():
            found.setdefault(module, []).append((a_RI, strength * b_OR))
    return {
        module: (torch.cat([a_RI for a_RI, _ in each]), torch.cat([b_OR for _, b_OR in each], dim=1))
        for module, each in found.items()
    }


def preset_hashes(lora: Lora) -> list[str]:
    """Which files `lora.preset` names, by their bytes."""
    return [file_sha256(Path(path)) for path in lora.preset]


def same_shapes(weights: Mapping[str, torch.Tensor], wanted: Mapping[str, Sequence[int]]) -> None:
    """See that weights are those of an adapter of the wanted shapes.

    Raises:
        UsageError: the names or shapes are not those of this adapter.
    """
    if odd := sorted(wanted.keys() ^ weights.keys()):
        raise UsageError(f"its modules and lora.targets differ, for instance in {odd[0]}")
    for name, shape in wanted.items():
        if (given := list(weights[name].shape)) != list(shape):
            raise UsageError(f"{name}: the file has shape {given}, lora.rank asks for {list(shape)}")


def fits(adapter: Adapter, linears: Mapping[str, tuple[int, int]]) -> None:
    """See that a finished adapter is for a model with these Linears: (inputs, outputs) of each by its name.

    Raises:
        UsageError: it names a module that is not there, or one of another width.
    """
    for name, (a_RI, b_OR) in sorted(pairs(adapter).items()):
        if name not in linears:
            raise UsageError(f"the LoRA adapts {name}, which this model does not have; it is for another model")
        for does, width, own in zip(("takes", "gives"), (a_RI.shape[1], len(b_OR)), linears[name], strict=True):
            if width != own:
                raise UsageError(
                    f"the LoRA is for another model: its {name} {does} {width} channels, this model's {does} {own}"
                )


def _adapter(tensors: dict[str, torch.Tensor], peft: Mapping[str, Any]) -> Adapter:
    """The tensors of a file under diffusers' names, with every strength inside `lora_B`."""
    alphas = {plain(key)[: -len(".alpha")]: tensors.pop(key).item() for key in list(tensors) if key.endswith(".alpha")}
    config = {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in peft.items()}
    adapter: Adapter = {}
    for module, (a_RI, b_OR) in pairs({plain(key): tensor for key, tensor in tensors.items()}).items():
        names = from_bfl(module)
        scaled_OR = b_OR * _strength(module, names[0], rank=len(a_RI), alphas=alphas, config=config)
        parts = {0: (a_RI, scaled_OR)} if len(names) == 1 else split(a_RI, scaled_OR)
        for part, (part_a, part_b) in parts.items():
            adapter[f"{names[part]}.{A}"], adapter[f"{names[part]}.{B}"] = part_a.clone(), part_b.clone()
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
