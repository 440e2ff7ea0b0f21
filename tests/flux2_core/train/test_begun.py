"""What a run goes on with: the precision of its start, whatever a card would hold now."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flux2_core.config.sections import Config
from flux2_core.errors import UsageError
from flux2_core.model.frozen_linear import FrozenLinear
from flux2_core.placement import build
from flux2_core.placement.planner import Placement
from flux2_core.run import checkpoint, metrics
from flux2_core.run.folder import RunFolder
from flux2_core.train.loop import run
from flux2_core.train.trainer import Trainer
from tests.in_process import fill_cache, process_group

Make = Callable[..., Config]
ROUNDED = Placement("ddp", "int8", 2)


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    with process_group(tmp_path):
        yield


def end(config: Config) -> checkpoint.Checkpoint:
    found = checkpoint.newest(RunFolder(config).checkpoints)
    assert found is not None
    return found


def begun(config: Config, monkeypatch: pytest.MonkeyPatch, *, steps: int = 2) -> None:
    """A run that was stopped after some steps, on a card that held the base only in 8 bits."""
    with monkeypatch.context() as patch:
        patch.setattr(build, "decide", lambda *_: ROUNDED)
        trainer = Trainer(config)
        for step in range(steps):
            trainer.train_step(trainer.data.batch(step))
        trainer.save()


def test_a_run_keeps_its_precision(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` was int8 on a card that was nearly full; where all of it is free, and fp32 would be chosen now, the run
    goes on in int8, and ends with the bits of one that nothing stopped; strategy and recomputing are planned anew."""
    config = make_config(train={"steps": 4}, validate={"every": 0})
    fill_cache(config)
    begun(config, monkeypatch)
    assert end(config).facts["placement"] == {
        "strategy": "ddp", "precision": "int8", "recompute": 2, "computed": "float32",
    }  # fmt: skip
    trainer = Trainer(config)
    assert any(isinstance(module, FrozenLinear) for module in trainer.transformer.modules())
    assert trainer.placement == Placement("ddp", "int8", "none")
    assert run(trainer, lambda _record: None)
    straight = make_config(run="straight", train={"steps": 4, "precision": "int8"}, validate={"every": 0})
    assert run(Trainer(straight), lambda _record: None)
    assert all(torch.equal(weight, end(straight).adapter[name]) for name, weight in end(config).adapter.items())
    assert not any("warning" in record for record in metrics.read(RunFolder(config).metrics))
    fresh = make_config(run="fresh", train={"steps": 4}, validate={"every": 0})
    assert Trainer(fresh).placement.precision == "fp32", "what it would have been without its past"


def test_a_precision_that_no_longer_fits(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the run's precision does not fit any more, it says so, and why no smaller one is taken; one that the
    configuration names is told as ever."""
    config = make_config(train={"steps": 4})
    fill_cache(config)
    begun(config, monkeypatch)

    def full(*_given: Any) -> Any:
        raise UsageError("no placement fits 1.0 GB")

    monkeypatch.setattr(build, "decide", full)
    words = (
        r'run test began with train.precision="int8", .* from step 2 on, .*; here no placement fits 1.0 GB; or go on'
    )
    with pytest.raises(UsageError, match=words) as told:
        Trainer(config)
    assert "run=NAME" in str(told.value)
    with pytest.raises(UsageError, match=r"^no placement fits 1.0 GB$"):
        Trainer(make_config(train={"steps": 4, "precision": "int4"}))


def test_another_device_multiplies_otherwise(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few-bit base that was multiplied in bf16 on a card goes on in fp32 on a CPU, and the next step's record says
    so; a checkpoint of before, which knows of no placement, goes on as the card decides."""
    config = make_config(train={"steps": 4}, validate={"every": 0})
    fill_cache(config)
    begun(config, monkeypatch)
    last = end(config)
    there = last.facts | {"placement": last.facts["placement"] | {"computed": "bfloat16"}}
    checkpoint.write(RunFolder(config).checkpoints, replace(last, facts=there), keep=3)
    assert run(Trainer(config), lambda _record: None)
    first, second = metrics.read(RunFolder(config).metrics)
    assert "up to step 2 the base was multiplied in bfloat16, on this device it is in float32" in first["warning"]
    assert "warning" not in second
    older = {name: fact for name, fact in last.facts.items() if name != "placement"}
    checkpoint.write(RunFolder(config).checkpoints, replace(last, facts=older), keep=3)
    assert (resumed := Trainer(config)).placement.precision == "fp32"
    assert (resumed.step, resumed.notes) == (2, [])
