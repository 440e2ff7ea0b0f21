"""Streaming: whose weights both passes read, when each block's travel, and where they lie meanwhile."""

import functools
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flux2_core import accelerator
from flux2_core.accelerator import CPU
from flux2_core.model import transformer
from flux2_core.placement import recompute
from flux2_core.placement.compiled import Compiled
from flux2_core.placement.stream import APART, Stream
from tests.flux2_core.placement.test_recompute import adapted, gradients, predicted


def poisoned(stream: Stream) -> None:
    """Overwrite all host memory for good (NaN as fp32, bf16, fp8 and in every scale): what travels is a copy of it."""
    whole = {block.memory.data_ptr(): block.memory.clone() for block in stream.blocks}
    bring = stream.lane.bring
    stream.lane.bring = lambda home, there: bring(whole[home.data_ptr()], there)  # type: ignore[method-assign]
    for block in stream.blocks:
        block.memory.fill_(255)


@pytest.mark.parametrize(
    ("precision", "compiler"),
    [
        *((precision, None) for precision in ("fp32", "bf16", "int8", "int4", "nf4", "fp8")),
        pytest.param("int4", "aot_eager", marks=pytest.mark.slow),
        *(
            pytest.param(p, "aot_eager", marks=pytest.mark.all_cases)
            for p in ("fp32", "bf16", "int8", "fp8", "fp8-matmul")
        ),
        *(pytest.param(p, "inductor", marks=pytest.mark.all_cases) for p in ("fp32", "int4")),
    ],
)
def test_no_pass_reads_host_memory(tiny_model: Path, precision: str, compiler: str | None) -> None:
    """With NaN on the host wherever a block's weights are not just travelling, the gradients of two steps are the bits
    of a model that is not streamed: what autograd keeps, compiled or not, lies on the card until it has been used."""
    torch._dynamo.reset()
    found = []
    for streamed in (False, True):
        built = adapted(tiny_model, precision)
        recompute.apply(built, "none", rank=4, compiler=compiler and Compiled(compiler))
        if streamed:
            poisoned(Stream(transformer.blocks(built), CPU))
        found.append(gradients(built))
    found.append(gradients(built))
    wanted = found[0]
    assert all(gradient.isfinite().all() and gradient.any() for gradient in wanted.values())
    assert all(torch.equal(other[name], wanted[name]) for other in found[1:] for name in wanted)


class Pretended:
    """A stream that writes down what it is asked, and of all that is in the log what has surely happened before."""

    def __init__(self, log: list[Any]) -> None:
        self.log, self.past = log, frozenset[int]()

    def does(self, *what: Any) -> None:
        self.log.append((what, self.past))
        self.past |= {len(self.log) - 1}

    def wait_stream(self, other: "Pretended") -> None:
        self.past |= other.past

    def wait_event(self, event: frozenset[int]) -> None:
        self.past |= event

    def record_event(self) -> frozenset[int]:
        return self.past

    def __enter__(self) -> None:
        self.does("bring", *self.next)

    def __exit__(self, *_: object) -> None: ...


class Entry(torch.autograd.Function):
    """What goes into a block, unchanged: the first that is done in it, and the last that its backward pass does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, left: Callable[[], None]) -> torch.Tensor:
        ctx.left = left
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.left()
        return dy, None


def watched(computes: Pretended, place: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    computes.does("run", place)
    left = functools.partial(computes.does, "differentiated", place)
    return forward(*args, **kwargs | {"hidden_states": Entry.apply(kwargs["hidden_states"], left)})


def pretended_card(model: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[Any]]:
    """A streamed model on a card that is this CPU; the log is in the order of the host, which may run far ahead."""
    log: list[Any] = []
    computes, copies = Pretended(log), Pretended(log)
    monkeypatch.setattr(accelerator, "is_gpu", lambda _device: True)
    monkeypatch.setattr(torch, "Stream", lambda _device: copies)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda _device: computes)
    built = adapted(model, "fp32")
    for place, block in enumerate(transformer.blocks(built)):
        block.forward = functools.partial(watched, computes, place, block.forward)
    stream = Stream(transformer.blocks(built), CPU)
    homes = [block.memory.data_ptr() for block in stream.blocks]
    buffers = [buffer.data_ptr() for buffer in stream.buffers]
    bring = stream.lane.bring

    def brought(home: torch.Tensor, there: torch.Tensor) -> Any:
        copies.next = homes.index(home.data_ptr()), buffers.index(there.data_ptr())
        return bring(home, there)

    stream.lane.bring = brought  # type: ignore[method-assign]
    return built, log


def test_two_buffers_take_turns(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block's weights set out for the buffer that is not computed with, just before the block ahead of it runs;
    both passes turn round without a copy, since the last two blocks, and in the end the first two, are still there.
    No block runs before its weights have arrived, and no copy begins before the last block that lay in its buffer has
    run, or has been differentiated, however far the host runs ahead."""
    built, log = pretended_card(tiny_model, monkeypatch)
    gradients(built)
    gradients(built)
    first = [("bring", 0, 1), ("bring", 1, 0)]
    step = [
        ("run", 0), ("bring", 2, 1), ("run", 1), ("bring", 3, 0), ("run", 2), ("run", 3),
        ("run", 3), ("differentiated", 3), ("bring", 1, 0), ("run", 2), ("differentiated", 2), ("bring", 0, 1),
        ("run", 1), ("differentiated", 1), ("run", 0),
    ]  # fmt: skip
    assert [what for what, _ in log] == [*first, *step, *step]
    there: dict[int, tuple[int, int]] = {}  # of each block: its buffer, and when it was brought
    used: tuple[set[int], ...] = set(), set()  # when each buffer was computed with
    for now, ((what, block, *into), before) in enumerate(log):
        if what == "bring":
            assert used[into[0]] <= before
            there = {other: place for other, place in there.items() if place[0] != into[0]} | {block: (into[0], now)}
        else:
            buffer, brought = there[block]
            assert brought in before
            used[buffer].add(now)


def test_drawing_goes_round(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients a pass is followed by another one: while the last block runs, the first one's weights set out,
    and no block is brought that nobody asks for. Training goes on from there as ever."""
    built, log = pretended_card(tiny_model, monkeypatch)
    for _ in range(2):
        with torch.no_grad():
            predicted(built)
    brought = [what[1] for what, _ in log if what[0] == "bring"]
    assert brought == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    gradients(built)
    assert [what[1] for what, _ in log if what[0] == "bring"] == [*brought, 1, 2, 3, 1, 0]


def test_the_host_holds_each_weight_once(tiny_model: Path) -> None:
    """A block waits in one piece of memory of just its size, with parameters that begin at multiples of 256 bytes; what
    was read from the files is let go, and away from the card the module shows the weights at home, every bit."""
    built = adapted(tiny_model, "int4")
    frozen = {n: p for n, p in built.named_parameters() if "transformer_blocks." in n and not p.requires_grad}
    wanted, read = {n: p.clone() for n, p in frozen.items()}, [weakref.ref(p) for p in frozen.values()]
    del frozen
    stream = Stream(transformer.blocks(built), CPU)
    assert not any(parameter() is not None for parameter in read)
    gradients(built)
    found = dict(built.named_parameters())
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())
    pieces = {block.memory.data_ptr(): block.memory for block in stream.blocks}
    held = dict.fromkeys(pieces, 0)
    for name in wanted:
        start = found[name].untyped_storage().data_ptr()
        assert (found[name].data_ptr() - start) % APART == 0
        held[start] += -(-found[name].nbytes // APART) * APART
    assert held == {start: piece.nbytes for start, piece in pieces.items()}
