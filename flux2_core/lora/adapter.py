"""The adapter: which Linears it sits on, and its fp32 weights in and out of the transformer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from flux2_core.config.adapter import Lora
from flux2_core.errors import UsageError
from flux2_core.lora import names, reading
from flux2_core.lora.kinds import FACTOR, KINDS, kind_of
from flux2_core.lora.layer import ADAPTER, AdaptedLinear, few_bits
from flux2_core.lora.targets import finished, ranks, strength
from flux2_core.lora.told import Told
from flux2_core.model.frozen_linear import widen
from flux2_core.model.seeded import generator

AT_ONCE = 4096  # rows that are squared in fp32 at a time


def inject(transformer: Any, lora: Lora, targets: Sequence[str]) -> Told | None:
    """Put adapters on the named Linears; their weights are the only trainable parameters afterwards.

    Returns:
        What each pass tells them; None: nothing.
    """
    each, kind = ranks(lora, targets), KINDS[lora.kind]
    for name, rank in each.items():
        linear = transformer.get_submodule(name)
        shapes = kind.shapes(linear.in_features, linear.out_features, rank, lora.factor or FACTOR)
        _put(transformer, name, shapes, lora.kind, factor=strength(lora, rank))
    least = {name: least_rank(lora, rank) for name, rank in each.items()} if lora.kind == "t-lora" else None
    return _listening(transformer, each, least) if least or lora.dropout else None


def attach(transformer: Any, adapter: dict[str, torch.Tensor], *, device: torch.device) -> None:
    """Put a finished adapter (strength folded in, any kind and ranks) on the transformer; `measure` has to follow.

    Raises:
        UsageError: the adapter names a module that this model does not have.
    """
    linears = {name: module for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)}
    least = {key.removesuffix(reading.LEAST): int(each) for key, each in adapter.items() if key.endswith(reading.LEAST)}
    weights = {key: each for key, each in adapter.items() if not key.endswith(reading.LEAST)}
    reading.fits(weights, {name: (module.in_features, module.out_features) for name, module in linears.items()})
    given = names.modules(weights)
    for name, own in given.items():
        shapes = {leaf: tuple(weight.shape) for leaf, weight in own.items()}
        _put(transformer, name, shapes, kind_of(own), factor=1.0)
    load(transformer, weights, device=device)
    if least:
        _listening(transformer, {name: len(given[name][names.A]) for name in least}, least)


def least_rank(lora: Lora, rank: int) -> int:
    """How many ranks of a Linear `t-lora` keeps in pure noise; half of them is what its paper found best."""
    return lora.min_rank or max(1, rank // 2)


def warm_start(transformer: Any, lora: Lora, *, device: torch.device) -> None:
    """Begin with the adapter of the file `lora.init` (diffusers' or ComfyUI's names) instead of from zero.

    Raises:
        DataError: no such file, or not the file of a FLUX.2 LoRA.
        UsageError: it has other targets, another kind or another rank than this configuration.
    """
    weights = reading.initial(lora, {name: parameter.shape for name, parameter in parameters(transformer)})
    load(transformer, finished(lora, weights, back=True), device=device)  # the module multiplies with it again


@contextmanager
def switched_off(transformer: Any) -> Iterator[None]:
    """Have the base model's own forward pass inside."""
    for layer in (layers := list(_layers(transformer).values())):
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


@contextmanager
def at_strength(transformer: Any, strength: float) -> Iterator[None]:
    """Have the adapter's update multiplied by a strength inside."""
    own = {layer: layer.factor for layer in _layers(transformer).values()}
    for layer, factor in own.items():
        layer.factor = factor * strength
    try:
        yield
    finally:
        for layer, factor in own.items():
            layer.factor = factor


