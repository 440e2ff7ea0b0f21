"""Streaming: when each block's weights travel, and that none stays; its gradients are tested by the trainer."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flux2_core.accelerator import CPU
from flux2_core.config.sections import Lora, Model
from flux2_core.lora import adapter
from flux2_core.model import transformer
from flux2_core.model.folder import resolve
from flux2_core.placement.stream import Stream
from tests.flux2_core.placement.test_recompute import gradients


def watched(log: list[str], place: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    log.append(f"run {place}")
    return forward(*args, **kwargs)


def test_weights_travel_just_ahead_of_their_use(tiny_model: Path) -> None:
    """Each block's weights are asked for before the block before it computes, once in each pass but for the last
    block's, which the backward pass begins with (block 1's wait for the next step); two blocks' are there at a time,
    and in the end every parameter is at home."""
    folder = resolve(Model(path=str(tiny_model)), parts=("transformer",))
    built = transformer.build(folder, dtype=torch.float32)
    names = transformer.linear_names(built)
    adapter.inject(built, Lora(rank=4), [name for name in names if name.endswith("to_out.0") or "to_qkv_mlp" in name])
    transformer.load_weights(built, folder, device=CPU)
    adapter.initialise(built, seed=0, device=CPU)
    log: list[str] = []
    for place, block in enumerate(transformer.blocks(built)):
        block.forward = functools.partial(watched, log, place, block.forward)
    stream = Stream(built, CPU)
    home = [weight for weights in stream.host for _, weight in weights]
    blocks = {id(weights[0][1]): place for place, weights in enumerate(stream.host)}
    bring = stream.lane.bring

    def brought(weights: list[torch.Tensor]) -> Any:
        log.append(f"bring {blocks[id(weights[0])]}")
        assert len(stream.there) <= 1, "with this one there are two"
        return bring(weights)

    stream.lane.bring = brought  # type: ignore[method-assign]
    gradients(built)
    assert log == [
        "bring 0", "bring 1", "run 0", "bring 2", "run 1", "bring 3", "run 2", "run 3",
        "bring 2", "run 3", "bring 1", "run 2", "bring 0", "run 1", "bring 1", "run 0",
    ]  # fmt: skip
    parameters = [parameter for weights in stream.host for parameter, _ in weights]
    assert all(p.data_ptr() == weight.data_ptr() for p, weight in zip(parameters, home, strict=True))
