"""One process of a group that shares a model, for test_transformer.py and test_layout.py."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from flux2_core.config.adapter import Lora
from flux2_core.config.reading import parse
from flux2_core.config.sections import Model
from flux2_core.lora import adapter, targets
from flux2_core.model import transformer
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.model.frozen_linear import FrozenLinear
from flux2_core.placement import compiled
from flux2_core.train.trainer import Trainer
from tests.random_adapter import randomised

CPU = torch.device("cpu")


class Counting:
    """A slice that counts the bytes it hands out."""

    read = 0

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def get_shape(self) -> list[int]:
        return self.inner.get_shape()

    def __getitem__(self, place: Any) -> torch.Tensor:
        value = self.inner[place]
        Counting.read += value.nbytes
        return value


class CountingFile:
    """A safetensors file whose slices count."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.inner = safe_open(*args, **kwargs)

    def __enter__(self) -> "CountingFile":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def keys(self) -> list[str]:
        return self.inner.keys()

    def get_slice(self, key: str) -> Counting:
        return Counting(self.inner.get_slice(key))


def sharded(model: ModelFolder, world: int) -> Any:
    """The transformer with an adapter, sharded over `world` processes and filled."""
    built = transformer.build(model, dtype=torch.float32)
    adapter.inject(built, Lora(rank=2), targets.match(Lora(), transformer.linear_names(built)))
    transformer.shard(built, init_device_mesh("cpu", (world,)))
    transformer.load_weights(built, model, device=CPU)
    adapter.initialise(built, seed=0, device=CPU)
    assert all(isinstance(parameter, DTensor) for parameter in frozen(built).values())
    assert not any(isinstance(parameter, DTensor) for _, parameter in adapter.parameters(built))
    return built


def frozen(built: Any) -> dict[str, Any]:
    """The base's parameters."""
    return {name: parameter for name, parameter in built.named_parameters() if not parameter.requires_grad}


def run(rank: int, world: int, path: str, out: str) -> None:
    """Load a share, gather the whole, and write down what was read."""
    transformer.safe_open = CountingFile  # type: ignore
    built = sharded(resolve(Model(path=path), parts=("transformer",)), world)
    parameters = frozen(built)
    whole = {n.replace(transformer.BASE_LAYER, ""): p.full_tensor().contiguous() for n, p in parameters.items()}
    save_file(whole, f"{out}/whole-{rank}")
    save_file({name: value.detach() for name, value in adapter.parameters(built)}, f"{out}/adapter-{rank}")
    local = sum(parameter.to_local().nbytes for parameter in parameters.values())
    Path(f"{out}/bytes-{rank}").write_text(json.dumps([Counting.read, local]))


def gradients(trainer: Any, rank: int, world: int) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and adapter gradients of step 0, summed over the workers, from an adapter that does something."""
    randomised(trainer)
    [(_, loss)] = trainer.terms(trainer.data.batch(0, rank=rank, world=world))
    loss.backward()
    sums = trainer._sum_over_workers(torch.stack([loss.detach(), *torch.zeros(2)]))
    return float(sums[0]), {name: parameter.grad for name, parameter in trainer.adapter.items()}


def watched(built: Any) -> set[tuple[type, torch.dtype]]:
    """What stands as payload in the few-bit Linears while they compute, filled as they do."""
    seen: set[tuple[type, torch.dtype]] = set()
    for module in built.modules():
        if isinstance(module, FrozenLinear):
            module.register_forward_pre_hook(lambda m, _: seen.add((type(m.payload.data), m.payload.dtype)))
    return seen


def place(rank: int, world: int, trees: dict[str, dict[str, Any]], out: str, local: int) -> None:
    """Train a step under every configuration, in one process group, and write down what came out of it."""
    os.environ["LOCAL_WORLD_SIZE"] = str(local)
    compiled.BACKEND = "aot_eager"  # traced and differentiated ahead, as for inductor, which takes minutes on a CPU
    for case, tree in trees.items():
        trainer = Trainer(parse(tree), rank=rank, world=world)
        payloads = [m.payload for m in trainer.transformer.modules() if isinstance(m, FrozenLinear)]
        sharded = isinstance(next(iter(frozen(trainer.transformer).values())), DTensor)
        gathered = (
            set() if tree["train"]["compile"] is True else watched(trainer.transformer)
        )  # the hook cannot be traced
        loss, found = gradients(trainer, rank, world)
        save_file({name: value.contiguous() for name, value in found.items()}, f"{out}/{case}-{rank}")
        told = {
            "loss": loss,
            "sharded": sharded,
            "bytes": sum(p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes for p in payloads),
            "gathered": sorted(f"{kind.__name__} {dtype}" for kind, dtype in gathered),
        }
        Path(f"{out}/{case}-{rank}.json").write_text(json.dumps(told))
