"""From a decided placement to a transformer that lies there: built, adapted, rounded, sharded or streamed, filled.

The order matters: peft wraps plain Linears; then policies and the compiler go on the blocks, few-bit Linears take the
places of the frozen ones, FSDP2 wraps all of it, and only then are weights read, each process its own.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from flux2_core import accelerator
from flux2_core.config.sections import Config, Train
from flux2_core.errors import SetupError
from flux2_core.lora import adapter, reading, targets
from flux2_core.lora.names import Adapter
from flux2_core.model import frozen_linear, transformer
from flux2_core.model.folder import ModelFolder
from flux2_core.model.frozen_linear import BITS, MATMUL
from flux2_core.model.transformer import Rounded
from flux2_core.placement import planner, recompute, stream
from flux2_core.placement.compiled import Compiled
from flux2_core.placement.planner import Job, Placement
from flux2_core.store.hashing import digest


def job(config: Config, model: ModelFolder, *, world: int, device: torch.device) -> Job:
    """What this process group has to place; the launcher says how many of its workers share this node.

    Of nodes with unlike numbers of workers the fullest counts.
    """
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    ends = torch.tensor([local, -local], device=device)
    if world > 1:
        dist.all_reduce(ends, dist.ReduceOp.MIN)
    least, most = int(ends[0]), -int(ends[1])
    host = accelerator.free_host_bytes()
    return planner.job(config, model, world=world, local=most, even=least == most, host=host)


def decide(asked: Job, device: torch.device) -> Placement:
    """The placement, the first worker's in every worker: the smallest card decides, and the least host memory.

    Raises:
        UsageError: nothing fits, or settings exclude each other or these nodes; names what to set.
        SetupError: the card does not tell its memory, and the configuration does not either.
    """
    limit = None
    if accelerator.is_gpu(device):
        memory = planner.card(asked.config, accelerator.free_bytes(device))
        if memory is None:
            raise SetupError(f"this {device.type} does not say how much memory it has: set cluster.gpu_memory (GiB)")
        least = torch.tensor([memory, asked.host], dtype=torch.float64, device=device)
        if asked.world > 1:
            dist.all_reduce(least, dist.ReduceOp.MIN)
        limit, host = least.tolist()
        asked = replace(asked, host=host)
    told = [planner.decide(asked, limit)]
    if asked.world > 1:  # workers that went by what their own nodes say would wait for each other in other collectives
        dist.broadcast_object_list(told, device=device)
    return told[0]


def compute_dtype(train: Train, device: torch.device) -> torch.dtype:
    """Precision of what is multiplied and of the base outside its few-bit Linears."""
    small = train.precision == "bf16" or (accelerator.is_gpu(device) and train.precision != "fp32")
    return torch.bfloat16 if small else torch.float32


def build(
    asked: Job,
    chosen: Placement,
    model: ModelFolder,
    *,
    device: torch.device,
    finished: Adapter | None = None,
    compiler: Compiled | None = None,
) -> Any:
    """The transformer, laid out and filled: with a new adapter to train, or to draw with a finished one or none."""
    config, dtype = asked.config, compute_dtype(asked.config.train, device)
    built = transformer.build(model, dtype=dtype)
    if config.text.stored == "projected":
        transformer.skip_projection(built)
    told = None
    if asked.trains:
        built.told = told = adapter.inject(
            built, config.lora, targets.match(config.lora, transformer.linear_names(built))
        )
    elif finished:
        adapter.attach(built, finished, device=device)
    streamed = chosen.strategy == "stream"
    again = "none" if streamed else chosen.recompute  # streaming computes again by itself
    recompute.apply(built, again, rank=targets.thin(config.lora), compiler=compiler, told=told)
    frozen_linear.swap(built, chosen.precision, dtype=dtype, device=device)
    _shard(built, asked, chosen.strategy, device)
    added, kept = reading.presets(config.lora), _rounded(asked, chosen, model)
    transformer.load_weights(built, model, device=device, host_blocks=streamed, added=added, rounded=kept)
    if asked.trains:
        adapter.initialise(built, seed=config.train.seed, device=device)
    elif finished:
        adapter.measure(built, device=device)
    if streamed:
        stream.Stream(transformer.blocks(built), device, told=told)
    return built.train(asked.trains)


def _rounded(asked: Job, chosen: Placement, model: ModelFolder) -> Rounded | None:
    """Where weights are kept as they were rounded: by the model's files, the precision, and presets."""
    place, kind = asked.config.cluster.rounded, chosen.precision.removesuffix(MATMUL)
    if place is None or kind not in BITS:
        return None
    lora = asked.config.lora
    presets = [reading.preset_hashes(lora), list(lora.preset_scales)]
    name = digest([model.likeness("transformer"), kind, *presets])[:16]
    rank = dist.get_rank() if asked.world > 1 else 0
    shared = chosen.strategy in ("fsdp", "hsdp")
    return Rounded(Path(place) / f"{kind}-{name}", writes=shared or rank % asked.local == 0)


def _shard(built: Any, asked: Job, strategy: str, device: torch.device) -> None:
    world, local = asked.world, asked.local
    if world == 1:
        return  # one process holds all of it anyway, needs no group, and the hooks would cost 4 ms a step
    if strategy == "fsdp":
        transformer.shard(built, init_device_mesh(device.type, (world,)))
    elif strategy == "hsdp":
        names = ("replicate", "shard")
        transformer.shard(built, init_device_mesh(device.type, (world // local, local), mesh_dim_names=names))
