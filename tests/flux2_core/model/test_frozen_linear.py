"""Few-bit frozen Linears: how near they are, what one copy gives in both passes, and whose weights they take."""

import importlib
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import flux2_core.model
from flux2_core import accelerator
from flux2_core.config.adapter import Lora
from flux2_core.config.sections import Model
from flux2_core.errors import SetupError
from flux2_core.lora import adapter, targets
from flux2_core.model import frozen_linear, quanto, transformer
from flux2_core.model.folder import resolve
from flux2_core.model.frozen_linear import FrozenLinear, multiply, quantise, widen

CPU = torch.device("cpu")
PRECISIONS = ("int8", "fp8", "int4", "nf4", "int8-matmul", "fp8-matmul")
WEIGHT_ERROR = {"int8": 0.013, "fp8": 0.035, "int4": 0.14, "nf4": 0.13}  # of the worst row
PRODUCT_ERROR = {"int8": 0.015, "fp8": 0.04, "int4": 0.16, "nf4": 0.14, "int8-matmul": 0.02, "fp8-matmul": 0.06}
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


class Place:
    """A pointer of the pretended Triton: a tensor and how far into it."""

    def __init__(self, memory: torch.Tensor, at: Any = 0) -> None:
        whole = memory.untyped_storage().nbytes() // memory.element_size()
        self.memory, self.at = memory.as_strided((whole,), (1,), 0), at

    def __add__(self, more: Any) -> "Place":
        return Place(self.memory, self.at + more)


def stored(place: Place, values: torch.Tensor, mask: Any = True) -> None:
    at, values, mask = (torch.atleast_1d(torch.as_tensor(each)) for each in (place.at, values, mask))
    place.memory[at[mask]] = values[mask]


def loaded(place: Place, mask: torch.Tensor, other: float) -> torch.Tensor:
    return torch.where(mask, place.memory[place.at.clamp(max=len(place.memory) - 1)], other)


class Launched:
    """A kernel that runs its programs one after the other."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*given: Any) -> None:
            for row in range(grid[0]):
                sys.modules["triton.language"].program_id = lambda _axis, row=row: torch.tensor(row)  # type: ignore
                self.function(*(Place(each) if torch.is_tensor(each) else each for each in given))

        return launch


LANGUAGE = {
    "int64": torch.int64, "float32": torch.float32, "float8e4nv": torch.float8_e4m3fn, "constexpr": int,
    "arange": torch.arange, "zeros": lambda shape, dtype: torch.zeros(shape, dtype=dtype), "abs": torch.abs,
    "maximum": torch.maximum, "max": torch.amax, "where": torch.where, "load": loaded, "store": stored,
    "div_rn": torch.div,
}  # fmt: skip


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton, as far as the kernel goes, and a device that has it."""
    language, pretended = types.ModuleType("triton.language"), types.ModuleType("triton")
    vars(language).update(LANGUAGE)
    vars(pretended).update(jit=Launched, language=language)
    for name, module in {"triton": pretended, "triton.language": language}.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield
    sys.modules.pop("flux2_core.model.round_rows")
    vars(flux2_core.model).pop("round_rows")
    frozen_linear._kernel.cache_clear()


@pytest.mark.parametrize("width", [64, 5000, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weighed", [False, True])
def test_the_kernel_rounds_as_the_eager_form(
    triton: None, monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype, weighed: bool
) -> None:
    """What the kernel says, run by torch in Triton's place: payload and scales are the eager form's, every bit, for
    rows of all sizes, rows of zeros, rows shorter and longer than a piece, cut out of a wider matrix."""
    rng = torch.Generator().manual_seed(width)
    x = (torch.randn(6, width + 3, generator=rng) * torch.logspace(-6, 4, 6).unsqueeze(1)).to(dtype)[:, :width]
    x[2] = 0
    columns = torch.rand(width, generator=rng) if weighed else None
    wanted = frozen_linear._round_rows(x, columns, fp8=True)
    monkeypatch.setattr(accelerator, "has_triton", lambda _device: True)
    frozen_linear._kernel.cache_clear()
    found = frozen_linear._round_rows(x, columns, fp8=True)
    assert "flux2_core.model.round_rows" in sys.modules
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[0].view(torch.uint8), wanted[0].view(torch.uint8))


@pytest.mark.gpu
def test_the_kernel_on_a_card() -> None:
    """On a card the kernel's bits are those of the eager form on the CPU."""
    x = torch.randn(64, 9000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 64).unsqueeze(1)
    columns = torch.rand(9000, generator=torch.Generator().manual_seed(1))
    assert accelerator.has_triton(accelerator.here())
    for weights in (None, columns):
        wanted = frozen_linear._round_rows(x, weights, fp8=True)
        there = None if weights is None else weights.to(accelerator.here())
        found = frozen_linear._round_rows(x.to(accelerator.here()), there, fp8=True)
        assert torch.equal(found[1].cpu(), wanted[1])
        assert torch.equal(found[0].view(torch.uint8).cpu(), wanted[0].view(torch.uint8))


def test_nf4_is_bitsandbytes(weight_NK: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same levels and the same scales as bitsandbytes rounds to, in groups of 64: equal to the bit."""
    monkeypatch.syspath_prepend(str(Path(sys.prefix) / "extras"))
    functional = importlib.import_module("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight_NK, quant_type="nf4", blocksize=64)
    payload, scale = quantise(weight_NK, "nf4")
    assert torch.equal(scale.flatten(), state.absmax)
    assert torch.equal((payload << 4 | payload >> 4).flatten(), packed.flatten()), "it keeps the first value above"
    assert torch.equal(widen(payload, scale, "nf4", torch.float32), functional.dequantize_4bit(packed, state))
