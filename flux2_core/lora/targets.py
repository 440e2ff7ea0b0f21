"""Which Linears an adapter sits on, and the rank and the strength of each."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from flux2_core.config.adapter import Lora
from flux2_core.errors import UsageError, choose
from flux2_core.lora.kinds import FACTOR, KINDS
from flux2_core.lora.names import Adapter, modules

BLOCK = r"(single_)?transformer_blocks\.\d+\."
PRESETS = {
    "all": BLOCK + r".*",
    "attention": BLOCK + r"attn\..*",
    "mlp": BLOCK + r"(ff|ff_context)\..*|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
    "tiny": r"transformer_blocks\.\d+\.attn\.to_[qkv]",
    "diffusers": (
        r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    ),
}

RANGE = re.compile(r"\\?\.\[(\d+)-(\d+)\]")  # of blocks' numbers


def match(lora: Lora, linears: Sequence[str]) -> list[str]:
    """Names of the Linears that `lora.targets` selects, in the model's order.

    Raises:
        UsageError: an unknown preset, an invalid expression, or an expression that selects nothing.
    """
    if isinstance(lora.targets, str) and lora.targets not in PRESETS and re.fullmatch(r"[a-z-]+", lora.targets):
        raise UsageError(f"lora.targets={lora.targets!r}: no such preset; there are {', '.join(PRESETS)}")
    given = (lora.targets,) if isinstance(lora.targets, str) else lora.targets
    chosen: set[str] = set()
    for expression in given:
        chosen |= _selected(expression, linears, setting="lora.targets")
    if outside := sorted(name for name in chosen if not re.match(BLOCK, name)):
        raise UsageError(
            f"lora.targets selects {outside[0]}: only Linears inside blocks can be adapted (cached rows may be behind "
            f"context_embedder); begin the expression with {BLOCK!r}, or use a preset: {', '.join(PRESETS)}"
        )
    return [name for name in linears if name in chosen]


def ranks(lora: Lora, targets: Sequence[str]) -> dict[str, int]:
    """Rank of the adapter on each of its Linears: of the first of `lora.ranks` that selects it, else `lora.rank`.

    Raises:
        UsageError: an invalid expression, or one that selects none of them.
    """
    found = dict.fromkeys(targets, lora.rank)
    for expression, rank in reversed(lora.ranks.items()):
        found |= dict.fromkeys(_selected(expression, targets, setting="lora.ranks"), rank)
    return found


def shapes(lora: Lora, linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """Shapes of an adapter's tensors by their names, on a model with these Linears: (inputs, outputs) by name."""
    kind, each = KINDS[lora.kind], ranks(lora, match(lora, list(linears)))
    found = {name: kind.shapes(*linears[name], rank, lora.factor or FACTOR) for name, rank in each.items()}
    return {f"{name}.{leaf}": shape for name, own in found.items() for leaf, shape in own.items()}


def thin(lora: Lora) -> int:
    """Most values per token between the factors of a Linear's adapter."""
    return KINDS[lora.kind].thin(max(lora.rank, *lora.ranks.values(), 1), lora.factor or FACTOR)


def work(lora: Lora, linears: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Multiplications per token on each adapted Linear beside the base's: by what meets its input, and by others."""
    kind, each = KINDS[lora.kind], ranks(lora, match(lora, list(linears)))
    return {name: kind.work(*linears[name], rank, lora.factor or FACTOR) for name, rank in each.items()}


def strength(lora: Lora, rank: int) -> float:
    """Factor on the update of a Linear of this rank."""
    kind = choose(KINDS, lora.kind, setting="lora.kind")
    return kind.strength(rank if lora.alpha is None else lora.alpha, rank) if kind.carries else 1.0


def finished(lora: Lora, weights: Mapping[str, torch.Tensor], *, back: bool = False) -> Adapter:
    """The weights with the strength inside, as files carry it; `back`: without it again, as they are trained."""
    carries, each = f".{KINDS[lora.kind].carries}", ranks(lora, list(modules(weights)))
    found = dict(weights)
    for name, rank in each.items():
        if (key := name + carries) in found and (factor := strength(lora, rank)) != 1:
            found[key] = weights[key] / factor if back else weights[key].float() * factor
    return found


def _selected(expression: str, linears: Sequence[str], *, setting: str) -> set[str]:
    try:
        pattern = re.compile(PRESETS.get(expression) or _ranges(expression))
    except re.error as error:
        raise UsageError(f"{setting}: {expression!r} is not a regular expression ({error})") from None
    found = {name for name in linears if pattern.fullmatch(name)}
    if not found:
        raise UsageError(
            f"{setting}: {expression!r} selects no Linear; names look like {linears[len(linears) // 2]}, and an "
            f"expression must cover the whole name (presets: {', '.join(PRESETS)})"
        )
    return found


def _ranges(expression: str) -> str:
    """An expression whose `blocks.[11-18]` are those blocks, all of each where nothing follows."""

    def numbers(found: re.Match[str]) -> str:
        first, last = int(found[1]), int(found[2])
        return rf"\.({'|'.join(map(str, range(first, last + 1)))})" if first <= last else found[0]

    whole = f"{expression}\\..*" if re.search(RANGE.pattern + "$", expression) else expression
    return RANGE.sub(numbers, whole)
