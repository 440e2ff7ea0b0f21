"""Names of a LoRA's tensors: as in diffusers' Flux2Transformer2DModel, and as in BFL's model (ComfyUI).

An adapter is a dictionary `<module>.lora_A.weight` (rank, in) and `<module>.lora_B.weight` (out, rank), fp32.

BFL's model keeps q, k and v of an attention in one Linear. Three rank-r updates on its thirds are one update of rank
3r: A stacked, B block-diagonal. That is exact, and `split` takes it apart again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from flux2_core.errors import DataError

Adapter = dict[str, torch.Tensor]
A, B = "lora_A.weight", "lora_B.weight"
PEFT_KEY = "lora_adapter_metadata"  # of a file: where diffusers looks for peft's configuration
DIFFUSERS_PREFIX, COMFYUI_PREFIX = "transformer.", "diffusion_model."
PREFIXES = (DIFFUSERS_PREFIX, COMFYUI_PREFIX, "base_model.model.")

FUSED = {  # BFL's fused Linear -> the three that diffusers has, in the order of its rows
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
DOUBLE = {  # diffusers -> BFL, inside transformer_blocks.i / double_blocks.i
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
SINGLE = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}  # single_transformer_blocks.j / single_blocks.j
BLOCKS = {"double_blocks": ("transformer_blocks", DOUBLE), "single_blocks": ("single_transformer_blocks", SINGLE)}
THIRDS = {part: (fused, third) for fused, parts in FUSED.items() for third, part in enumerate(parts)}
OURS = re.compile(r"(single_transformer_blocks|transformer_blocks)\.(\d+)\.(.+)")
THEIRS = re.compile(r"(single_blocks|double_blocks)\.(\d+)\.(.+)")


def to_diffusers(adapter: Mapping[str, torch.Tensor], *, scale: float) -> Adapter:
    """Name the adapter as diffusers does, `transformer.<module>.lora_{A,B}.weight`, with the scale inside `lora_B`.

    Raises:
        DataError: an `A` without its `B`, or the other way round.
    """
    named: Adapter = {}
    for module, (a_RI, b_OR) in pairs(adapter).items():
        named[f"{DIFFUSERS_PREFIX}{module}.{A}"] = a_RI.float()
        named[f"{DIFFUSERS_PREFIX}{module}.{B}"] = b_OR.float() * scale
    return named


def to_comfyui(adapter: Mapping[str, torch.Tensor], *, scale: float) -> Adapter:
    """Name the adapter as BFL and ComfyUI do, `diffusion_model.double_blocks...`; q, k, v fused, zeros where absent.

    Raises:
        DataError: a module outside the blocks, or an `A` without its `B`.
    """
    named: Adapter = {}
    fused: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}
    for module, (a_RI, b_OR) in pairs(adapter).items():
        bfl, third = _to_bfl(module)
        pair = (a_RI.float(), b_OR.float() * scale)
        if third is None:
            named[f"{COMFYUI_PREFIX}{bfl}.{A}"], named[f"{COMFYUI_PREFIX}{bfl}.{B}"] = pair
        else:
            fused.setdefault(bfl, {})[third] = pair
    for bfl, parts in fused.items():
        named[f"{COMFYUI_PREFIX}{bfl}.{A}"], named[f"{COMFYUI_PREFIX}{bfl}.{B}"] = _fuse(parts)
    return named


def pairs(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each module; a file's names must come in pairs."""
    modules = dict.fromkeys(key.rpartition(".lora_")[0] for key in tensors)
    wanted = {f"{module}.{kind}" for module in modules for kind in (A, B)}
    if odd := sorted(wanted ^ tensors.keys()):
        raise DataError(f"{odd[0]}: a LoRA has lora_A.weight and lora_B.weight for each module and nothing else")
    return {module: (tensors[f"{module}.{A}"], tensors[f"{module}.{B}"]) for module in modules}


def _to_bfl(module: str) -> tuple[str, int | None]:
    found = OURS.fullmatch(module)
    if found and found[1] == "single_transformer_blocks" and found[3] in SINGLE:
        return f"single_blocks.{found[2]}.{SINGLE[found[3]]}", None
    if found and found[1] == "transformer_blocks" and found[3] in DOUBLE:
        return f"double_blocks.{found[2]}.{DOUBLE[found[3]]}", None
    if found and found[1] == "transformer_blocks" and found[3] in THIRDS:
        fused, third = THIRDS[found[3]]
        return f"double_blocks.{found[2]}.{fused}", third
    raise DataError(f"{module}: not a Linear of a FLUX.2 block; an adapter sits on those of the blocks only")


def from_bfl(module: str) -> list[str]:
    """The diffusers modules behind a module of a file, whichever names the file has: one, or the three of a fusion."""
    found = THEIRS.fullmatch(module)
    if found is None:
        _to_bfl(module)  # refuses what is not of a block
        return [module]
    block, names = BLOCKS[found[1]]
    parts = [name for name, bfl in names.items() if bfl == found[3]]
    if block == "transformer_blocks":
        parts += FUSED.get(found[3], ())
    if not parts:
        raise DataError(f"{module}: not a Linear of a FLUX.2 block; is this the LoRA of another model?")
    return [f"{block}.{found[2]}.{part}" for part in parts]


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


def split(a_RI: torch.Tensor, b_OR: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Undo `_fuse`; an update trained on the fused Linear itself becomes three that share their A."""
    rank, out = len(a_RI) // 3, len(b_OR) // 3
    thirds = [b_OR[third * out : (third + 1) * out] for third in range(3)]
    if len(a_RI) % 3:
        return {third: (a_RI, b) for third, b in enumerate(thirds)}
    own = [slice(third * rank, (third + 1) * rank) for third in range(3)]
    elsewhere = sum(int(b.count_nonzero() - b[:, own[third]].count_nonzero()) for third, b in enumerate(thirds))
    if elsewhere:
        return {third: (a_RI, b) for third, b in enumerate(thirds)}
    parts = {third: (a_RI[own[third]], b[:, own[third]]) for third, b in enumerate(thirds)}
    return {third: (a, b) for third, (a, b) in parts.items() if a.any() or b.any()}


def plain(key: str) -> str:
    """A key without its file's prefix, with peft's names for A and B."""
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
    return key.removeprefix(prefix).replace("lora_down.weight", A).replace("lora_up.weight", B)
