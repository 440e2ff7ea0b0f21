"""Optimizers: one table of builders over libraries, and their state as named tensors and plain facts, no pickle.

Schedule-free trains at a point y and is used at an average x: `usable` gives x wherever weights are shown, saved or
exported, and leaves y as it was, bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from flux2_core import accelerator
from flux2_core.config.sections import Train
from flux2_core.errors import SetupError, UsageError, choose

Y = "y"  # where a schedule-free optimizer's training point stands in its packed state


class Kind(NamedTuple):
    """One `train.optimizer`."""

    build: Callable[[list[Parameter], dict[str, Any]], Any]
    usual: tuple[float, float]
    """Learning rates outside of which most runs learn nothing, or fall apart."""


def build(train: Train, parameters: Mapping[str, Parameter]) -> Any:
    """The optimizer of a configuration over named parameters, ready for its first step.

    Raises:
        SetupError: its library is not installed; names the command.
        UsageError: there is no such optimizer.
    """
    settings = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    kind = choose(OPTIMIZERS, train.optimizer, setting="train.optimizer")
    optimizer = kind.build(list(parameters.values()), settings)
    if _averages(optimizer):
        optimizer.train()
    return optimizer


def pack(optimizer: Any, parameters: Mapping[str, Parameter]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) that `unpack` goes on from: facts are JSON, floats in it come back bit for bit."""
    names = list(parameters)
    state = optimizer.state_dict()
    flat = {path: value for place, fields in state["state"].items() for path, value in _flat(names[place], fields)}
    tensors = {path: value.detach().cpu().clone() for path, value in flat.items() if isinstance(value, Tensor)}
    if _averages(optimizer):
        tensors |= {f"{name}/{Y}": parameter.detach().cpu().clone() for name, parameter in parameters.items()}
    default = optimizer.defaults  # prodigy's holds an infinity, which JSON has not: only what changed is kept
    groups = [
        {
            key: value
            for key, value in group.items()
            if key != "params" and (key not in default or value != default[key])
        }
        for group in state["param_groups"]
    ]
    return tensors, {"state": {k: v for k, v in flat.items() if not isinstance(v, Tensor)}, "groups": groups}


def unpack(
    optimizer: Any, parameters: Mapping[str, Parameter], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Bring a new optimizer, and the weights where it trains at a point of its own, to a packed state."""
    places = {name: place for place, name in enumerate(parameters)}
    state: dict[int, dict[str, Any]] = {}
    for path, value in (*tensors.items(), *facts["state"].items()):
        name, *fields, last = path.split("/")
        if not fields and last == Y:
            with torch.no_grad():
                parameters[name].copy_(value)
            continue
        node = state.setdefault(places[name], {})
        for field in fields:
            node = node.setdefault(field, {})
        node[last] = value
    groups = optimizer.state_dict()["param_groups"]
    for group, kept in zip(groups, facts["groups"], strict=True):
        group.update(kept)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def usable(optimizer: Any, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """Copies of the weights that are to be looked at and exported."""
    trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    if not _averages(optimizer):
        return trained
    optimizer.eval()
    used = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.train()
    with torch.no_grad():  # there and back again differs in the last bits
        for name, parameter in parameters.items():
            parameter.copy_(trained[name])
    return used


def _averages(optimizer: Any) -> bool:
    return "train_mode" in optimizer.defaults


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict):
        yield path, value
        return
    for key, inner in value.items():
        yield from _flat(f"{path}/{key}", inner)


def _adamw(parameters: list[Parameter], settings: dict[str, Any]) -> Any:
    return torch.optim.AdamW(parameters, fused=accelerator.is_gpu(parameters[0].device), **settings)


def _adamw_8bit(parameters: list[Parameter], settings: dict[str, Any]) -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise SetupError(
            'train.optimizer="adamw-8bit" needs bitsandbytes: `pip install bitsandbytes`, or use optimizer="adamw"'
        ) from None
    return AdamW8bit(parameters, **settings)


def _prodigy(parameters: list[Parameter], settings: dict[str, Any]) -> Any:
    from prodigyopt import Prodigy

    with redirect_stdout(sys.stderr):  # it prints a line about weight decay; standard output is for `--json`
        return Prodigy(parameters, **settings)


def _lion(parameters: list[Parameter], settings: dict[str, Any]) -> Any:
    from lion_pytorch import Lion

    return Lion(parameters, **settings)


def _schedule_free(parameters: list[Parameter], settings: dict[str, Any]) -> Any:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree(parameters, **settings)


OPTIMIZERS: dict[str, Kind] = {
    "adamw": Kind(_adamw, usual=(1e-6, 5e-3)),
    "adamw-8bit": Kind(_adamw_8bit, usual=(1e-6, 5e-3)),
    "prodigy": Kind(_prodigy, usual=(0.1, 10.0)),
    "adafactor": Kind(lambda parameters, settings: torch.optim.Adafactor(parameters, **settings), usual=(1e-6, 1e-2)),
    "lion": Kind(_lion, usual=(1e-7, 1e-3)),
    "schedule-free": Kind(_schedule_free, usual=(1e-5, 2e-2)),
}


def pace(train: Train) -> None:
    """Refuse a learning rate that would never be reached, or at which nothing is learned.

    Raises:
        UsageError: as it says.
    """
    if train.settled and train.warmup_steps > train.steps:
        raise UsageError(
            f"train.warmup_steps={train.warmup_steps} and train.steps={train.steps}: the run would end before its "
            "learning rate is reached; set fewer warm-up steps"
        )
    if train.optimizer == "prodigy" and train.learning_rate <= (highest := OPTIMIZERS["adamw"].usual[1]):
        raise UsageError(
            f"train.learning_rate={train.learning_rate:g}: prodigy finds its own rate and multiplies it with this one, "
            f"so that up to {highest:g}, the rates of adamw, it learns nothing; set train.learning_rate=1"
        )
