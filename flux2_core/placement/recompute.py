"""What the backward pass computes again, block by block: memory against time.

`none` keeps every activation that autograd asks for. `selective` keeps what is dear: the outputs of matmuls and of
attention; norms, gates, rotations and the adapter's thin products are computed again. `full` keeps a block's input
alone. A number k means: the first k blocks `full`, the others `selective`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from flux2_core.lora import layer
from flux2_core.lora.told import Told
from flux2_core.model import frozen_linear
from flux2_core.model.transformer import blocks
from flux2_core.placement.compiled import Compiled
from flux2_core.placement.planner import policies

OPERATORS = {frozen_linear.OPERATOR, layer.OPERATOR}
SAVED, AGAIN = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,  # of all other makes
}


def apply(
    transformer: Any, recompute: str | int, *, rank: int, compiler: Compiled | None = None, told: Told | None = None
) -> None:
    """Put a policy, and a compiler where there is one, on every block; `rank` and `told` are the adapter's."""
    every = blocks(transformer)
    for block, policy in zip(every, policies(recompute, len(every)), strict=True):
        if policy != "none" or compiler:
            forward = _forward(type(block).forward, policy, rank, told)
            block.forward = functools.partial(compiler.block(forward) if compiler else forward, block)


@functools.cache  # one function for all blocks of a kind: the compiler knows them by it
def _forward(forward: Callable[..., Any], policy: str, rank: int, told: Told | None) -> Callable[..., Any]:
    return forward if policy == "none" else again(forward, policy, rank=rank, told=told)


def again(forward: Callable[..., Any], policy: str, *, rank: int = 0, told: Told | None = None) -> Callable[..., Any]:
    """The same function, computed again (`full`, `selective`) in the backward pass, its adapter told the same again."""
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if policy == "selective":
        choose = functools.partial(_choose, rank)
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, choose)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # What a compiled block is told is an input of its graph, and is kept with the others.
        same = forward if told is None or torch.compiler.is_compiling() else told.again(forward)
        return checkpoint(same, *args, **settings, **kwargs)

    return checkpointed


def _choose(rank: int, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the outputs of attention and of all matmuls but the adapter's thin ones.

    A matmul of inner size K to N columns is kept where rank < K and rank < N. The one that ends a feed-forward or a
    block feeds a residual sum, whose gradient does not read it; but a block is computed again as a whole, so that it
    would be multiplied again, for nothing: 12 to 16 % of a step, or 3.2 GB (FLUX.2-dev, 1024 px) to keep it.
    """
    if operator in ATTENTION:
        return SAVED
    if operator in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):  # bmm: of a slice of the joint attention
        inner, columns = args[1].shape[-2:]
    elif operator in OPERATORS:
        columns, inner = args[1].shape[0], args[0].shape[-1]
    else:
        return AGAIN
    return SAVED if rank < min(inner, columns) else AGAIN
