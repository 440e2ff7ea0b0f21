"""Prompt rows: bytes and back, pads rebuilt."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from flux2_core.cache.prompt_rows import PAD_KEY, decode, encode, full, pad_row, size_bytes, width
from flux2_core.errors import DataError
from flux2_core.model.tensor_bytes import DTYPES, from_bytes, to_bytes
from flux2_core.store.row import Row


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_and_back(dtype: str) -> None:
    """Every dtype comes back bit for bit, NaN, infinities and negative zero too, also from a transposed tensor."""
    rows = torch.randn(3, 4).to(DTYPES[dtype])
    rows[0, :3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    for given in (rows, rows.T.contiguous().T):
        back = from_bytes(memoryview(to_bytes(given)), dtype=dtype, width=4)
        assert back.dtype == rows.dtype
        assert torch.equal(back.view(torch.uint8), rows.view(torch.uint8))


def test_no_copy_is_made() -> None:
    """Stored bytes are viewed, not copied."""
    buffer = bytearray(to_bytes(torch.zeros(2, 3)))
    rows = from_bytes(memoryview(buffer), dtype="fp32", width=3)
    buffer[:4] = to_bytes(torch.ones(1))
    assert rows[0, 0] == 1


def test_empty_and_broken() -> None:
    """No rows are no rows; bytes that are no whole rows are refused."""
    assert from_bytes(b"", dtype="bf16", width=5).shape == (0, 5)
    with pytest.raises(DataError, match="11 bytes is not a multiple of 3 fp32"):
        from_bytes(b"x" * 11, dtype="fp32", width=3)


class Stored:
    """Rows in memory, read as `store.reader.Reader` reads them."""

    def __init__(self, rows: dict[str, Row]) -> None:
        self.rows = rows

    def size(self, key: str) -> int:
        return len(self.rows[key].payload)

    def fetch(self, keys: Sequence[str]) -> list[Row]:
        return [self.rows[key] for key in keys]

    def fetch_into(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[Row]:
        for key, buffer in zip(keys, buffers, strict=True):
            buffer[:] = self.rows[key].payload
        return self.fetch(keys)


def table(length: int = 5, **changed: Any) -> dict[str, Any]:
    plain = {"dtype": "fp32", "width": 3, "max_length": length, "pads": "skipped", "family": "dev"}
    return plain | changed


def stored(rows: dict[str, torch.Tensor], fingerprint: dict[str, Any], tokens: dict[str, int] | None = None) -> Stored:
    counts = {key: len(own) for key, own in rows.items()} | (tokens or {})
    return Stored({key: Row(key, encode(own, fingerprint), {"tokens": counts[key]}) for key, own in rows.items()})


@pytest.mark.parametrize("extra", [{}, {"dtype": "bf16"}, {"dtype": "bf16", "int8_rows": True}])
def test_prompts_against_the_definition(extra: dict[str, Any]) -> None:
    """Row l of a prompt is the pad row for l < L - n and own row l - (L - n) after, for every n from 1 to L."""
    fingerprint = table(**extra)
    dtype = DTYPES[fingerprint["dtype"]]
    rows = {str(n): torch.randn(n, 3).to(dtype) for n in range(1, 6)} | {PAD_KEY: torch.randn(1, 3).to(dtype)}
    reader = stored(rows, fingerprint)
    back = {key: decode(reader.rows[key].payload, fingerprint) for key in rows}
    pad_1D = pad_row(reader, fingerprint, pad_rows="reference")
    full_BLD = full(reader, list("12345"), fingerprint, pad_1D=pad_1D)
    assert (full_BLD.shape, full_BLD.dtype) == ((5, 5, 3), dtype)
    for place, n in enumerate(range(1, 6)):
        for row in range(5):
            wanted = back[PAD_KEY][0] if row < 5 - n else back[str(n)][row - (5 - n)]
            assert torch.equal(full_BLD[place, row], wanted)


@pytest.mark.parametrize("family", ["dev", "klein"])
@pytest.mark.parametrize("pads", ["skipped", "stored"])
def test_zeros_in_the_place_of_pads(family: str, pads: str) -> None:
    """`train.pad_rows="zeros"` blanks exactly the pads: before the prompt, behind it for klein, stored or not."""
    if (family, pads) == ("klein", "skipped"):
        return  # klein's tables are always full
    fingerprint = table(family=family, pads=pads)
    rows = {"a": torch.ones(2 if pads == "skipped" else 5, 3)}
    reader = stored(rows, fingerprint, tokens={"a": 2})
    zeros = pad_row(reader, fingerprint, pad_rows="zeros")
    blanked = full(reader, ["a"], fingerprint, pad_1D=zeros)[0, :, 0]
    assert blanked.tolist() == ([1, 1, 0, 0, 0] if family == "klein" else [0, 0, 0, 1, 1])
    if pads == "stored":
        assert pad_row(reader, fingerprint, pad_rows="reference") is None
        assert full(reader, ["a"], fingerprint, pad_1D=None).min() == 1


def test_rows_that_do_not_fit() -> None:
    """Too many rows, too few in a full table, or half a row are refused, with the length that was asked for."""
    pad = torch.zeros(1, 3)
    for count, pads in ((6, "skipped"), (6, "stored"), (4, "stored")):
        fingerprint = table(pads=pads)
        with pytest.raises(DataError, match=r"text\.max_length=5 asks for: run `cacheloom verify`"):
            full(stored({"a": torch.zeros(count, 3)}, fingerprint), ["a"], fingerprint, pad_1D=pad)
    half = Stored({"a": Row("a", b"x" * 7, {"tokens": 1})})
    for fingerprint in (table(), table(int8_rows=True, width=4)):
        with pytest.raises(DataError, match="7 bytes, which are not the rows of width"):
            full(half, ["a"], fingerprint, pad_1D=pad)
    with pytest.raises(DataError, match="7 stored bytes are not rows of 4 int8 values and a scale"):
        decode(b"x" * 7, table(int8_rows=True, width=4))


def test_int8_rows() -> None:
    """A value comes back within half a step of its row's largest, whole rows within 1.2 %; a byte a value is stored."""
    fingerprint = table(int8_rows=True, width=512, dtype="bf16")
    rows = (
        torch.randn(20, 512, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 20)[:, None]
    ).bfloat16()
    payload = encode(rows, fingerprint)
    assert len(payload) == 20 * (512 + 4) == size_bytes(20, table(int8_rows=True, width=512, length=512))
    back = decode(memoryview(payload), fingerprint)
    assert back.dtype == torch.bfloat16
    step_N1 = rows.float().abs().amax(1, keepdim=True) / 127
    assert ((back - rows).float().abs() <= 0.51 * step_N1 + 0.004 * rows.float().abs()).all()
    assert ((back - rows).float().norm(dim=1) / rows.float().norm(dim=1)).max() < 0.012
    assert torch.equal(decode(encode(back, fingerprint), fingerprint), back), "a second time changes nothing"
    assert decode(b"", fingerprint).shape == (0, 512)


def test_sizes() -> None:
    """A prompt of 163 tokens at FLUX.2-dev's widths takes 2.0 MB projected, 1.0 MB in 8 bits, 15.7 MB raw with pads."""
    dev = {"dtype": "bf16", "pads": "skipped", "max_length": 512}
    assert size_bytes(163, dev | {"width": 6144}) == 163 * 6144 * 2 == 2_002_944
    assert size_bytes(163, dev | {"width": 6144, "int8_rows": True}) == 163 * 6148
    assert size_bytes(900, dev | {"width": 6144}) == 512 * 6144 * 2
    assert size_bytes(163, dev | {"width": 15360, "pads": "stored"}) == 15_728_640


def test_width_is_the_fingerprints() -> None:
    """The width of a row is stated by its table."""
    assert width({"width": 96}) == 96
