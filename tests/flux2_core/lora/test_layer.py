"""A Linear under its adapter, against peft's: its names, its bits in fp32, nearer to the truth in bf16, less work."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flux2_core import accelerator
from flux2_core.accelerator import CPU
from flux2_core.config.adapter import Lora
from flux2_core.config.sections import Model
from flux2_core.lora import adapter, layer
from flux2_core.lora.kinds import KINDS
from flux2_core.lora.targets import match
from flux2_core.model import transformer
from flux2_core.model.folder import resolve
from flux2_core.model.frozen_linear import FrozenLinear, quantise, widen
from tests.flux2_core.placement.test_recompute import gradients

M, K, N, RANK = 24, 64, 96, 4


def peft_on(model: Any, lora: Lora, targets: list[str]) -> Any:
    """The model under peft's own layers."""
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha or lora.rank, use_rslora=lora.kind == "rslora", target_modules=targets
    )
    return inject_adapter_in_model(settings, model, adapter_name="default")


@pytest.mark.parametrize("given", [{}, {"alpha": 1.3}, {"kind": "rslora", "targets": "attention"}])
def test_in_fp32_it_is_peft_to_the_last_bit(tiny_model: Path, given: dict[str, Any]) -> None:
    """Parameters of the same names in the same order; prediction and every gradient equal, whatever the strength."""
    folder, lora = resolve(Model(path=str(tiny_model)), parts=("transformer",)), Lora(rank=RANK, **given)
    ours = transformer.build(folder, dtype=torch.float32)
    transformer.load_weights(ours, folder, device=CPU)
    targets = match(lora, transformer.linear_names(ours))
    theirs = peft_on(copy.deepcopy(ours), lora, targets)
    adapter.inject(ours, lora, targets)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(p.shape, generator=generator) * 0.1 for n, p in adapter.parameters(ours)}
    for model in (ours, theirs):
        adapter.load(model, weights, device=CPU)
    found, wanted = gradients(ours), gradients(theirs)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].any() for name in wanted)


def linear(precision: str) -> tuple[layer.AdaptedLinear, torch.Tensor]:
    """One adapted Linear in bf16 whose every weight counts, and what its base stands for."""
    generator = torch.Generator().manual_seed(2)
    base = nn.Linear(K, N, bias=False).requires_grad_(False)
    base.weight.copy_(torch.randn(N, K, generator=generator))
    kind = KINDS["lora"]
    made = layer.AdaptedLinear(base.bfloat16(), "lora", kind.shapes(K, N, RANK, 0), kind.run, factor=1.3)
    whole = base.weight.float()
    if precision != "bf16":
        made.base_layer = frozen = FrozenLinear(K, N, precision, torch.bfloat16)
        payload, scale = quantise(whole, precision)
        frozen.payload, frozen.scale = (nn.Parameter(each, requires_grad=False) for each in (payload, scale))
        whole = widen(payload, scale, precision, torch.float32)
    for part in (made.lora_A[layer.ADAPTER], made.lora_B[layer.ADAPTER]):
        part.weight = nn.Parameter(torch.randn(part.weight.shape, generator=generator))
    return made, whole


