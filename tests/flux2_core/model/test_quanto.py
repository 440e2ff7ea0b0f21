"""Small weights of the text encoder: quanto's numbers, by plain torch."""

import pytest
import torch
from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qtypes, quantize_weight

from flux2_core.model.quanto import QTYPES, QuantizedLinear, dequantize, quantize

ERRORS = {"int8": 0.01, "fp8": 0.035, "int4": 0.12}  # relative, of a product with normal weights and inputs
BYTES = {"int8": 1.01, "fp8": 1.01, "int4": 0.55}  # a weight, scales included, in bf16


def weight(outputs: int = 96, inputs: int = 256, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", QTYPES)
def test_error_and_size(kind: str, dtype: torch.dtype) -> None:
    """A product is within the stated error in every precision, and the weight takes the stated bytes."""
    plain, x = weight(dtype=dtype), weight(20, dtype=dtype)
    small = QuantizedLinear(plain, None, kind=kind)
    with torch.inference_mode():
        made, wanted = small(x).float(), torch.nn.functional.linear(x, plain).float()
    assert (made - wanted).norm() / wanted.norm() < ERRORS[kind]
    assert not any(parameter.requires_grad for parameter in small.parameters())
    if dtype == torch.bfloat16:
        assert sum(p.numel() * p.itemsize for p in small.parameters()) / plain.numel() < BYTES[kind]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_the_numbers_are_quantos(kind: str) -> None:
    """8-bit weights equal those of quanto's own tensor bit for bit."""
    plain, qtype = weight(), qtypes[QTYPES[kind]]
    theirs = quantize_weight(plain, qtype, 0, AbsmaxOptimizer()(plain, qtype=qtype, axis=0), optimized=False)
    assert torch.equal(dequantize(*quantize(plain, kind)), theirs.dequantize())


@pytest.mark.parametrize("inputs", [256, 96, 48])
def test_four_bits_against_the_definition(inputs: int) -> None:
    """An int4 value is its group's least value plus 0..15 steps of a fifteenth of the group's range."""
    plain = weight(inputs=inputs)
    group = 128 if inputs % 128 == 0 else inputs
    back = dequantize(*quantize(plain, "int4")).view(-1, group)
    least, most = plain.view(-1, group).aminmax(dim=1, keepdim=True)
    steps = (back - least) / ((most - least) / 15)
    assert (steps - steps.round()).abs().max() < 1e-4
    assert steps.min() > -0.5
    assert steps.max() < 15.5
    assert (back - plain.view(-1, group)).abs().max() <= ((most - least) / 30).max() * 1.001
    scale, shift = MaxOptimizer()(plain, qtype=qtypes["qint4"], axis=0, group_size=group)
    assert torch.equal(quantize(plain, "int4")[1], scale)
    assert torch.equal(-shift, least)


@pytest.mark.parametrize("kind", QTYPES)
def test_rows_of_zeros_stay_zero(kind: str) -> None:
    """A row without any value has no scale; it comes back as zeros, not as NaN."""
    plain = weight()
    plain[3] = 0
    back = dequantize(*quantize(plain, kind)).view(plain.shape)
    assert torch.equal(back[3], torch.zeros(plain.shape[1]))
    assert torch.isfinite(back).all()


def test_a_bias_is_added() -> None:
    """A Linear with a bias keeps it as it is."""
    plain, bias = weight(), torch.randn(96)
    with_bias, without = QuantizedLinear(plain, bias, kind="int8"), QuantizedLinear(plain, None, kind="int8")
    x = weight(4)
    torch.testing.assert_close(with_bias(x), without(x) + bias)
