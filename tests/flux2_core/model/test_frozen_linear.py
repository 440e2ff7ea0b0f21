"""Few-bit frozen Linears: how near they are, what one copy gives in both passes, and whose weights they take."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from flux2_core import accelerator
from flux2_core.config.sections import Lora, Model
from flux2_core.errors import SetupError
from flux2_core.lora import adapter, targets
from flux2_core.model import frozen_linear, quanto, transformer
from flux2_core.model.folder import resolve
from flux2_core.model.frozen_linear import FrozenLinear, multiply, quantise, widen

CPU = torch.device("cpu")
PRECISIONS = ("int8", "fp8", "int4", "int8-matmul", "fp8-matmul")
WEIGHT_ERROR = {"int8": 0.013, "fp8": 0.035, "int4": 0.14}  # of the worst row
PRODUCT_ERROR = {"int8": 0.015, "fp8": 0.04, "int4": 0.16, "int8-matmul": 0.02, "fp8-matmul": 0.06}
FILE = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def weight_NK() -> torch.Tensor:
    """Rows of sizes that differ by a factor of 10,000, and one of zeros."""
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    weight *= torch.logspace(-2, 2, 96).unsqueeze(1)
    weight[7] = 0
    return weight


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_product_and_gradient_are_near(weight_NK: torch.Tensor, precision: str) -> None:
    """Forward and input gradient, both from the one payload, are within the format's rounding of the exact ones."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 33, 128, generator=rng, requires_grad=True)
    dy = torch.randn(2, 33, 96, generator=rng) / (weight_NK.norm(dim=1) + 1)  # every output weighs the same in dx
    payload, scale = quantise(weight_NK, precision)
    rebuilt = widen(payload, scale, precision, torch.float32)
    for found, wanted in zip(rebuilt, weight_NK, strict=True):
        assert (found - wanted).norm() <= WEIGHT_ERROR[precision.removesuffix("-matmul")] * wanted.norm()
    wanted = nn.functional.linear(x, weight_NK)
    found = multiply(x, payload, scale, precision)
    for row in range(96):
        assert off(found[..., row], wanted[..., row]) < PRODUCT_ERROR[precision] or row == 7
    assert not found[..., 7].any()
    gradients = [torch.autograd.grad(y, x, dy)[0] for y in (found, wanted)]
    assert off(*gradients) < PRODUCT_ERROR[precision]


@pytest.mark.parametrize("precision", ["int8-matmul", "fp8-matmul"])
def test_eight_bit_product_is_the_definition(weight_NK: torch.Tensor, precision: str) -> None:
    """y = (rounded x)(rounded W)^T and dx = (rounded dy * scale)(payload): against the matrices written out in fp64."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(17, 128, generator=rng, requires_grad=True)
    dy = torch.randn(17, 96, generator=rng)
    payload, scale = quantise(weight_NK, precision)
    stored = (payload if precision == "int8-matmul" else payload.view(torch.float8_e4m3fn)).double()

    def rounded(rows: torch.Tensor) -> torch.Tensor:
        most = 127 if precision == "int8-matmul" else 448
        scales = rows.abs().amax(1, keepdim=True) / most
        values = rows / scales
        levels = values.round() if most == 127 else values.to(torch.float8_e4m3fn).float()
        return levels.double() * scales.double()

    y = multiply(x, payload, scale, precision)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(y.double(), rounded(x.detach()) @ (stored * scale.double()).T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(dx.double(), rounded(dy * scale.view(-1)) @ stored, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("precision", ["int8-matmul", "fp8-matmul"])
def test_a_card_multiplies_by_columns(weight_NK: torch.Tensor, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """On a GPU the right factor of both products lies column by column, as cuBLAS serves it well: also the gradient's,
    whose payload lies row by row. The values are those of a CPU, every bit."""
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(17, 128, generator=rng, requires_grad=True)
    dy, layouts, found = torch.randn(17, 96, generator=rng), [], []
    in_int8 = torch._int_mm

    def seen(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        layouts.append((tuple(right.shape), right.stride()))
        return in_int8(left, right)

    def in_fp8(
        left: torch.Tensor, right: torch.Tensor, *, scale_a: torch.Tensor, scale_b: torch.Tensor, **_: Any
    ) -> Any:
        layouts.append((tuple(right.shape), right.stride()))
        return left.float() @ right.float() * scale_a * scale_b

    for on_gpu in (False, True):
        monkeypatch.setattr(accelerator, "is_gpu", lambda _device, on_gpu=on_gpu: on_gpu)
        y = multiply(x, *quantise(weight_NK, precision), precision)
        found.append((y, *torch.autograd.grad(y, x, dy)))
        monkeypatch.setattr(torch, "_int_mm", seen)
        monkeypatch.setattr(torch, "_scaled_mm", in_fp8)
    assert layouts == [((128, 96), (1, 128)), ((96, 128), (1, 96))]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_stand_alone(weight_NK: torch.Tensor, precision: str) -> None:
    """A shard of rows, quantised alone, has the bytes of those rows in the whole: what loading in shards relies on."""
    whole = quantise(weight_NK, precision)
    part = quantise(weight_NK[30:59], precision)
    assert all(torch.equal(w[30:59], p) for w, p in zip(whole, part, strict=True))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_autograd_keeps_only_the_payload(weight_NK: torch.Tensor, precision: str) -> None:
    """For the backward pass nothing is kept but the parameters themselves: no widened weight, no input."""
    kept: list[torch.Tensor] = []
    payload, scale = quantise(weight_NK, precision)
    x = torch.randn(4, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        multiply(x, payload, scale, precision)
    assert {t.data_ptr() for t in kept} == {payload.data_ptr(), scale.data_ptr()}


def test_operator_keeps_its_contract(weight_NK: torch.Tensor) -> None:
    """torch's own checks of a custom operator pass: schema, fake tensors, autograd registration."""
    for precision in PRECISIONS:
        x = torch.randn(18, 128, requires_grad=True)
        torch.library.opcheck(
            multiply, (x, *quantise(weight_NK, precision), precision),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )  # fmt: skip


