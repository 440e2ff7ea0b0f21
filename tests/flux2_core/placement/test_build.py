"""Every layout of the base trains the same: several real processes against one."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from optimum.quanto import qint8
from optimum.quanto.tensor.weights.qbytes import WeightQBytesTensor
from safetensors.torch import load_file

from flux2_core import accelerator
from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.errors import UsageError
from flux2_core.model import quanto, transformer
from flux2_core.model.folder import resolve
from flux2_core.placement import build, planner
from flux2_core.placement.planner import Placement
from flux2_core.train.trainer import Trainer
from tests.flux2_core import sharded_process
from tests.flux2_core.jobs import CARD_24, H100, H200, asked, described, limit
from tests.in_process import fill_cache, in_ranks, process_group

Make = Callable[..., Config]
CPU = torch.device("cpu")


def placed(make: Make, world: int, strategy: str, precision: str, **train: Any) -> Config:
    return make(
        train={"batch_size": 4, "precision": precision, **train}, cluster={"strategy": strategy, "workers": world}
    )


def compare(
    make: Make, folder: Path, cases: Iterable[tuple[str, str]], *, world: int, local: int, **train: Any
) -> list[dict]:
    """Run all cases in `world` processes, compare each with one process, return what they told of themselves."""
    fill_cache(make())
    trees = {
        f"{strategy}-{precision}": placed(make, world, strategy, precision, **train).model_dump(
            mode="json", by_alias=True
        )
        for strategy, precision in cases
    }
    in_ranks(world, sharded_process.place, trees, str(folder), local, folder=folder)
    told = []
    for case in trees:
        strategy, precision = case.split("-", 1)
        loss, wanted = sharded_process.gradients(Trainer(placed(make, 1, "ddp", precision)), 0, 1)
        for rank in range(world):
            told.append(json.loads((folder / f"{case}-{rank}.json").read_text()))
            found = load_file(folder / f"{case}-{rank}")
            # rounding to 8 bits turns a last bit (one picture a pass or four) into a step of its own grid
            most = 3e-3 if precision.endswith("matmul") else 1e-6
            assert told[-1]["loss"] == pytest.approx(loss, rel=most)
            assert told[-1]["sharded"] == (strategy in ("fsdp", "hsdp"))
            for name, gradient in wanted.items():
                assert (found[name] - gradient).abs().max() <= most * max(1.0, float(gradient.abs().max())), name
    return told


def whole_bytes(make: Make, precision: str) -> int:
    payloads = Trainer(placed(make, 1, "ddp", precision)).transformer.named_parameters()
    return sum(value.nbytes for name, value in payloads if name.endswith("payload"))


@pytest.mark.slow
def test_two_processes_equal_one(make_config: Make, tmp_path: Path) -> None:
    """Sharded, replicated and streamed, exact and in few bits: loss and gradients of one process within 1e-6; the
    few bits are what a process holds (half of them) and what is gathered."""
    cases = [("fsdp", "fp32"), ("ddp", "fp32"), ("stream", "int8"), ("fsdp", "int8-matmul"), ("fsdp", "int4")]
    told = compare(make_config, tmp_path, cases, world=2, local=2)
    for first, second, dtype, precision in ((6, 7, "int8", "int8-matmul"), (8, 9, "uint8", "int4")):
        assert told[first]["gathered"] == [f"Tensor torch.{dtype}"]
        assert told[first]["bytes"] + told[second]["bytes"] == whole_bytes(make_config, precision)
        assert told[first]["bytes"] <= 0.51 * whole_bytes(make_config, precision)


@pytest.mark.slow
@pytest.mark.all_cases
@pytest.mark.parametrize(
    ("world", "strategies", "precisions"),
    [
        (2, ("fsdp", "ddp", "stream"), ("fp32", "int8", "int4", "nf4", "fp8", "int8-matmul", "fp8-matmul")),
        (4, ("hsdp",), ("fp32", "int4", "fp8-matmul")),
    ],
)
def test_every_layout_equals_one_process(
    make_config: Make, tmp_path: Path, world: int, strategies: tuple[str, ...], precisions: tuple[str, ...]
) -> None:
    """Each strategy with each precision, in two processes; replicated shards in four processes of two nodes."""
    told = compare(make_config, tmp_path, [(s, p) for s in strategies for p in precisions], world=world, local=2)
    assert len(told) == world * len(strategies) * len(precisions)


@pytest.mark.slow
@pytest.mark.all_cases
@pytest.mark.parametrize("recompute", ["none", "selective", "full", 2])
def test_compiled_layouts_equal_one_process(make_config: Make, tmp_path: Path, recompute: str | int) -> None:
    """Compiled block by block, two processes train as one that is not compiled, whatever is computed again."""
    cases = [(s, p) for s in ("fsdp", "ddp") for p in ("fp32", "int8", "fp8-matmul")]
    told = compare(make_config, tmp_path, cases, world=2, local=2, compile=True, recompute=recompute)
    assert len(told) == 2 * len(cases)


def test_quanto_weights_do_not_reach_fsdp(tiny_model: Path, tmp_path: Path) -> None:
    """FSDP2 would widen them in silence: refused, with what to set."""
    built = transformer.build(resolve_model(tiny_model), dtype=torch.float32)
    weight = torch.randn(32, 32)
    data, scale, _ = quanto.quantize(weight, "int8")
    foreign = WeightQBytesTensor.create(qint8, 0, weight.shape, weight.stride(), data, scale, None)
    built.proj_out.weight = torch.nn.Parameter(foreign, requires_grad=False)
    with process_group(tmp_path), pytest.raises(UsageError, match=r"proj_out.weight is a Weight.*train.precision"):
        transformer.shard(built, FakeMesh())


class FakeMesh:
    """A mesh of two, of which only the size is asked before the refusal."""

    def size(self) -> int:
        return 2


def resolve_model(path: Path) -> Any:
    from flux2_core.config.sections import Model

    return resolve(Model(path=str(path)), parts=("transformer",))


@pytest.mark.parametrize(
    ("local", "world", "grid"),
    [(1, 1, False), (1, 2, False), (2, 3, False), (8, 12, False), (8, 8, True), (2, 4, True)],
)
@pytest.mark.parametrize("memory", [None, H200])
def test_hsdp_needs_a_grid(local: int, world: int, grid: bool, memory: float | None) -> None:
    """Asked for, it is refused for one worker a node and for nodes of different sizes, with what to take instead; not
    asked for, such nodes are sharded over all workers."""
    job, card = asked(workers=world, local=local, cluster={"strategy": "hsdp"}), memory and limit(memory)
    if grid:
        assert planner.decide(job, card).strategy == "hsdp"
        return
    with pytest.raises(UsageError, match=rf"{world} workers .* do not make such a grid; use \"auto\", or as many"):
        planner.decide(job, card)
    free = asked(workers=world, local=local, train={"recompute": "full"})
    assert {p.strategy for p in planner.candidates(free, limit(H200))} == {"ddp", "stream", *(["fsdp"] * (world > 1))}


def uneven(rank: int, world: int, out: str, tree: dict[str, Any]) -> None:
    """One process of a node with two of them, or of a node that has one."""
    os.environ["LOCAL_WORLD_SIZE"] = "2" if rank < 2 else "1"
    accelerator.is_gpu = lambda _device: True  # type: ignore[assignment]
    accelerator.free_bytes = lambda _device: int(H100 * 2**30)  # type: ignore[assignment]
    job = build.job(parse(tree), described("dev"), world=world, device=CPU)
    chosen = build.decide(job, CPU)
    build.planner.decide = lambda *_: Placement(f"by worker {rank}", "bf16", "full")
    Path(f"{out}/{rank}").write_text(f"{job.local} {job.grid} {chosen.strategy} {build.decide(job, CPU).strategy}")


def test_workers_of_uneven_nodes_agree(tmp_path: Path) -> None:
    """Two workers in one node and one in another count their nodes' workers differently; all take what the first one
    decides, and none of them a grid that is not there."""
    tree = asked(workers=3, cluster={"strategy": "auto"}).config.model_dump(mode="json", by_alias=True)
    in_ranks(3, uneven, str(tmp_path), tree, folder=tmp_path)
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == ["2 False fsdp by worker 0"] * 3


def decided(rank: int, _world: int, out: str) -> None:
    """One process of two whose cards differ, and one of two whose nodes differ."""
    accelerator.is_gpu = lambda _device: True  # type: ignore[assignment]
    accelerator.free_bytes = lambda _device: int((CARD_24, H100)[rank] * 2**30)  # type: ignore[assignment]
    streamed = replace(asked(workers=2, cluster={"strategy": "stream"}), host=(200e9, 100e9)[rank])
    Path(f"{out}/{rank}").write_text("\n".join(str(build.decide(job, CPU)) for job in (asked(workers=2), streamed)))


def test_the_smallest_decides_for_all(tmp_path: Path) -> None:
    """Workers with cards of different sizes choose one placement, that of the smallest; so do those whose nodes have
    unlike host memory: blocks in bf16 would fit one of the two."""
    in_ranks(2, decided, str(tmp_path), folder=tmp_path)
    first, second = [(tmp_path / str(rank)).read_text().splitlines() for rank in range(2)]
    wanted = str(planner.decide(asked(workers=2), limit(CARD_24)))
    assert first == second
    assert first[0] == wanted != str(planner.decide(asked(workers=2), limit(H100)))
    assert "strategy='stream', precision='int8'" in first[1]


def test_the_model_is_told_the_sigma_that_was_used(make_config: Make, tmp_path: Path) -> None:
    """Under bf16 autocast the time that reaches the embedding is sigma * 1000 in fp32, every bit; bf16 would be off."""
    config = make_config(train={"precision": "bf16", "batch_size": 4})
    fill_cache(config)
    with process_group(tmp_path):
        trainer = Trainer(config)
    batch = trainer.data.batch(0)
    told: list[torch.Tensor] = []
    trainer.transformer.time_guidance_embed.register_forward_pre_hook(lambda _, args: told.append(args[0]))
    [_] = trainer.terms(batch)
    assert trainer.precision == torch.bfloat16
    assert told[0].dtype == torch.float32
    assert torch.equal(told[0], batch.sigma_B * 1000)
    assert not torch.equal(batch.sigma_B.bfloat16().float(), batch.sigma_B)
