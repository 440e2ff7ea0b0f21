"""Which Linears a LoRA sits on, and how strong its update is."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from flux2_core.config.sections import Lora
from flux2_core.errors import UsageError

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
KINDS: dict[str, Callable[[float, int], float]] = {  # of adapters: (alpha, rank) to the factor on B @ A
    "lora": lambda alpha, rank: alpha / rank,
    "rslora": lambda alpha, rank: alpha / math.sqrt(rank),
}


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
        try:
            pattern = re.compile(PRESETS.get(expression) or _ranges(expression))
        except re.error as error:
            raise UsageError(f"lora.targets: {expression!r} is not a regular expression ({error})") from None
        found = {name for name in linears if pattern.fullmatch(name)}
        if not found:
            raise UsageError(
                f"lora.targets: {expression!r} selects no Linear; names look like {linears[len(linears) // 2]}, and an "
                f"expression must cover the whole name (presets: {', '.join(PRESETS)})"
            )
        chosen |= found
    if outside := sorted(name for name in chosen if not re.match(BLOCK, name)):
        raise UsageError(
            f"lora.targets selects {outside[0]}: only Linears inside blocks can be adapted (cached rows may be behind "
            f"context_embedder); begin the expression with {BLOCK!r}, or use a preset: {', '.join(PRESETS)}"
        )
    return [name for name in linears if name in chosen]


def _ranges(expression: str) -> str:
    """An expression whose `blocks.[11-18]` are those blocks, all of each where nothing follows."""

    def numbers(found: re.Match[str]) -> str:
        first, last = int(found[1]), int(found[2])
        return rf"\.({'|'.join(map(str, range(first, last + 1)))})" if first <= last else found[0]

    whole = f"{expression}\\..*" if re.search(RANGE.pattern + "$", expression) else expression
    return RANGE.sub(numbers, whole)


def scale(lora: Lora) -> float:
    """Factor on B @ A, by the adapter's kind."""
    return KINDS[lora.kind](lora.rank if lora.alpha is None else lora.alpha, lora.rank)
