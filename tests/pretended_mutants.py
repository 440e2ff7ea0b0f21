"""Faults of place, each put into the code for a card, and what the pretended card says of it; for test_pretended.py."""

import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.nn import Parameter

from bench import pretended
from bench.pretended import Walk
from flux2_core.model import frozen_linear, sampler
from flux2_core.placement import stream
from flux2_core.train.trainer import Trainer

Fault = AbstractContextManager[Any]


def on_the_host(owner: Any, name: str, argument: int, when: Callable[..., bool] = lambda *_: True) -> Fault:
    """A function that takes one of its arguments from the host."""
    function = getattr(owner, name)

    def faulty(*args: Any, **kwargs: Any) -> Any:
        given = list(args)
        if when(*args):
            given[argument] = given[argument].cpu()
        return function(*given, **kwargs)

    return patch.object(owner, name, faulty)


CUT = stream.cut


def at_home(memory: Tensor, like: Iterable[Tensor]) -> list[Parameter]:
    """A block's Parameters, in whatever memory they should be."""
    return [Parameter(weight.cpu(), requires_grad=False) for weight in CUT(memory, like)]


FAULTS: dict[str, tuple[str, Callable[[], Fault]]] = {
    "prompts stay where they were read": (
        "resident bf16 none flow",
        lambda: patch.object(Trainer, "prompts", lambda own, rows: rows.to(own.precision)),
    ),
    "a preview's noise level is not moved": ("resident bf16 full flow", lambda: on_the_host(sampler, "predict", 3)),
    "scales of a few-bit gradient are made on the host": (
        "resident int8-matmul none flow",
        lambda: on_the_host(frozen_linear, "_eight_bits", 3, lambda _x, _rows, right, *_: right.is_contiguous()),
    ),
    "a streamed block computes with the weights at home": (
        "stream bf16 full flow",
        lambda: patch.object(stream, "cut", at_home),
    ),
}


def main() -> None:
    """Print, of each fault, why the walk did not go through; null where it did."""
    with tempfile.TemporaryDirectory() as path:
        model = pretended.folder(Path(path), "klein-4b", deep=False)
        told = {}
        for name, (words, fault) in FAULTS.items():
            strategy, precision, recompute, method = words.split()
            with fault():
                told[name] = pretended.walked(model, Walk("klein-4b", strategy, precision, recompute, method)).why_not
        sys.stdout.write(json.dumps(told))


if __name__ == "__main__":
    main()
