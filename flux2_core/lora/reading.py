"""Adapter files read back, in diffusers' names or in BFL's (ComfyUI's), whoever wrote them and however strong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from flux2_core.config.adapter import Lora
from flux2_core.errors import DataError, UsageError
from flux2_core.lora.kinds import KINDS, kind_of, widths
from flux2_core.lora.names import (
    DIFFUSERS_PREFIX,
    MAGNITUDE,
    PEFT_KEY,
    A,
    Adapter,
    B,
    from_bfl,
    modules,
    pairs,
    plain,
    split,
)
from flux2_core.store.hashing import file_sha256

LEAST = ".min_rank"  # ends the name of what is no weight: how many ranks of a finished t-lora work in pure noise


def from_file(path: str | Path) -> Adapter:
    """Read an adapter back from either file, as fp32 with every strength (`.alpha`, metadata) inside a factor.

    Raises:
        DataError: no such file, not safetensors, or a key that is no adapter of a FLUX.2 block.
    """
    return _read(path)[0]


def said(path: str | Path) -> dict[str, str]:
    """What a file of ours says of itself; its weights are not read."""
    with safe_open(str(path), framework="pt") as file:
        return file.metadata() or {}


def to_draw(path: str | Path) -> Adapter:
    """The same, and of a `t-lora` of ours, as `<module>.min_rank`, how many ranks of a Linear work in pure noise.

    Raises:
        DataError: as `from_file`.
    """
    adapter, metadata = _read(path)
    if metadata.get("cacheloom.lora_kind") != "t-lora":
        return adapter
    least = metadata.get("cacheloom.min_rank", "")
    ranks = {module: len(a_RI) for module, (a_RI, _) in pairs(adapter).items()}
    fewest = {module: int(least) if least.isdecimal() else max(1, rank // 2) for module, rank in ranks.items()}
    return adapter | {module + LEAST: torch.tensor(min(fewest[module], rank)) for module, rank in ranks.items()}


def _read(path: str | Path) -> tuple[Adapter, dict[str, str]]:
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; give the .safetensors file of a FLUX.2 LoRA")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            peft = json.loads(metadata.get(PEFT_KEY) or "{}")
            if not isinstance(peft, dict):
                raise ValueError(f"its {PEFT_KEY} is no object")
            tensors = {key: file.get_tensor(key).float() for key in sorted(file.keys())}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a safetensors file ({error}); give the file of a FLUX.2 LoRA") from None
    try:
        adapter = _adapter(tensors, peft)
    except DataError as error:
        raise DataError(f"{path}: not the file of a FLUX.2 LoRA: {error}") from None
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:  # a strength that is no number
        raise DataError(f"{path}: its strengths cannot be read ({error}); give the file of a FLUX.2 LoRA") from None
    if not adapter:
        raise DataError(f"{path}: holds no LoRA weights; give the file of a FLUX.2 LoRA")
    return adapter, metadata


def initial(lora: Lora, wanted: Mapping[str, Sequence[int]]) -> Adapter:
    """The weights of the file `lora.init`, for an adapter whose tensors have the wanted shapes.

    Raises:
        DataError: no such file, or not the file of a FLUX.2 LoRA.
        UsageError: it has other targets, another kind or another rank than this configuration.
    """
    weights = from_file(str(lora.init))
    try:
        same_shapes(weights, wanted)
    except UsageError as error:
        raise UsageError(f"lora.init={lora.init}: {error}; set lora.targets, kind and rank as it was trained") from None
    return weights


def presets(lora: Lora) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What the files of `lora.preset` add together: A (R, in) and B (out, R) of each module, strengths inside B.

    Raises:
        DataError: no such file, or not the file of a FLUX.2 LoRA.
        UsageError: one is of a kind that is no product of two factors.
    """
    found: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for path, strength in zip(lora.preset, lora.preset_scales or (1.0,) * len(lora.preset), strict=True):
        for module, weights in modules(from_file(path)).items():
            if (pair := KINDS[kind := kind_of(weights)].pair) is None:
                raise UsageError(
                    f"lora.preset={path}: what {kind} does to {module} is no product of two thin factors that could be "
                    "added to a weight row by row: give the plain LoRA of output.as_lora"
                )
            a_RI, b_OR = pair(weights)
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
    for name, weights in sorted(modules(adapter).items()):
        if name not in linears:
            raise UsageError(f"the LoRA adapts {name}, which this model does not have; it is for another model")
        for does, width, own in zip(("takes", "gives"), widths(weights), linears[name], strict=True):
            if width not in (None, own):
                raise UsageError(
                    f"the LoRA is for another model: its {name} {does} {width} channels, this model's {does} {own}"
                )


