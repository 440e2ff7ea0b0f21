"""The loop of one worker: what is recorded of a step, and how it ends early."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from flux2_core.config.sections import Config
from flux2_core.errors import SetupError
from flux2_core.output import export
from flux2_core.run import checkpoint, metrics
from flux2_core.run.folder import RunFolder
from flux2_core.train.loop import Beside, run
from flux2_core.train.schedules import rate
from flux2_core.train.trainer import Trainer
from flux2_core.train.validate import Watch
from tests.in_process import fill_cache, process_group

Make = Callable[..., Config]


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    with process_group(tmp_path):
        yield


def test_what_a_step_records(make_config: Make) -> None:
    """Every step has loss raw and smoothed, rate, gradient norm, times, data wait, peak memory, time left, and the
    part of the loss that preserves; the listener gets what the file gets, and of how many."""
    config = make_config(train={"steps": 5, "preservation": "blank"})
    fill_cache(config)
    heard: list[dict[str, Any]] = []
    assert run(Trainer(config), heard.append)
    written = metrics.read(RunFolder(config).metrics)
    assert [record | {"of": 5} for record in written] == heard
    fields = (
        "step loss smoothed preservation learning_rate grad_norm epoch seconds images_per_second data_wait eta peak_gb"
    )
    assert all(set(record) == set(fields.split()) for record in written)
    smoothed = None
    for record in written:
        smoothed = record["loss"] if smoothed is None else 0.95 * smoothed + 0.05 * record["loss"]
        assert record["smoothed"] == pytest.approx(smoothed, rel=1e-12)
        assert 0 <= record["data_wait"] <= 1
        assert record["peak_gb"] > 0.05
    assert written[-1]["eta"] == 0 < written[0]["eta"]


def test_what_is_to_come_counts_previews_and_saves(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that is left has the looks and the saves that are still to come, each as long as the last one; what is
    done between steps is told as it happens."""
    config = make_config(
        train={"steps": 6}, validate={"every": 2, "prompts": ["a", "b"]}, output={"save_every": 4, "keep": 9}
    )
    fill_cache(config)
    phases: list[str] = []

    @contextmanager
    def timed(beside: Beside, what: str) -> Iterator[None]:
        yield
        beside.took_s[what] = 1000.0

    monkeypatch.setattr(Beside, "timed", timed)
    assert run(Trainer(config), lambda _record: None, on_phase=phases.append)
    left = [record["eta"] for record in metrics.read(RunFolder(config).metrics)]
    assert [round(seconds / 1000) for seconds in left] == [3, 2, 2, 1, 2, 0]  # the first save is not known before
    looked = [f"drawing previews at step {step}: {turn} of 2" for step in (0, 2, 4, 6) for turn in (1, 2)]
    assert phases == [*looked[:4], "saving", *looked[4:6], "saving", *looked[6:]]


def test_fillers_are_told_once(make_config: Make) -> None:
    """Where workers compute fillers, the first step's record warns of it, as every start's first one; the end tells
    it again, and the report shows it."""
    config = make_config(train={"steps": 4, "batch_size": 2}, validate={"every": 0})
    model = fill_cache(config)
    trainer = Trainer(config)
    trainer.world = 3
    assert run(trainer, lambda record: None)
    first, *others = metrics.read(RunFolder(config).metrics)
    assert "costs 1 of 3 GPUs" in first["warning"]
    assert not [record for record in others if "warning" in record]
    assert export.export(config, model, resumed_from=0)["warnings"] == [first["warning"]]
    assert "costs 1 of 3 GPUs" in (RunFolder(config).path / "report.html").read_text()


def test_each_step_has_its_rate_and_its_norm(make_config: Make) -> None:
    """Step n is taken at the schedule's rate for n, with a gradient scaled down to `train.max_grad_norm`; both are
    recorded, the norm as it was."""
    config = make_config(train={"steps": 5, "warmup_steps": 2, "schedule": "cosine", "max_grad_norm": 1e-3})
    fill_cache(config)
    trainer, taken = Trainer(config), []
    step = trainer.optimizer.step

    def noted() -> None:
        gradients = [parameter.grad.norm() for parameter in trainer.adapter.values()]
        taken.append((trainer.optimizer.param_groups[0]["lr"], float(torch.stack(gradients).norm())))
        step()

    trainer.optimizer.step = noted
    assert run(trainer, lambda record: None)
    records = metrics.read(RunFolder(config).metrics)
    wanted = [rate(config.train, step) for step in range(5)]
    assert [lr for lr, _ in taken] == wanted == [record["learning_rate"] for record in records]
    assert wanted[0] < wanted[1] > wanted[4]
    assert [norm for _, norm in taken] == pytest.approx([1e-3] * 5, rel=1e-3)
    assert all(record["grad_norm"] > 2e-3 for record in records)


def test_a_gpu_copies_from_pinned_memory(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU every tensor of a batch is pinned by the thread that read it; for a CPU none is."""
    config = make_config(train={"steps": 1, "preservation": "blank"})
    fill_cache(config)
    data = Trainer(config).data
    pinned: list[torch.Tensor] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    next(data.batches(0, 1, rank=0, world=1))
    assert not pinned
    batch, _ = next(data.batches(0, 1, rank=0, world=1, pinned=True))
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)] + [*batch.references_RBchw]
    tensors += batch.carried["blank"].values()
    assert {id(tensor) for tensor in tensors} == {id(tensor) for tensor in pinned}
    assert len(tensors) >= 7


def test_a_notice_ends_the_run_after_its_step(make_config: Make) -> None:
    """Told during step 3 that the machine goes: the loop ends with a checkpoint of step 3, which was not due, and the
    next start goes on with step 4."""
    config = make_config(train={"steps": 6})
    fill_cache(config)
    asked = iter([False, False, True])
    assert not run(Trainer(config), lambda record: None, noticed=lambda: next(asked))
    last = checkpoint.newest(RunFolder(config).checkpoints)
    assert last is not None
    assert last.step == 3
    assert run(Trainer(config), lambda record: None)
    assert [record["step"] for record in metrics.read(RunFolder(config).metrics)] == [1, 2, 3, 4, 5, 6]


def test_full_memory_names_the_way_out(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of GPU memory is one error of the environment, with the step and a setting that needs less."""
    config = make_config()
    fill_cache(config)

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has ...")

    monkeypatch.setattr(Trainer, "terms", full)
    with pytest.raises(
        SetupError, match=r"step 1: the GPU's memory is full \(CUDA out of memory\); .*(train|cluster|lora)\."
    ):
        run(Trainer(config), lambda record: None)
    monkeypatch.setattr(Watch, "look", full)
    config = make_config(run="looked-at", validate={"every": 2})
    with pytest.raises(
        SetupError,
        match=r"previews and validation at step 0: the GPU's memory is full \(CUDA out of memory\); "
        r".*(train|cluster|lora)\..*; or draw smaller previews \(validate\.size\)",
    ):
        run(Trainer(config), lambda record: None)
