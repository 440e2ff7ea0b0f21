"""Names of an adapter's tensors: as in diffusers' Flux2Transformer2DModel, and as in BFL's model (ComfyUI).

An adapter is a dictionary of fp32 tensors: `<module>.lora_A.weight` (rank, in) and `<module>.lora_B.weight` (out, rank)
of a LoRA, `<module>.lokr_w1` and so on of other kinds (`lora.kinds`).

BFL's model keeps q, k and v of an attention in one Linear. Three rank-r updates on its thirds are one update of rank
3r: A stacked, B block-diagonal. That is exact, and `split` takes it apart again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from flux2_core.errors import DataError

Adapter = dict[str, torch.Tensor]
DORA_SCALE = "dora_scale"  # ComfyUI's and LyCORIS' name for a magnitude, which each divides by a norm of its own
A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
LEAF = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_magnitude_vector|lokr_w[12](?:_[ab])?|hada_w[12]_[ab]|oft_blocks)")
PEFT_KEY = "lora_adapter_metadata"  # of a file: where diffusers looks for peft's configuration
DIFFUSERS_PREFIX, COMFYUI_PREFIX = "transformer.", "diffusion_model."
PREFIXES = (DIFFUSERS_PREFIX, COMFYUI_PREFIX, "base_model.model.")

NAMES: dict[tuple[str, str], tuple[str, str, int | None]] = {  # diffusers -> BFL, and which third of its rows
    ("transformer_blocks", "attn.to_q"): ("double_blocks", "img_attn.qkv", 0),
    ("transformer_blocks", "attn.to_k"): ("double_blocks", "img_attn.qkv", 1),
    ("transformer_blocks", "attn.to_v"): ("double_blocks", "img_attn.qkv", 2),
    ("transformer_blocks", "attn.add_q_proj"): ("double_blocks", "txt_attn.qkv", 0),
    ("transformer_blocks", "attn.add_k_proj"): ("double_blocks", "txt_attn.qkv", 1),
    ("transformer_blocks", "attn.add_v_proj"): ("double_blocks", "txt_attn.qkv", 2),
    ("transformer_blocks", "attn.to_out.0"): ("double_blocks", "img_attn.proj", None),
    ("transformer_blocks", "attn.to_add_out"): ("double_blocks", "txt_attn.proj", None),
    ("transformer_blocks", "ff.linear_in"): ("double_blocks", "img_mlp.0", None),
    ("transformer_blocks", "ff.linear_out"): ("double_blocks", "img_mlp.2", None),
    ("transformer_blocks", "ff_context.linear_in"): ("double_blocks", "txt_mlp.0", None),
    ("transformer_blocks", "ff_context.linear_out"): ("double_blocks", "txt_mlp.2", None),
    ("single_transformer_blocks", "attn.to_qkv_mlp_proj"): ("single_blocks", "linear1", None),
    ("single_transformer_blocks", "attn.to_out"): ("single_blocks", "linear2", None),
}
MODULE = re.compile(r"(\w+)\.(\d+)\.(.+)")


def modules(tensors: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of each module by their names in it.

    Raises:
        DataError: a tensor is of no kind of adapter.
    """
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, leaf = parted(key)
        found.setdefault(module, {})[leaf] = tensor
    return found


def parted(key: str) -> tuple[str, str]:
    """The module of a tensor, and what it is called there."""
    if key.endswith(DORA_SCALE):
        raise DataError(f"{key!r} was divided by a norm of the base model: give the file for diffusers")
    if (found := LEAF.fullmatch(key)) is None:
        raise DataError(
            f"{key!r}: a LoRA has lora_A.weight and lora_B.weight for each module and nothing else, and no other kind "
            "of adapter has this"
        )
    return found[1], found[2]


def pairs(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each module; a file's names must come in pairs."""
    modules = dict.fromkeys(module for key in tensors if (module := key.rpartition(".lora_")[0]))
    wanted = {f"{module}.{kind}" for module in modules for kind in (A, B)}
    if odd := sorted(wanted ^ tensors.keys()):
        raise DataError(f"{odd[0]!r}: a LoRA has lora_A.weight and lora_B.weight for each module and nothing else")
    return {module: (tensors[f"{module}.{A}"], tensors[f"{module}.{B}"]) for module in modules}


def to_bfl(module: str) -> tuple[str, int | None]:
    """BFL's module for one of diffusers', and which third of a fused one it is."""
    found = MODULE.fullmatch(module)
    if found is None or (found[1], found[3]) not in NAMES:
        raise DataError(f"{module}: not a Linear of a FLUX.2 block; an adapter sits on those of the blocks only")
    blocks, linear, third = NAMES[found[1], found[3]]
    return f"{blocks}.{found[2]}.{linear}", third


def from_bfl(module: str) -> list[str]:
    """The diffusers modules behind a module of a file, whichever names the file has: one, or the three of a fusion."""
    found = MODULE.fullmatch(module)
    blocks, place, linear = found.groups() if found else ("", "", "")
    if (blocks, linear) in NAMES:
        return [module]
    behind = [f"{b}.{place}.{name}" for (b, name), theirs in NAMES.items() if theirs[:2] == (blocks, linear)]
    if not behind:
        raise DataError(f"{module}: not a Linear of a FLUX.2 block; is this the LoRA of another model?")
    return behind


def split(a_RI: torch.Tensor, b_OR: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Take a fusion apart; an update trained on the fused Linear itself becomes three that share their A."""
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
