"""LoRA files: the adapter under diffusers' names and under BFL's (ComfyUI), written byte for byte the same each time.

An adapter is a dictionary `<module>.lora_A.weight` (rank, in) and `<module>.lora_B.weight` (out, rank), fp32, with
module names as in diffusers' Flux2Transformer2DModel. Files carry the strength inside `lora_B`, so that alpha equals
the rank for every reader, whether it looks at the metadata or not. safetensors' own writer puts the metadata in a
random order; ours sorts it, so that equal runs give equal files.

BFL's model keeps q, k and v of an attention in one Linear. Three rank-r updates on its thirds are one update of rank
3r: A stacked, B block-diagonal. That is exact, and `from_file` takes it apart again.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from flux2_core.config import Config, Lora
from flux2_core.errors import DataError

Adapter = dict[str, torch.Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
A, B = "lora_A.weight", "lora_B.weight"
PEFT_KEY = "lora_adapter_metadata"  # where diffusers looks for peft's configuration
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

SIZES = {  # (heads, double blocks, single blocks) of the published models
    (48, 8, 48): "dev",
    (32, 8, 24): "klein-9b",
    (24, 5, 20): "klein-4b",
}


@dataclass(frozen=True)
class Paths:
    """The two files of one adapter."""

    diffusers: Path
    comfyui: Path


def scale(lora: Lora) -> float:
    """Factor on B @ A: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    alpha = lora.rank if lora.alpha is None else lora.alpha
    return alpha / (math.sqrt(lora.rank) if lora.kind == "rslora" else lora.rank)


def to_diffusers(adapter: Mapping[str, torch.Tensor], *, scale: float) -> Adapter:
    """Name the adapter as diffusers does, `transformer.<module>.lora_{A,B}.weight`, with the scale inside `lora_B`.

    Raises:
        DataError: an `A` without its `B`, or the other way round.
    """
    named: Adapter = {}
    for module, (a_RI, b_OR) in _pairs(adapter).items():
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
    for module, (a_RI, b_OR) in _pairs(adapter).items():
        bfl, third = _to_bfl(module)
        pair = (a_RI.float(), b_OR.float() * scale)
        if third is None:
            named[f"{COMFYUI_PREFIX}{bfl}.{A}"], named[f"{COMFYUI_PREFIX}{bfl}.{B}"] = pair
        else:
            fused.setdefault(bfl, {})[third] = pair
    for bfl, parts in fused.items():
        named[f"{COMFYUI_PREFIX}{bfl}.{A}"], named[f"{COMFYUI_PREFIX}{bfl}.{B}"] = _fuse(parts)
    return named


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
    alphas = {_plain(key)[: -len(".alpha")]: tensors.pop(key).item() for key in list(tensors) if key.endswith(".alpha")}
    peft = json.loads(metadata.get(PEFT_KEY) or "{}")
    config = {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in peft.items()}
    adapter: Adapter = {}
    for module, (a_RI, b_OR) in _pairs({_plain(key): tensor for key, tensor in tensors.items()}).items():
        names = _from_bfl(module)
        scaled_OR = b_OR * _strength(module, names[0], rank=len(a_RI), alphas=alphas, config=config)
        parts = {0: (a_RI, scaled_OR)} if len(names) == 1 else _split(a_RI, scaled_OR)
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
    folder.mkdir(parents=True, exist_ok=True)
    paths = Paths(folder / f"{name}.safetensors", folder / f"{name}-comfyui.safetensors")
    for path, name_as in ((paths.diffusers, to_diffusers), (paths.comfyui, to_comfyui)):
        named = name_as(adapter, scale=scale)
        header = {**metadata, PEFT_KEY: json.dumps(_peft_config(named), sort_keys=True), "format": "pt"}
        _write_file(path, {key: tensor.to(DTYPES[dtype]) for key, tensor in named.items()}, header)
    return paths


def describe(
    config: Config, *, base: str, steps: int, lineage: Mapping[str, str], date: str | None = None
) -> dict[str, str]:
    """Metadata of a run: `modelspec.*` and `ss_*` (what UIs show) and our lineage; nothing of the environment.

    Args:
        config: of the run; only named fields are used.
        base: from `base_model`.
        steps: optimizer steps behind these weights.
        lineage: hashes, for instance `config_sha256`, `text_fingerprint`, `latents_fingerprint`.
        date: ISO 8601, of the run's end; left out, the file has none and stays reproducible.
    """
    rank = config.lora.rank
    known = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "flux.2/lora" if base == "other" else f"Flux.2-{base}/lora",
        "modelspec.implementation": "https://github.com/black-forest-labs/flux2",
        "modelspec.title": config.run,
        "modelspec.resolution": f"{max(config.data[0].resolutions)}x{max(config.data[0].resolutions)}",
        "modelspec.trigger_phrase": config.trigger,
        "modelspec.date": date,
        "ss_output_name": config.run,
        "ss_base_model_version": "flux2" if base == "other" else f"flux2_{base.replace('-', '_')}",
        "ss_sd_model_name": Path(config.model.path).name,
        "ss_network_module": "networks.lora_flux_2",
        "ss_network_dim": rank,
        "ss_network_alpha": rank,  # of the file; what was trained with is below
        "ss_steps": steps,
        "ss_max_train_steps": config.train.steps,
        "ss_learning_rate": config.train.learning_rate,
        "ss_total_batch_size": config.train.batch_size,
        "ss_seed": config.train.seed,
        "ss_resolution": str(max(config.data[0].resolutions)),
        "cacheloom.lora_kind": config.lora.kind,
        "cacheloom.lora_alpha": rank if config.lora.alpha is None else config.lora.alpha,
        **{f"cacheloom.{key}": value for key, value in lineage.items()},
    }
    return {key: str(value) for key, value in known.items() if value is not None}


def base_model(path: str, transformer: Mapping[str, Any] | None = None) -> str:
    """Which published model a path is, by its sizes where given, else by name: a value of `SIZES`, or `other`."""
    if transformer is not None:
        size = tuple(transformer.get(key) for key in ("num_attention_heads", "num_layers", "num_single_layers"))
        return SIZES.get(size, "other")  # type: ignore[arg-type]  # a key with None in it is simply not there
    for part in reversed(Path(path).parts):
        found = re.match(r"flux\.?2[-_](dev|klein)[-_a-z]*(4b|9b)?", part.rpartition("--")[2].lower())
        if found:
            return "dev" if found[1] == "dev" else f"klein-{found[2] or '9b'}"
    return "other"


def _pairs(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
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


def _from_bfl(module: str) -> list[str]:
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


def _split(a_RI: torch.Tensor, b_OR: torch.Tensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
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


def _plain(key: str) -> str:
    prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), "")
    return key.removeprefix(prefix).replace("lora_down.weight", A).replace("lora_up.weight", B)


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


def _peft_config(named: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """peft's configuration of a file with alpha = rank everywhere, keyed as diffusers expects it.

    ComfyUI's file has fused modules of rank 3r; without the two patterns diffusers would read them too weakly.
    """
    ranks: dict[str, int] = {}
    for key, tensor in named.items():
        if not key.endswith(A):
            continue
        ranks.update(dict.fromkeys(_from_bfl(_plain(key).removesuffix(f".{A}")), len(tensor)))
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {"^" + re.escape(module): own for module, own in sorted(ranks.items()) if own != rank}
    config = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
    }
    return {DIFFUSERS_PREFIX + key: value for key, value in config.items()}


def _write_file(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            _serialise(stream, tensors, metadata)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
