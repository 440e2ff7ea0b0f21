"""Recompute policies, also compiled; equal gradients are in test_training.py, kept bytes in test_placement.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from flux2_core import accelerator
from flux2_core.config.adapter import Lora
from flux2_core.config.sections import Model
from flux2_core.lora import adapter, targets
from flux2_core.model import frozen_linear, transformer
from flux2_core.model.folder import resolve
from flux2_core.model.latents import image_ids, text_ids
from flux2_core.placement import recompute
from flux2_core.placement.compiled import Compiled
from flux2_core.placement.planner import policies

CPU = torch.device("cpu")


def test_policy_of_each_block() -> None:
    """A word holds for all blocks; a number k makes the first k `full` and the others `selective`."""
    assert policies("none", 3) == ["none"] * 3
    assert policies(0, 3) == ["selective"] * 3
    assert policies(2, 3) == ["full", "full", "selective"]
    assert policies(9, 3) == ["full"] * 3


def adapted(model: Path, precision: str) -> Any:
    """A small model with an adapter that does something."""
    folder = resolve(Model(path=str(model)), parts=("transformer",))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    built = transformer.build(folder, dtype=dtype)
    adapter.inject(built, Lora(rank=4), targets.match(Lora(), transformer.linear_names(built)))
    frozen_linear.swap(built, precision, dtype=dtype, device=CPU)
    transformer.load_weights(built, folder, device=CPU)
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(p.shape, generator=generator) * 0.1 for n, p in adapter.parameters(built)}
    adapter.load(built, weights, device=CPU)
    return built.train()


def predicted(built: Any, height: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    with accelerator.autocast(CPU, built.proj_out.weight.dtype):
        prediction: torch.Tensor = built(
            hidden_states=torch.randn(2, height * 4, 128, generator=generator),
            encoder_hidden_states=torch.randn(2, 8, 96, generator=generator),
            timestep=torch.tensor([0.3, 0.7]), img_ids=image_ids(height, 4), txt_ids=text_ids(8),
            guidance=torch.ones(2), return_dict=False,
        )[0]  # fmt: skip
    return prediction


def gradients(built: Any, height: int = 4) -> dict[str, torch.Tensor]:
    prediction = predicted(built, height)
    built.zero_grad()
    prediction.square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in adapter.parameters(built)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "policy", "compiler"),
    [
        ("fp8-matmul", "selective", "eager"),
        ("bf16", "selective", "aot_eager"),
        *(
            pytest.param(precision, policy, "aot_eager", marks=pytest.mark.all_cases)
            for precision in ("fp32", "bf16", "int4", "fp8-matmul")
            for policy in ("none", "selective", "full", 2)
        ),
    ],
)
def test_compiled_blocks(tiny_model: Path, precision: str, policy: str | int, compiler: str) -> None:
    """Compiled with a policy, no block breaks its graph, blocks share graphs, and gradients agree within 1e-7."""
    built = adapted(tiny_model, precision)
    wanted = gradients(built)
    torch._dynamo.reset()
    counters.clear()
    recompute.apply(built, policy, rank=4, compiler=compiler and Compiled(compiler))
    found = gradients(built)  # a break would raise: every block is compiled with fullgraph
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 4 < len(transformer.blocks(built)) + 1
    assert all((found[n] - g).abs().max() <= 1e-7 * max(1.0, float(g.abs().max())) for n, g in wanted.items())