def parameters(transformer: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Adapter weights by plain name, `<module>.lora_A.weight` (rank, in), `<module>.lora_B.weight` (out, rank), ..."""
    for name, parameter in transformer.named_parameters():
        if names.LEAF.fullmatch(plain := name.replace(f".{ADAPTER}.", ".")):
            yield plain, parameter


def initialise(transformer: Any, *, seed: int, device: torch.device) -> None:
    """Give the adapter its first weights in fp32, each by (seed, name) alone: nothing of the model is changed yet.

    The same weights come out whatever the number of processes. Bounds are peft's (kaiming uniform, a = sqrt(5)). Of
    `t-lora` the rows of A are orthogonal and as long as those are on average, so that fewer ranks are not the same ones
    over again. The base's weights must be there: a magnitude begins as the norm of the base's row.
    """
    measure(transformer, device=device)
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in parameters(transformer):
        module, leaf = names.parted(name)
        layer = transformer.get_submodule(module)
        if leaf in KINDS[layer.kind].zero:
            weights[name] = torch.zeros(parameter.shape)
        elif leaf == names.MAGNITUDE:
            weights[name] = layer.squares_N.sqrt()
        elif layer.kind == "t-lora":
            if parameter.shape[0] > parameter.shape[1]:
                raise UsageError(f"{module}: t-lora has no more ranks than the {parameter.shape[1]} inputs of a Linear")
            drawn = torch.randn(parameter.shape, generator=generator(seed, name), dtype=torch.float64)
            weights[name] = (torch.linalg.qr(drawn.t())[0].t() / math.sqrt(3)).float()
        else:
            bound = 1 / math.sqrt(parameter.shape[1])
            weights[name] = (torch.rand(parameter.shape, generator=generator(seed, name)) * 2 - 1) * bound
    load(transformer, weights, device=device)


def measure(transformer: Any, *, device: torch.device) -> None:
    """Take the sums of squares of the base's rows where they are asked for; all processes of a sharded base together.

    They are of the weights that are used, rounded or with presets in them.
    """
    for layer in _layers(transformer).values():
        if names.MAGNITUDE not in layer.names:
            continue
        weight, scale, precision = few_bits(layer.base_layer)
        held = [each.to_local() if isinstance(each, DTensor) else each for each in (weight, scale) if each is not None]
        parts = zip(*(each.split(AT_ONCE) for each in held), strict=True)
        exact = (widen(part[0], part[1], precision, torch.float32) if len(part) > 1 else part[0] for part in parts)
        squares_N = torch.cat([each.float().square().sum(1) for each in exact])
        if isinstance(weight, DTensor):
            shape = torch.Size([layer.out_features])
            squares_N = DTensor.from_local(
                squares_N, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=(1,)
            ).full_tensor()
        layer.squares_N = squares_N.to(device)


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
            module, leaf = names.parted(name)
            path, _, end = leaf.partition(".")
            owner = transformer.get_submodule(f"{module}.{path}.{ADAPTER}" if end else module)
            setattr(owner, end or leaf, torch.nn.Parameter(value.to(device, torch.float32)))
        else:
            with torch.no_grad():
                parameter.copy_(value)


def _put(transformer: Any, name: str, shapes: Mapping[str, tuple[int, ...]], kind: str, *, factor: float) -> None:
    owner, _, leaf = name.rpartition(".")
    layer = AdaptedLinear(transformer.get_submodule(name), kind, shapes, KINDS[kind].run, factor=factor)
    setattr(transformer.get_submodule(owner), leaf, layer)


def _layers(transformer: Any) -> dict[str, AdaptedLinear]:
    return {name: module for name, module in transformer.named_modules() if isinstance(module, AdaptedLinear)}


def _listening(transformer: Any, ranks: Mapping[str, int], least: Mapping[str, int] | None) -> Told:
    layers = _layers(transformer)
    told = Told(
        [layers[name] for name in ranks],
        list(ranks.values()),
        None if least is None else [least[name] for name in ranks],
    )
    told.listen(transformer)
    return told