def passed(module: Any, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of the input and of both factors."""
    x = x.clone().requires_grad_()
    with accelerator.autocast(CPU, torch.bfloat16):
        y = module(x)
    factors = [p for p in module.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y, [x, *factors], dy.to(y.dtype))]


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_bf16_it_is_nearer_than_peft(precision: str, dtype: torch.dtype) -> None:
    """Output and gradients are off the exact ones by no more than peft's, one rounding (0.4 %), whatever the base holds
    and comes in; gradients of the factors are fp32."""
    made, whole_NK = linear(precision)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, M // 2, K, generator=generator).to(dtype)
    dy = torch.randn(2, M // 2, N, generator=generator).bfloat16()
    theirs = peft_on(nn.ModuleDict({"it": nn.Linear(K, N, bias=False)}), Lora(rank=RANK, alpha=1.3 * RANK), ["it"])[
        "it"
    ]
    theirs.base_layer = made.base_layer
    a, b = (part[layer.ADAPTER].weight for part in (made.lora_A, made.lora_B))
    theirs.lora_A[layer.ADAPTER].weight, theirs.lora_B[layer.ADAPTER].weight = a, b
    exact_x, exact_a, exact_b = (each.detach().double().requires_grad_() for each in (x, a, b))
    exact = exact_x @ (whole_NK.double() + 1.3 * exact_b @ exact_a).T
    wanted = [exact, *torch.autograd.grad(exact, [exact_x, exact_a, exact_b], dy.double())]
    found = passed(made, x, dy)
    assert [each.dtype for each in found] == [torch.bfloat16, dtype, torch.float32, torch.float32]
    for ours, peft, truth in zip(found, passed(theirs, x, dy), wanted, strict=True):
        error, their_error = (float(((each - truth).norm() / truth.norm()).detach()) for each in (ours, peft))
        assert error <= 0.008
        assert error <= 1.02 * their_error


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_what_a_sample_is_told_counts_both_ways(precision: str) -> None:
    """A factor for each sample and rank is on its thin product and on the gradients through it, in bf16 too."""
    made, whole_NK = linear(precision)
    generator = torch.Generator().manual_seed(4)
    x, told_B1R = torch.randn(2, M // 2, K, generator=generator), torch.tensor([[[0.0, 1, 1, 2]], [[1.25, 0, 1, 0]]])
    dy = torch.randn(2, M // 2, N, generator=generator).bfloat16()
    made.told_B1R = told_B1R
    a, b = (part[layer.ADAPTER].weight for part in (made.lora_A, made.lora_B))
    exact_x, exact_a, exact_b = (each.detach().double().requires_grad_() for each in (x, a, b))
    exact = exact_x @ whole_NK.double().T + 1.3 * (exact_x @ exact_a.T * told_B1R) @ exact_b.T
    wanted = [exact, *torch.autograd.grad(exact, [exact_x, exact_a, exact_b], dy.double())]
    for found, truth in zip(passed(made, x, dy), wanted, strict=True):
        assert float(((found - truth).norm() / truth.norm()).detach()) <= 0.008
    base = made.base_layer
    held = (base.payload, base.scale) if isinstance(base, FrozenLinear) else (base.weight, None)
    torch.library.opcheck(
        layer.adapted, (x.bfloat16().requires_grad_(), *held, precision, a, b, 0.5, told_B1R),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


class Watching(TorchDispatchMode):
    """Writes down what is called on anything as large as an input or an output."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        view = function._schema.returns[0].alias_info is not None and not function._schema.is_mutable
        if not view and any(each.numel() >= M * K for each in tree_leaves(found)):
            self.called.append(function.overloadpacket.__name__)
        return found


def test_nothing_large_is_made_but_products() -> None:
    """A pass makes one tensor of the output's size, and the way back one of the input's: no copy in fp32, no sum and no
    multiplied output beside them, where peft makes ten."""
    made, _ = linear("bf16")
    x, dy = torch.randn(M, K).bfloat16(), torch.randn(M, N).bfloat16()
    with Watching() as watching:
        passed(made, x, dy)
    assert watching.called == ["clone", "adapted", "mm", "addmm_"]


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8-matmul"])
def test_the_operator_keeps_its_contract(precision: str) -> None:
    """torch's own checks of a custom operator pass: schema, fake tensors, autograd registration."""
    made, _ = linear(precision)
    a, b = (part[layer.ADAPTER].weight for part in (made.lora_A, made.lora_B))
    base = made.base_layer
    held = (base.payload, base.scale) if isinstance(base, FrozenLinear) else (base.weight, None)
    x = torch.randn(2, M, K).bfloat16().requires_grad_()
    torch.library.opcheck(
        layer.adapted, (x, *held, precision, a, b, 0.5),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )  # fmt: skip


def test_its_flop_are_counted() -> None:
    """torch's counter finds in the operator what it finds in plain products: the base's twice, and the thin ones'."""
    made, _ = linear("bf16")
    with FlopCounterMode(display=False) as counter:
        made(torch.randn(M, K, requires_grad=True)).backward(torch.randn(M, N).bfloat16())
    thin = 2 * M * RANK * (K + N)
    into_the_gradient = 2 * M * RANK * K  # addmm_, which torch's counter leaves out
    assert counter.get_total_flops() == 2 * (2 * M * K * N) + 3 * thin - into_the_gradient


def test_switched_off_it_is_its_base() -> None:
    """Inside `switched_off` the adapter adds nothing, and after it all of it again."""
    made, whole_NK = linear("bf16")
    x = torch.randn(M, K).bfloat16()
    worn = made(x)
    with adapter.switched_off(nn.ModuleList([made])):
        assert torch.equal(made(x), nn.functional.linear(x, whole_NK.bfloat16()))
    assert torch.equal(made(x), worn)
    assert not torch.equal(worn, made.base_layer(x))