def test_only_block_linears_are_swapped(tiny_model: Path) -> None:
    """Embedders, modulations and output layers keep their weights; adapters stay fp32 Linears; bytes are few."""
    built = transformer.build(resolve(Model(path=str(tiny_model)), parts=("transformer",)), dtype=torch.float32)
    adapter.inject(built, Lora(rank=2), targets.match(Lora(), transformer.linear_names(built)))
    before = {name for name, module in built.named_modules() if type(module) is nn.Linear}
    frozen_linear.swap(built, "int8", dtype=torch.float32, device=CPU)
    swapped = {name for name, module in built.named_modules() if isinstance(module, FrozenLinear)}
    assert swapped == {name for name in before if "transformer_blocks." in name and ".lora_" not in name}
    assert any(name.startswith("x_embedder") for name in before - swapped)
    assert len([name for name in before - swapped if ".lora_" in name]) == 2 * len(swapped)


def quanto_files(model: Path, folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """Copy a model with its block Linears as optimum-quanto writes them; return what quanto makes of them."""
    shutil.copytree(model / "transformer", folder / "transformer")
    shutil.copy(model / "model_index.json", folder)
    tensors, rebuilt = load_file(folder / FILE), {}
    for name in [n for n in tensors if "transformer_blocks." in n and tensors[n].ndim == 2]:
        data, scale, _ = quanto.quantize(tensors.pop(name).bfloat16(), kind)
        rebuilt[name] = quanto.dequantize(data, scale, None)
        tensors |= {f"{name}._data": data, f"{name}._scale": scale}
        tensors[name.replace(".weight", ".input_scale")] = torch.ones(())
    save_file(tensors, folder / FILE)
    return rebuilt


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_takes_quantos_weights_bit_for_bit(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    """A model saved by optimum-quanto loads as it is: the bf16 weights that we rebuild are quanto's, every bit."""
    wanted = quanto_files(tiny_model, tmp_path, kind)
    model = resolve(Model(path=str(tmp_path)), parts=("transformer",))
    built = transformer.build(model, dtype=torch.bfloat16)
    frozen_linear.swap(built, kind, dtype=torch.bfloat16, device=CPU)
    transformer.load_weights(built, model, device=CPU)
    modules = {f"{n}.weight": m for n, m in built.named_modules() if isinstance(m, FrozenLinear)}
    assert modules.keys() == wanted.keys()
    for name, module in modules.items():
        assert torch.equal(widen(module.payload, module.scale, kind, torch.bfloat16), wanted[name]), name
    other = {"int8": "fp8", "fp8": "int8"}[kind]
    for precision, message in ((other, "set int8 or fp8, as the files were written"), ("bf16", "Linears of blocks")):
        built = transformer.build(model, dtype=torch.bfloat16)
        frozen_linear.swap(built, precision, dtype=torch.bfloat16, device=CPU)
        with pytest.raises(SetupError, match=message):
            transformer.load_weights(built, model, device=CPU)
