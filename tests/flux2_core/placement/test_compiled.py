"""Compiled blocks: how many graphs there are, when a run compiles, and how it goes on where the compiler fails."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd

from flux2_core import accelerator
from flux2_core.accelerator import CPU
from flux2_core.config.sections import Config, Train
from flux2_core.errors import SetupError
from flux2_core.lora import adapter
from flux2_core.model.latents import image_ids, text_ids
from flux2_core.placement import compiled, recompute
from flux2_core.placement.compiled import Compiled
from flux2_core.run import metrics
from flux2_core.run.folder import RunFolder
from flux2_core.train.loop import run
from flux2_core.train.trainer import Trainer
from tests.flux2_core.placement.test_recompute import adapted, gradients
from tests.in_process import fill_cache, process_group


def compiled_blocks(model: Path, backend: Any, *, insists: bool) -> tuple[Any, Compiled]:
    torch._dynamo.reset()
    built, compiler = adapted(model, "fp32"), Compiled(backend, insists=insists)
    recompute.apply(built, "none", rank=4, compiler=compiler)
    return built, compiler


def looked(built: Any, pictures: int, height: int) -> None:
    """Pictures of a size, without gradients."""
    built.eval()
    with torch.no_grad():
        built(
            hidden_states=torch.randn(pictures, height * 4, 128), encoder_hidden_states=torch.randn(pictures, 8, 96),
            timestep=torch.full((pictures,), 0.5), img_ids=image_ids(height, 4), txt_ids=text_ids(8),
            guidance=torch.ones(pictures), return_dict=False,
        )  # fmt: skip
    built.train()


def test_other_sizes_compile_nothing(tiny_model: Path) -> None:
    """Preview, validation, step, and the base beside it make the graphs; the same at another size make no more."""
    built, compiler = compiled_blocks(tiny_model, "eager", insists=True)
    made = []
    for height in (4, 6):
        for pictures in (1, 4):
            looked(built, pictures, height)
        gradients(built, height)
        with adapter.switched_off(built):
            looked(built, 1, height)
        made.append(compiler.news().get("graphs", 0))
    assert made == [9, 0]


def broken(_graph: Any, _given: Any) -> Any:
    raise RuntimeError("no compiler here\nand more")


@pytest.mark.parametrize("backend", [broken, aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=broken)])
def test_a_compiler_that_fails_loses_no_run(tiny_model: Path, backend: Any) -> None:
    """Whichever pass it cannot compile, the gradients are an eager model's, every bit, and it is told once with the
    reason; where compiling was insisted on, it is refused with what to set."""
    wanted = gradients(adapted(tiny_model, "fp32"))
    built, compiler = compiled_blocks(tiny_model, backend, insists=False)
    for told in (True, False):
        found = gradients(built)
        assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
        assert ("no compiler here)" in compiler.news().get("warning", "")) == told
    built, _ = compiled_blocks(tiny_model, backend, insists=True)
    with pytest.raises(SetupError, match=r'no compiler here\); set train.compile="auto", which goes on without'):
        gradients(built)


@pytest.mark.parametrize(
    ("given", "gpu", "triton", "wanted"),
    [
        ({}, False, False, None),
        ({"compile": True, "steps": 1}, False, False, ""),
        ({"steps": 499}, True, True, None),
        ({"steps": 500}, True, True, ""),
        ({"steps": 500, "compile": False}, True, True, None),
        ({"steps": 500}, True, False, "Triton is not installed"),
    ],
)
def test_when_a_run_compiles(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], gpu: bool, triton: bool, wanted: str | None
) -> None:
    """Unless told otherwise on a GPU, from 500 steps on, where Triton is; a lack of it is told. Never on a CPU, whose
    bits stay what they are."""
    monkeypatch.setattr(accelerator, "is_gpu", lambda _device: gpu)
    monkeypatch.setattr(accelerator, "has_triton", lambda _device: triton)
    found = compiled.of(Train(**given), CPU)
    assert (found is None) == (wanted is None)
    assert found is None or found.failed.startswith(wanted or "")
    assert found is None or bool(found.failed) == bool(wanted)


def test_triton_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is there where a package of its name is and the card is one of 2017 or later."""
    monkeypatch.setattr(accelerator.importlib.util, "find_spec", lambda name: name if name == "triton" else None)
    for capability, there in (((9, 0), True), ((6, 1), False), (None, False)):
        monkeypatch.setattr(accelerator, "capability", lambda _device, found=capability: found)
        assert accelerator.has_triton(CPU) == there


def losses(config: Config, folder: Path, backend: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", backend)
    with process_group(folder):
        run(Trainer(config), lambda _record: None)
    return list(metrics.read(RunFolder(config).metrics))


@pytest.mark.slow
def test_a_run_on_a_cpu_compiles_where_asked(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `train.compile=true` a run goes through the real compiler and records its graphs; its losses are those of an
    eager run within 1e-5."""
    wanted = make_config(train={"steps": 2}, run="eager")
    fill_cache(wanted)
    asked = make_config(train={"steps": 2, "compile": True}, run="compiled")
    eager, fast = (losses(config, tmp_path, "inductor", monkeypatch) for config in (wanted, asked))
    assert [record["loss"] for record in fast] == pytest.approx([record["loss"] for record in eager], rel=1e-5)
    assert ["graphs" in record for record in fast] == [True, False]
    assert not any("graphs" in record or "warning" in record for record in eager)


def test_a_failure_is_in_the_metrics(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose compiler fails ends with an eager run's losses, every bit, and warns at the first step."""
    wanted = make_config(train={"steps": 2}, run="eager")
    fill_cache(wanted)
    asked = make_config(train={"steps": 2, "compile": True}, run="broken")
    eager = losses(wanted, tmp_path, "inductor", monkeypatch)
    monkeypatch.setattr(compiled, "of", lambda _train, _device: Compiled(broken, insists=False))
    fell = losses(asked, tmp_path, broken, monkeypatch)
    assert [record["loss"] for record in fell] == [record["loss"] for record in eager]
    assert ["no compiler here" in record.get("warning", "") for record in fell] == [True, False]
