"""What the backward pass computes again, block by block, and compiling a block: memory against time.

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

from flux2_core.model.frozen_linear import OPERATOR
from flux2_core.model.transformer import blocks
from flux2_core.placement.planner import policies

SAVED, AGAIN = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
GRAPHS = 64  # of one function: kinds of layer, batches of one, with and without gradients; torch allows 8, then fails
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_fused_attention_overrideable.default,  # of all other makes
}


def apply(transformer: Any, recompute: str | int, *, rank: int, compiler: str | None = None) -> None:
    """Put a policy, and a compiler (`inductor`) where one is named, on every block; `rank` is the adapter's."""
    if compiler:
        import torch._dynamo  # 2 s, for nothing where no block is compiled

        torch._dynamo.config.recompile_limit = GRAPHS
    every = blocks(transformer)
    for block, policy in zip(every, policies(recompute, len(every)), strict=True):
        if policy != "none" or compiler:
            block.forward = functools.partial(_forward(type(block).forward, policy, rank, compiler), block)


@functools.cache  # blocks that run the same function share one compiled graph
def _forward(forward: Callable[..., Any], policy: str, rank: int, compiler: str | None) -> Callable[..., Any]:
    if policy != "none":
        forward = again(forward, policy, rank=rank)
    return torch.compile(forward, backend=compiler, fullgraph=True) if compiler else forward


def again(forward: Callable[..., Any], policy: str, *, rank: int = 0) -> Callable[..., Any]:
    """The same function, computed again (`full`, `selective`) in the backward pass."""
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if policy == "selective":
        choose = functools.partial(_choose, rank)
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, choose)

    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **settings, **kwargs)

    return checkpointed


def _choose(rank: int, context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the outputs of attention and of the wide matmuls.

    A matmul of inner size K to N columns is kept where rank < K <= N. Products with the adapter are thin. A matmul that
    narrows (K > N) ends a feed-forward, and its output goes into the residual sum, which no gradient reads.
    """
    if operator in ATTENTION:
        return SAVED
    if operator in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):  # bmm: of a slice of the joint attention
        inner, columns = args[1].shape[-2:]
    elif operator == OPERATOR:
        columns, inner = args[1].shape[0], args[0].shape[-1]
    else:
        return AGAIN
    return SAVED if rank < inner <= columns else AGAIN
