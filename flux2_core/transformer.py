"""The transformer: built on the meta device, sharded, then each process reads its own rows from the files.

The frozen base is sharded block by block (FSDP2); adapter weights are left out of it and replicated, see
docs/decisions/0003. The 32B model never stands whole in any process's memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from safetensors import SafetensorError, safe_open
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flux2_core.errors import SetupError
from flux2_core.model_folder import ModelFolder
from flux2_core.recipes import PROJECTION

BASE_LAYER = ".base_layer"  # peft keeps the frozen Linear under this name


def build(model: ModelFolder, *, dtype: torch.dtype) -> Any:
    """The transformer without weights, on the meta device, frozen."""
    with torch.device("meta"):
        transformer: Any = Flux2Transformer2DModel.from_config(model.config("transformer"))
    return transformer.to(dtype).requires_grad_(False)


def linear_names(transformer: Any) -> list[str]:
    """Names of all Linear modules, in the model's order."""
    return [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]


def skip_projection(transformer: Any) -> None:
    """Take prompt rows that went through `context_embedder` already (`text.stored = "projected"`)."""
    transformer.context_embedder = torch.nn.Identity()


def shard(transformer: Any, mesh: DeviceMesh) -> None:
    """Shard the frozen parameters over a mesh, one group per block; trainable ones stay whole in every process."""
    if mesh.size() == 1:
        return  # one process holds all of it anyway, and the hooks would cost 4 ms a step
    adapter = {parameter for parameter in transformer.parameters() if parameter.requires_grad}
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        fully_shard(block, mesh=mesh, ignored_params=adapter)
    fully_shard(transformer, mesh=mesh, ignored_params=adapter)


def load_weights(transformer: Any, model: ModelFolder, *, device: torch.device) -> None:
    """Fill the frozen parameters from the model's safetensors files, each process its own rows only.

    Raises:
        SetupError: a tensor is missing, is not expected, or has another shape than the configuration says.
    """
    where = dict(_keys(model))
    expected = {name.replace(BASE_LAYER, "") for name, _ in transformer.named_parameters()} | {PROJECTION}
    if unexpected := sorted(where.keys() - expected):
        raise SetupError(
            f"{where[unexpected[0]]}: holds {unexpected[0]}, which a model of this configuration does not have; "
            "the files and config.json are of different models"
        )
    for name, parameter in list(transformer.named_parameters()):
        if parameter.requires_grad:
            continue
        key = name.replace(BASE_LAYER, "")
        if key not in where:
            raise SetupError(f"{model.path / 'transformer'}: the files lack {key}; download the model again")
        owner, _, leaf = name.rpartition(".")
        value = _read_rows(where[key], key, parameter, device=device)
        setattr(transformer.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))


def _read_rows(file: Path, key: str, parameter: torch.nn.Parameter, *, device: torch.device) -> torch.Tensor:
    with safe_open(file, framework="pt") as tensors:
        rows = tensors.get_slice(key)
        if tuple(rows.get_shape()) != tuple(parameter.shape):
            raise SetupError(f"{file}: {key} is {rows.get_shape()}, the configuration says {list(parameter.shape)}")
        if not isinstance(parameter, DTensor):
            return rows[:].to(device=device, dtype=parameter.dtype)
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        if shape[0]:
            local = rows[offset[0] : offset[0] + shape[0]].to(device=device, dtype=parameter.dtype)
        else:  # fewer rows than processes
            local = torch.empty(shape, device=device, dtype=parameter.dtype)
        return DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def _keys(model: ModelFolder) -> Iterator[tuple[str, Path]]:
    for file in model.weight_files("transformer"):
        try:
            with safe_open(file, framework="pt") as tensors:
                yield from [(key, file) for key in tensors.keys()]  # noqa: SIM118  (a safetensors handle is no dict)
        except SafetensorError as error:
            raise SetupError(f"{file}: not a whole safetensors file ({error}); download the model again") from None
