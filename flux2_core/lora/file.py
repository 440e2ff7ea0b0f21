"""Adapter files of ours, named for diffusers and for BFL's model (ComfyUI), byte for byte the same each time.

What is written is finished: it carries its strength, so that alpha equals the rank for every reader, whether it looks
at the metadata or not. safetensors' own writer puts the metadata in a random order; ours sorts it, so that equal runs
give equal files. ComfyUI reads a plain LoRA under BFL's names, q, k and v in one; what cannot be put in one, it reads
under diffusers' names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from flux2_core.errors import DataError
from flux2_core.lora.kinds import kind_of
from flux2_core.lora.metadata import Paths, peft_config
from flux2_core.lora.names import (
    COMFYUI_PREFIX,
    DIFFUSERS_PREFIX,
    DORA_SCALE,
    MAGNITUDE,
    PEFT_KEY,
    A,
    Adapter,
    B,
    modules,
    to_bfl,
)
from flux2_core.model.tensor_bytes import DTYPES
from flux2_core.store import atomic

EXACT = (MAGNITUDE, DORA_SCALE)  # stay fp32: bf16's 0.4 % of a row's size is more than many a run learns
SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def write(
    folder: Path,
    name: str,
    adapter: Mapping[str, torch.Tensor],
    *,
    metadata: Mapping[str, str],
    dtype: str = "bf16",
    comfyui: Mapping[str, torch.Tensor] | None = None,
) -> Paths:
    """Write `<name>.safetensors` (diffusers) and `<name>-comfyui.safetensors`, each whole or not at all.

    Args:
        folder: made if missing.
        name: of the run.
        adapter: finished fp32 weights.
        metadata: see `describe`; text to text.
        dtype: `bf16`, `fp16` or `fp32`.
        comfyui: what is written for ComfyUI, if something else.

    Raises:
        DataError: the adapter cannot be named, or holds a value that is not finite.
    """
    both = (adapter, adapter if comfyui is None else comfyui)
    if broken := sorted(key for each in both for key, tensor in each.items() if not torch.isfinite(tensor).all()):
        raise DataError(f"{broken[0]} holds NaN or infinity: the training diverged; lower train.learning_rate")
    paths = Paths(folder / f"{name}.safetensors", folder / f"{name}-comfyui.safetensors")
    for path, named in ((paths.diffusers, to_diffusers(both[0])), (paths.comfyui, to_comfyui(both[1]))):
        peft = peft_config(named)
        header = {**metadata, **({PEFT_KEY: json.dumps(peft, sort_keys=True)} if peft else {}), "format": "pt"}
        with atomic.writing(path) as stream:
            cast = {key: tensor if key.endswith(EXACT) else tensor.to(DTYPES[dtype]) for key, tensor in named.items()}
            _serialise(stream, cast, header)
    return paths


def to_diffusers(adapter: Mapping[str, torch.Tensor]) -> Adapter:
    """Name the adapter as diffusers does, `transformer.<module>.lora_{A,B}.weight`.

    Raises:
        DataError: an `A` without its `B`, or other tensors that are no adapter.
    """
    return {
        f"{DIFFUSERS_PREFIX}{module}.{leaf}": tensor.float()
        for module, weights in modules(adapter).items()
        if kind_of(weights)
        for leaf, tensor in weights.items()
    }


def to_comfyui(adapter: Mapping[str, torch.Tensor]) -> Adapter:
    """Name the adapter as ComfyUI reads it: `diffusion_model.double_blocks...` with q, k, v fused, zeros where absent.

    Raises:
        DataError: a module outside the blocks, or tensors that are no adapter.
    """
    named: Adapter = {}
    fused: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}
    for module, weights in modules(adapter).items():
        bfl, third = to_bfl(module)
        if kind_of(weights) != "lora":
            named |= {f"{DIFFUSERS_PREFIX}{module}.{leaf}": tensor.float() for leaf, tensor in weights.items()}
        elif third is None:
            named |= {f"{COMFYUI_PREFIX}{bfl}.{leaf}": tensor.float() for leaf, tensor in weights.items()}
        else:
            fused.setdefault(bfl, {})[third] = weights[A].float(), weights[B].float()
    for bfl, parts in fused.items():
        named[f"{COMFYUI_PREFIX}{bfl}.{A}"], named[f"{COMFYUI_PREFIX}{bfl}.{B}"] = _fuse(parts)
    sizes = {key: named.pop(key) for key in list(named) if key.endswith(MAGNITUDE)}
    return named | {key.replace(MAGNITUDE, DORA_SCALE): size_N[:, None] for key, size_N in sizes.items()}


def _fuse(parts: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    rank = max(len(a_RI) for a_RI, _ in parts.values())
    some_a, some_b = next(iter(parts.values()))
    out = len(some_b)
    a_RI, b_OR = torch.zeros(3 * rank, some_a.shape[1]), torch.zeros(3 * out, 3 * rank)
    for third, (part_a, part_b) in parts.items():
        own = len(part_a)
        a_RI[third * rank : third * rank + own] = part_a
        b_OR[third * out : (third + 1) * out, third * rank : third * rank + own] = part_b
    return a_RI, b_OR


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
