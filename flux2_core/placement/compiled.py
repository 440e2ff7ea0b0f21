"""Compiled blocks: a graph for each kind of block and way to use it, whatever the tokens; eager where a compiler fails.

Blocks of a kind share their graphs: one without gradients (previews, validation), one or two with them (what enters the
first block has none), one with adapters switched off. The number of tokens is a symbol from the first graph on: a
bucket or a preview of another size compiles nothing. Of a batch, one picture and several are two graphs each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from flux2_core import accelerator
from flux2_core.config.sections import Train
from flux2_core.errors import SetupError

BACKEND = "inductor"
PAYS = 500  # steps: a minute or two of compiling against half a second saved in each
GRAPHS = 64  # of one function; torch allows 8, then fails
Forward = Callable[..., Any]


class Compiled:
    """The compiler of one model's blocks: how many graphs it has made, and why no more, if so."""

    def __init__(self, backend: str | Callable[..., Any] = "inductor", *, insists: bool = True) -> None:
        import torch._dynamo  # 2 s, for nothing where no block is compiled
        import torch._functorch.config

        torch._dynamo.config.recompile_limit = GRAPHS
        torch._functorch.config.force_non_lazy_backward_lowering = True  # what fails, fails before a block has run
        self.backend, self.insists = backend, insists
        self.failed = ""
        self.told, self.told_failed = self.made(), ""

    def made(self) -> int:
        """Graphs of this process so far."""
        return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])

    def block(self, forward: Forward) -> Forward:
        """A block's function, compiled when it is first called, and eager from the first failure on."""
        fast = _fast(forward, self.backend)
        failures = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)

        def run(*args: Any, **kwargs: Any) -> Any:
            if not self.failed:
                try:
                    _free_tokens(kwargs)
                    return fast(*args, **kwargs)
                except failures as error:
                    backend_failed = torch._dynamo.exc.BackendCompilerFailed
                    cause = error.inner_exception if isinstance(error, backend_failed) else error
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
        (before, self.told), (known, self.told_failed) = (self.told, self.made()), (self.told_failed, self.failed)
        news: dict[str, Any] = {"graphs": self.told - before} if self.told > before else {}
        if self.failed != known:
            news["warning"] = f"train.compile: the blocks are not compiled, which is slower ({self.failed})"
        return news


def of(train: Train, device: torch.device) -> Compiled | None:
    """The compiler that a run asks for; `auto`: of a GPU, where the steps pay for it."""
    if train.compile != "auto":
        return Compiled(BACKEND) if train.compile else None
    if not accelerator.is_gpu(device) or train.steps < PAYS:
        return None
    found = Compiled(BACKEND, insists=False)
    if not accelerator.has_triton(device):
        found.failed = "Triton is not installed, or this card is too old for it"
    return found


@functools.cache  # blocks that run the same function share its graphs
def _fast(forward: Forward, backend: str | Callable[..., Any]) -> Forward:
    return torch.compile(forward, backend=backend, fullgraph=True)


def _free_tokens(given: dict[str, Any]) -> None:
    """Have the number of tokens be a symbol at once; torch does so when it meets a second one, by a second graph."""
    for name in ("hidden_states", "encoder_hidden_states"):
        if given.get(name) is not None:
            torch._dynamo.maybe_mark_dynamic(given[name], 1)
    for part_SD in given["image_rotary_emb"]:
        torch._dynamo.maybe_mark_dynamic(part_SD, 0)
