"""The transformer: built on the meta device, laid out, then each process reads its own rows from the files.

The frozen base is sharded block by block (FSDP2), or stands whole in each process or in its host's memory; adapter
weights are left out of it and replicated, see docs/decisions/0003. A base with few bits is rounded row by row while it
is read, so that the 32B model never stands whole in the files' precision where it is not meant to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers import transformer_flux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from flux2_core.errors import SetupError, UsageError
from flux2_core.model.folder import PROJECTION, ModelFolder
from flux2_core.model.frozen_linear import FP8, MATMUL, FrozenLinear, quantise
from flux2_core.store import atomic

AT_ONCE = 4096  # rows that are rounded at a time: all 55,296 of FLUX.2-dev's widest Linear would take 4.4 GB of a card
ROTATE = transformer_flux2.apply_rotary_emb
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


def blocks(transformer: Any) -> list[Any]:
    """All blocks in the order in which they run."""
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


def rotate_by_sample() -> None:
    """Let attention take rotary rows (B, N, D) of each sample's own; diffusers 0.42 takes rows (N, D) alone."""
    transformer_flux2.apply_rotary_emb = _rotated


def _rotated(x_BNHD: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor], **settings: Any) -> Any:
    """As diffusers does; of rows by sample with all samples as one sequence."""
    if rows[0].ndim == 2:
        return ROTATE(x_BNHD, rows, **settings)
    joint = tuple(part_BND.flatten(0, 1) for part_BND in rows)
    return ROTATE(x_BNHD.flatten(0, 1).unsqueeze(0), joint, **settings).view_as(x_BNHD)


def shard(transformer: Any, mesh: DeviceMesh) -> None:
    """Shard the frozen parameters over a mesh, one group per block; trainable ones stay whole in every process.

    Over a mesh of two dimensions they are replicated along the first and sharded along the second (HSDP).

    Raises:
        UsageError: a weight of another library's quantised kind, which FSDP2 would widen in silence or refuse.
    """
    for name, parameter in transformer.named_parameters():
        if type(parameter) is not torch.nn.Parameter:
            raise UsageError(
                f"{name} is a {type(parameter).__name__}: FSDP2 does not keep such weights small. Load the bf16 "
                'model and set train.precision to int8, int4 or fp8, or set cluster.strategy="ddp"'
            )
    adapter = {parameter for parameter in transformer.parameters() if parameter.requires_grad}
    for block in blocks(transformer):
        fully_shard(block, mesh=mesh, ignored_params=adapter)
    fully_shard(transformer, mesh=mesh, ignored_params=adapter)


Added = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Rounded:
    """A folder of weights as they were rounded before: a file for each process's rows of each weight."""

    folder: Path
    writes: bool
    """Whether this process adds what is not there: of those that hold the same rows one is enough."""

    def file(self, key: str, payload: torch.nn.Parameter) -> Path:
        """Of the rows of a weight that are this process's part."""
        first, count = _rows(payload)
        return self.folder / f"{key.removesuffix('.weight')}.{first}-{first + count}.safetensors"


