"""Compiled blocks: a graph for each kind of block and way to use it, whatever the tokens; eager where a compiler fails.

Blocks of a kind share their graphs: without gradients, with them (two: what enters the first block has none), and with
adapters off; for one picture and for several. The number of tokens is a symbol from the first graph on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from flux2_core import accelerator
from flux2_core.config.sections import Train
from flux2_core.errors import SetupError

BACKEND: str | Callable[..., Any] = "inductor"
PAYS = 500  # steps: a minute or two of compiling against half a second saved in each


class Compiled:
    """The compiler of one model's blocks: how many graphs it has made, and why no more, if so."""

    def __init__(self, backend: str | Callable[..., Any], *, insists: bool = True, failed: str = "") -> None:
        import torch._dynamo  # 2 s, for nothing where no block is compiled
        import torch._functorch.config

        torch._dynamo.config.recompile_limit = 64  # graphs of one function; at 8 torch fails
        torch._functorch.config.force_non_lazy_backward_lowering = True  # what fails, fails before a block has run
        self.backend, self.insists, self.failed = backend, insists, failed
        self.told, self.told_failed = self._made(), ""

    def block(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's function, compiled when it is first called, and eager from the first failure on."""
        fast = _fast(forward, self.backend)
        failures = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)

        def run(*args: Any, **kwargs: Any) -> Any:
            if not self.failed:
                try:
                    _free_tokens(kwargs)
                    return fast(*args, **kwargs)
                except failures as error:
                    cause = getattr(error, "inner_exception", error)  # of the compiler behind torch's tracing
                    self.failed = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}"
                    if self.insists:
                        raise SetupError(
                            f"train.compile=true: the blocks cannot be compiled ({self.failed}); "
                            'set train.compile="auto", which goes on without, or false'
                        ) from error
            return forward(*args, **kwargs)

        return run

    def news(self) -> dict[str, Any]:
        """What a step's record says once: graphs made since the last one, and that there will be no more."""
        (before, self.told), (known, self.told_failed) = (self.told, self._made()), (self.told_failed, self.failed)
        news: dict[str, Any] = {"graphs": self.told - before} if self.told > before else {}
        if self.failed != known:
            news["warning"] = f"train.compile: the blocks are not compiled, which is slower ({self.failed})"
        return news

    def _made(self) -> int:
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def wanted(train: Train) -> bool:
    """Whether blocks are to be compiled on a card that can; `auto`: where the steps pay for it."""
    return train.steps >= PAYS if train.compile == "auto" else train.compile


def of(train: Train, device: torch.device) -> Compiled | None:
    """The compiler that a run asks for; `auto`: of a GPU, where the steps pay for it."""
    if train.compile != "auto":
        return Compiled(BACKEND) if train.compile else None
    if not accelerator.is_gpu(device) or not wanted(train):
        return None
    lacking = "" if accelerator.has_triton(device) else "Triton is not installed, or this card is too old for it"
    return Compiled(BACKEND, insists=False, failed=lacking)


@functools.cache  # blocks that run the same function share its graphs
def _fast(forward: Callable[..., Any], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(forward, backend=backend, fullgraph=True)


def _free_tokens(given: dict[str, Any]) -> None:
    """Have the number of tokens be a symbol at once; torch does so when it meets a second one, by a second graph."""
    streams = [given[name] for name in ("hidden_states", "encoder_hidden_states") if given.get(name) is not None]
    rotary = [(part, part.ndim - 2) for part in given["image_rotary_emb"]]  # rows by sample have one more, the samples
    for tensor, axis in ((streams[0], 1), (streams[-1], 1), *rotary):
        torch._dynamo.maybe_mark_dynamic(tensor, axis)
