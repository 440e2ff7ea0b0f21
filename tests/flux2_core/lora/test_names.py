"""Names of tensors: what BFL's fused Linears make of an adapter whose ranks differ."""

import pytest
import torch

from flux2_core.lora import file, names

Q, K, V = (f"transformer_blocks.0.attn.{part}" for part in ("to_q", "to_k", "to_v"))
FUSED = "diffusion_model.double_blocks.0.img_attn.qkv"


def adapter_of(ranks: dict[str, int], *, width: int = 6) -> names.Adapter:
    """Random weights of these ranks."""
    generator = torch.Generator().manual_seed(0)
    adapter = {}
    for module, rank in ranks.items():
        adapter[f"{module}.{names.A}"] = torch.randn(rank, width, generator=generator)
        adapter[f"{module}.{names.B}"] = torch.randn(width, rank, generator=generator)
    return adapter


@pytest.mark.parametrize("ranks", [{Q: 2, K: 5, V: 1}, {V: 3, Q: 1}, {K: 4}])
def test_a_fusion_of_different_ranks_is_exact(ranks: dict[str, int]) -> None:
    """Three updates of different ranks, or of some of the three, are the fused update; taken apart they come back."""
    adapter = adapter_of(ranks)
    updates = {module: adapter[f"{module}.{names.B}"] @ adapter[f"{module}.{names.A}"] for module in ranks}
    named = file.to_comfyui(adapter)
    assert named.keys() == {f"{FUSED}.{names.A}", f"{FUSED}.{names.B}"}
    a_RI, b_OR = named[f"{FUSED}.{names.A}"], named[f"{FUSED}.{names.B}"]
    assert len(a_RI) == 3 * max(ranks.values())
    wanted = torch.cat([updates.get(module, torch.zeros(6, 6)) for module in (Q, K, V)])
    assert torch.equal(b_OR @ a_RI, wanted)
    parts = names.split(a_RI, b_OR)
    assert {(Q, K, V)[third] for third in parts} == set(ranks)
    assert all(torch.equal(b @ a, updates[(Q, K, V)[third]]) for third, (a, b) in parts.items())
