"""The six optimizers: each learns, and each goes on from its packed state bit for bit."""

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch.nn import Parameter

from flux2_core.config.sections import Train
from flux2_core.errors import SetupError
from flux2_core.train import optimizers

ALL = list(optimizers.OPTIMIZERS)
EXTRAS = Path(sys.prefix) / "extras"  # where `make install` puts bitsandbytes, away from every other process's imports


@pytest.fixture(autouse=True)
def extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes can be imported here."""
    monkeypatch.syspath_prepend(str(EXTRAS))


def weights() -> dict[str, Parameter]:
    """One matrix that 8-bit states round (over 4096 entries), and one that begins at zero as `lora_B` does."""
    rng = torch.Generator().manual_seed(0)
    return {
        "m.lora_A.weight": Parameter(torch.randn(64, 96, generator=rng)),
        "m.lora_B.weight": Parameter(torch.zeros(8, 16)),
    }


def step(optimizer: Any, parameters: dict[str, Parameter], numbers: range) -> None:
    for number in numbers:
        rng = torch.Generator().manual_seed(number)
        for parameter in parameters.values():
            parameter.grad = parameter.detach() - 1 + 0.1 * torch.randn(parameter.shape, generator=rng)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 / (number + 1)
        optimizer.step()


def built(name: str) -> tuple[Any, dict[str, Parameter]]:
    parameters = weights()
    return optimizers.build(Train(optimizer=name, learning_rate=0.05), parameters), parameters


@pytest.mark.parametrize("name", ALL)
def test_going_on_equals_going_through(name: str) -> None:
    """Packed after 5 of 8 steps, written as safetensors and JSON, unpacked into a new one: all bits are the same."""
    through, wanted = built(name)
    step(through, wanted, range(8))
    first, before = built(name)
    step(first, before, range(5))
    tensors, facts = optimizers.pack(first, before)
    second, after = built(name)
    with torch.no_grad():
        for key, parameter in after.items():
            parameter.copy_(optimizers.usable(first, before)[key])
    optimizers.unpack(second, after, load(save(tensors)), json.loads(json.dumps(facts, allow_nan=False)))
    step(second, after, range(5, 8))
    assert all(torch.equal(wanted[key], after[key]) for key in wanted)
    ours, theirs = (optimizers.pack(*pair) for pair in ((through, wanted), (second, after)))
    assert ours[0].keys() == theirs[0].keys()
    assert all(torch.equal(ours[0][key], theirs[0][key]) for key in ours[0])
    assert ours[1] == theirs[1]
    assert any(tensor.numel() >= 64 for tensor in tensors.values()), "no state was kept: the test would show nothing"


@pytest.mark.parametrize("name", ALL)
def test_each_moves_toward_the_minimum(name: str) -> None:
    """20 steps on |w - 1|^2 bring every matrix nearer to 1; the rate of a step is the one that it was given."""
    optimizer, parameters = built(name)
    far = [float((parameter - 1).norm()) for parameter in parameters.values()]
    step(optimizer, parameters, range(20))
    near = [float((weight - 1).norm()) for weight in optimizers.usable(optimizer, parameters).values()]
    assert all(after < before for after, before in zip(near, far, strict=True))


def test_looking_changes_nothing() -> None:
    """`usable` gives schedule-free's average, which differs from the training point, and leaves that bit for bit."""
    optimizer, parameters = built("schedule-free")
    step(optimizer, parameters, range(5))
    before = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    used = optimizers.usable(optimizer, parameters)
    assert all(torch.equal(before[key], parameters[key]) for key in before)
    assert all(not torch.equal(before[key], used[key]) for key in before)
    other, again = built("schedule-free")
    step(other, again, range(5))
    other.eval()
    assert all(torch.equal(again[key], used[key]) for key in used)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bitsandbytes the error says which command brings it, and what to use instead."""
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(SetupError, match=r'pip install bitsandbytes`, or use optimizer="adamw"'):
        optimizers.build(Train(optimizer="adamw-8bit"), weights())


def test_standard_output_stays_clean(capsys: pytest.CaptureFixture[str]) -> None:
    """No library prints where `--json` prints."""
    for name in ALL[:1] + ALL[2:]:
        built(name)
    assert capsys.readouterr().out == ""