def _adapter(tensors: dict[str, torch.Tensor], peft: Mapping[str, Any]) -> Adapter:
    """The tensors of a file under diffusers' names, with every strength inside the factor that carries it."""
    alphas = {plain(key)[: -len(".alpha")]: tensors.pop(key).item() for key in list(tensors) if key.endswith(".alpha")}
    config = {key.removeprefix(DIFFUSERS_PREFIX): value for key, value in peft.items()}
    adapter: Adapter = {}
    for module, weights in modules({plain(key): tensor for key, tensor in tensors.items()}).items():
        kind, names = kind_of(weights), from_bfl(module)
        widths(weights)
        if carries := KINDS[kind].carries:
            strength = _strength(module, names[0], weights=weights, alphas=alphas, config=config)
            weights = weights | {carries: weights[carries] * strength}
        elif alphas.get(module):
            raise DataError(
                f"{module}.alpha: a turn that is held back to {alphas[module]:g} is not read, only a free one"
            )
        for part, own in ({0: weights} if len(names) == 1 else _parts(module, kind, weights)).items():
            adapter |= {f"{names[part]}.{leaf}": tensor.clone() for leaf, tensor in own.items()}
    return adapter


def _parts(module: str, kind: str, weights: Mapping[str, torch.Tensor]) -> dict[int, dict[str, torch.Tensor]]:
    """What is on q, k and v in one, as what is on each."""
    if kind not in ("lora", "dora"):
        raise DataError(f"{module}: q, k and v under one {kind} cannot be told apart; only a LoRA of all three is read")
    found = split(weights[A], weights[B])
    third = len(weights[B]) // 3
    sizes = {part: weights[MAGNITUDE][part * third : (part + 1) * third] for part in found if kind == "dora"}
    return {
        part: {A: a_RI, B: b_OR} | ({MAGNITUDE: sizes[part]} if kind == "dora" else {})
        for part, (a_RI, b_OR) in found.items()
    }


def _strength(
    module: str,
    part: str,
    *,
    weights: Mapping[str, torch.Tensor],
    alphas: Mapping[str, float],
    config: Mapping[str, Any],
) -> float:
    """What a file's update is to be multiplied with: by its own `.alpha`, else peft's configuration, else 1."""
    ranks = [len(weights[name]) for name in (A, "hada_w1_b", "lokr_w2_b") if name in weights]
    given = "lora_alpha" if "lora_alpha" in config else "alpha"  # of peft's LoRA, of its other kinds
    if module in alphas:
        return alphas[module] / ranks[0] if ranks else 1.0  # LyCORIS: a whole factor takes no strength
    if given not in config:
        return 1.0
    rank = ranks[0] if ranks else _of_pattern(config.get("rank_pattern"), part, config.get("r"))
    alpha = _of_pattern(config.get("alpha_pattern"), part, config[given])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_pattern(patterns: Any, part: str, otherwise: Any) -> float:
    """The number that peft's configuration has for a module. An expression could take for ever: only names are read."""
    for pattern, number in dict(patterns or {}).items():
        name = pattern.removeprefix("^").replace("\\", "")
        if not re.fullmatch(r"[\w.-]+", name):
            raise DataError(f"its {PEFT_KEY} has the pattern {pattern!r}: only names of modules are read there")
        if part == name or (not pattern.startswith("^") and part.endswith(f".{name}")):
            return float(number)
    return float(otherwise)
