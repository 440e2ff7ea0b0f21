"""The adapter: which Linears it sits on, and its fp32 weights in and out of the transformer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from flux2_core.config.sections import Lora
from flux2_core.lora import names, reading
from flux2_core.lora.layer import ADAPTER, LoraLinear
from flux2_core.lora.targets import scale
from flux2_core.model.seeded import generator


def inject(transformer: Any, lora: Lora, targets: Sequence[str]) -> None:
    """Put adapters on the named Linears; their weights are the only trainable parameters afterwards."""
    _inject(transformer, dict.fromkeys(targets, lora.rank), scale(lora))


def attach(transformer: Any, adapter: dict[str, torch.Tensor], *, device: torch.device) -> None:
    """Put a finished adapter (strength folded in, any ranks) on the transformer.

    Raises:
        UsageError: the adapter names a module that this model does not have.
    """
    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    reading.fits(adapter, {name: (module.in_features, module.out_features) for name, module in linears.items()})
    _inject(transformer, {name: len(a_RI) for name, (a_RI, _) in names.pairs(adapter).items()}, 1.0)
    load(transformer, adapter, device=device)


def warm_start(transformer: Any, lora: Lora, *, device: torch.device) -> None:
    """Begin with the adapter of the file `lora.init` (diffusers' or ComfyUI's names) instead of from zero.

    Raises:
        DataError: no such file, or not the file of a FLUX.2 LoRA.
        UsageError: it has other targets or another rank than this configuration.
    """
    weights = reading.initial(lora, {name: parameter.shape for name, parameter in parameters(transformer)})
    for name in weights:
        if name.endswith(names.B):  # files carry the strength inside, the module multiplies with it again
            weights[name] = weights[name] / scale(lora)
    load(transformer, weights, device=device)


@contextmanager
def switched_off(transformer: Any) -> Iterator[None]:
    """Have the base model's own forward pass inside."""
    for layer in (layers := [module for module in transformer.modules() if isinstance(module, LoraLinear)]):
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


@contextmanager
def at_strength(transformer: Any, strength: float) -> Iterator[None]:
    """Have the adapter's update multiplied by a strength inside."""
    own = {layer: layer.factor for layer in transformer.modules() if isinstance(layer, LoraLinear)}
    for layer, factor in own.items():
        layer.factor = factor * strength
    try:
        yield
    finally:
        for layer, factor in own.items():
            layer.factor = factor


def _inject(transformer: Any, ranks: Mapping[str, int], factor: float) -> None:
    for name, rank in ranks.items():
        owner, _, leaf = name.rpartition(".")
        linear = LoraLinear(transformer.get_submodule(name), rank=rank, factor=factor)
        setattr(transformer.get_submodule(owner), leaf, linear)


def parameters(transformer: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Adapter weights by plain name, `<module>.lora_A.weight` (rank, in) and `<module>.lora_B.weight` (out, rank)."""
    for name, parameter in transformer.named_parameters():
        if f".{ADAPTER}." in name and ".lora_" in name:
            yield name.replace(f".{ADAPTER}.", "."), parameter


def initialise(transformer: Any, *, seed: int, device: torch.device) -> None:
    """Give the adapter its first weights in fp32: A uniform in +-1/sqrt(in), B zero, each by (seed, name) alone.

    The same weights come out whatever the number of processes. Bounds are peft's (kaiming uniform, a = sqrt(5)).
    """
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in parameters(transformer):
        if name.endswith("lora_A.weight"):
            bound = 1 / math.sqrt(parameter.shape[1])
            weights[name] = (torch.rand(parameter.shape, generator=generator(seed, name)) * 2 - 1) * bound
        else:
            weights[name] = torch.zeros(parameter.shape)
    load(transformer, weights, device=device)


def load(transformer: Any, weights: dict[str, torch.Tensor], *, device: torch.device) -> None:
    """Replace the adapter's weights, as fp32 on the device (also where they were on the meta device).

    Raises:
        UsageError: the names or shapes are not those of this adapter.
    """
    own = dict(parameters(transformer))
    reading.same_shapes(weights, {name: parameter.shape for name, parameter in own.items()})
    for name, parameter in own.items():
        value = weights[name]
        if parameter.device.type == "meta":
            linear = transformer.get_submodule(f"{name.removesuffix('.weight')}.{ADAPTER}")
            linear.weight = torch.nn.Parameter(value.to(device, torch.float32))
        else:
            with torch.no_grad():
                parameter.copy_(value)
