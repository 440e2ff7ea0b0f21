"""One process of a sharded model, for test_transformer.py: it counts the bytes that it reads."""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from flux2_core import lora, transformer
from flux2_core.config import Lora, Model
from flux2_core.model_folder import ModelFolder, resolve

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
    lora.inject(built, Lora(rank=2), lora.match(Lora(), transformer.linear_names(built)))
    transformer.shard(built, init_device_mesh("cpu", (world,)))
    transformer.load_weights(built, model, device=CPU)
    lora.initialise(built, seed=0, device=CPU)
    assert all(isinstance(parameter, DTensor) for parameter in frozen(built).values())
    assert not any(isinstance(parameter, DTensor) for _, parameter in lora.parameters(built))
    return built


def frozen(built: Any) -> dict[str, Any]:
    """The base's parameters."""
    return {name: parameter for name, parameter in built.named_parameters() if not parameter.requires_grad}


def run(rank: int, world: int, path: str, out: str) -> None:
    """Load a share, gather the whole, and write down what was read."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/group", rank=rank, world_size=world)
    transformer.safe_open = CountingFile  # type: ignore
    built = sharded(resolve(Model(path=path), parts=("transformer",)), world)
    parameters = frozen(built)
    whole = {n.replace(transformer.BASE_LAYER, ""): p.full_tensor().contiguous() for n, p in parameters.items()}
    save_file(whole, f"{out}/whole-{rank}")
    save_file(lora.state(built), f"{out}/adapter-{rank}")
    local = sum(parameter.to_local().nbytes for parameter in parameters.values())
    Path(f"{out}/bytes-{rank}").write_text(json.dumps([Counting.read, local]))
    dist.destroy_process_group()
