"""Prompt rows: bytes and back, pads rebuilt."""

import pytest
import torch

from flux2_core.errors import DataError
from flux2_core.prompt_rows import DTYPES, from_bytes, rebuild, to_bytes, width


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


def test_rebuild_against_the_definition() -> None:
    """Row l of the result is the pad row for l < L - n and own row l - (L - n) after, for every n from 0 to L."""
    pad = torch.randn(1, 3)
    for n in range(6):
        own = torch.randn(n, 3)
        full = rebuild(own, pad, max_length=5)
        assert full.shape == (5, 3)
        for row in range(5):
            assert torch.equal(full[row], pad[0] if row < 5 - n else own[row - (5 - n)])


def test_rows_that_do_not_fit() -> None:
    """Too many rows, or too few in a full table, are refused; a full table comes back as it is."""
    pad = torch.zeros(1, 3)
    for own, there in ((torch.zeros(6, 3), pad), (torch.zeros(6, 3), None), (torch.zeros(4, 3), None)):
        with pytest.raises(DataError, match=r"text\.max_length=5"):
            rebuild(own, there, max_length=5)
    whole = torch.zeros(5, 3)
    assert torch.equal(rebuild(whole, None, max_length=5), whole)


def test_width_is_the_fingerprints() -> None:
    """The width of a row is stated by its table."""
    assert width({"width": 96}) == 96