def load_weights(
    transformer: Any,
    model: ModelFolder,
    *,
    device: torch.device,
    host_blocks: bool = False,
    added: Added | None = None,
    rounded: Rounded | None = None,
) -> None:
    """Fill the frozen parameters from the model's safetensors files, each process its own rows only.

    With `host_blocks` those of the blocks stay in the host's memory. To the weight of a module in `added` the product
    B A is added, in fp32, before it is rounded to anything. What lies in `rounded` is read there, and the rest is put
    there.

    Raises:
        SetupError: a tensor is missing, is not expected, or has another shape than the configuration says.
    """
    where = model.tensor_files("transformer")
    expected = {_key(name) for name, _ in transformer.named_parameters()} | {PROJECTION}
    if unexpected := sorted(key for key in where if key not in expected and not _of_quanto(key, expected)):
        raise SetupError(
            f"{where[unexpected[0]]}: holds {unexpected[0]}, which a model of this configuration does not have; "
            "the files and config.json are of different models"
        )
    for name, parameter in list(transformer.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        module, key = transformer.get_submodule(owner), _key(name)
        if parameter.requires_grad or (isinstance(module, FrozenLinear) and leaf == "scale"):
            continue  # a scale is set with its payload
        update = (added or {}).get(key.removesuffix(".weight"))
        to = torch.device("cpu") if host_blocks and "transformer_blocks." in name else device
        if isinstance(module, FrozenLinear):
            kept = rounded and rounded.file(key, module.payload)
            if kept and kept.exists():
                payload, scale = _read_rounded(kept, module)
            else:
                payload, scale = _read_few_bits(where, key, module, device, update)
                if kept and rounded and rounded.writes:
                    atomic.write(kept, save({"payload": payload.cpu(), "scale": scale.cpu()}))
            module.payload, module.scale = _placed(payload.to(to), module.payload), _placed(scale.to(to), module.scale)
            continue
        if key not in where:
            if key + PAYLOAD in where:
                raise SetupError(
                    f"{where[key + PAYLOAD]}: {key} is kept by optimum-quanto: that is read for the Linears of blocks, "
                    "with train.precision set to int8 or fp8"
                )
            raise SetupError(f"{model.path / 'transformer'}: the files lack {key}; download the model again")
        rows = _read_rows(where[key], key, parameter, tuple(parameter.shape), update)
        setattr(module, leaf, _placed(rows.to(device=to, dtype=parameter.dtype), parameter))


def weight(model: ModelFolder, module: str) -> torch.Tensor:
    """The weight of a Linear as the model's files have it, fp32.

    Raises:
        SetupError: the files lack it.
    """
    where, key = model.tensor_files("transformer"), f"{module}.weight"
    found = {}
    for name in (key, key + PAYLOAD, key + SCALE):
        if name in where:
            with safe_open(where[name], framework="pt") as tensors:
                found[name] = tensors.get_tensor(name).float()
    if key in found:
        return found[key]
    if len(found) < 2:
        raise SetupError(f"{model.path / 'transformer'}: the files lack {key}; download the model again")
    return found[key + PAYLOAD] * found[key + SCALE]


PAYLOAD, SCALE = "._data", "._scale"  # what optimum-quanto writes in the place of a weight
OTHERS = (".input_scale", ".output_scale")  # of activations, which stay as they are here


def _of_quanto(key: str, expected: set[str]) -> bool:
    weight = next((key.removesuffix(end) for end in (PAYLOAD, SCALE) if key.endswith(end)), "")
    other = next((key.removesuffix(end) + ".weight" for end in OTHERS if key.endswith(end)), "")
    return weight in expected or other in expected


def _read_rounded(file: Path, module: FrozenLinear) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as tensors:
            payload, scale = tensors.get_tensor("payload"), tensors.get_tensor("scale")
    except (SafetensorError, OSError) as error:
        raise SetupError(f"{file}: cannot be read ({error}); remove it, it is made again") from None
    rows = _rows(module.payload)[1]
    wanted = [(rows, *module.payload.shape[1:]), (rows, *module.scale.shape[1:])]
    if [tuple(one.shape) for one in (payload, scale)] != wanted or payload.dtype != module.payload.dtype:
        raise SetupError(f"{file}: holds other shapes than this model's; remove it, it is made again")
    return payload, scale


def _read_few_bits(
    where: dict[str, Path],
    key: str,
    module: FrozenLinear,
    device: torch.device,
    update: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This process's rows of a weight in few bits: rounded now, or taken bit for bit from optimum-quanto's files."""
    shape = (module.out_features, module.in_features)
    if key in where:
        whole = _read_rows(where[key], key, module.payload, shape, update)
        rounded = [quantise(rows.to(device), module.precision) for rows in whole.split(AT_ONCE)]
        payload, scale = (torch.cat(parts) for parts in zip(*rounded, strict=True))
        return payload, scale
    if key + PAYLOAD not in where or key + SCALE not in where:
        raise SetupError(f"the transformer's files lack {key}; download the model again")
    if update is not None:
        raise SetupError(f"{where[key + PAYLOAD]}: {key} is rounded already: lora.preset needs the exact weights")
    payload = _read_rows(where[key + PAYLOAD], key + PAYLOAD, module.payload, shape)
    kind = module.precision.removesuffix(MATMUL)
    if payload.dtype != {"int8": torch.int8, "fp8": FP8}.get(kind):
        raise SetupError(
            f"{where[key + PAYLOAD]}: {key} is kept as {payload.dtype}, which train.precision={module.precision} does "
            "not read: set int8 or fp8, as the files were written"
        )
    scale = _read_rows(where[key + SCALE], key + SCALE, module.payload, (module.out_features, 1)).float()
    return payload.view(module.payload.dtype), scale


def _key(name: str) -> str:
    """The files' name of a parameter; what a base with few bits holds is read from the weight."""
    return name.replace(BASE_LAYER, "").replace(".payload", ".weight").replace(".scale", ".weight")


def _read_rows(
    file: Path,
    key: str,
    parameter: torch.nn.Parameter,
    wanted: tuple[int, ...],
    update: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The rows of a tensor in a file that are this process's part of `parameter`; `wanted` is the whole shape."""
    with safe_open(file, framework="pt") as tensors:
        rows = tensors.get_slice(key)
        if tuple(rows.get_shape()) != wanted:
            raise SetupError(f"{file}: {key} is {rows.get_shape()}, the configuration says {list(wanted)}")
        if not isinstance(parameter, DTensor):
            return _updated(rows[:], update, slice(None))
        first, count = _rows(parameter)
        if not count:  # fewer rows than processes
            return rows[:0]
        own = slice(first, first + count)
        return _updated(rows[own], update, own)


def _rows(parameter: torch.nn.Parameter) -> tuple[int, int]:
    """The first of this process's rows of a parameter, and how many it has."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.shape[0]
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return (offset[0], shape[0]) if shape[0] else (0, 0)


def _updated(rows: torch.Tensor, update: tuple[torch.Tensor, torch.Tensor] | None, own: slice) -> torch.Tensor:
    return rows if update is None else rows.float() + update[1][own] @ update[0]


def _placed(local: torch.Tensor, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """A frozen parameter of these values, laid out as the one that it replaces."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        local = DTensor.from_local(
            local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )
    return torch.nn.Parameter(local, requires_grad=False)
