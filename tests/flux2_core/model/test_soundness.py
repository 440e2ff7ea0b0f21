"""R5: unsound latents are named before they are stored; sound ones pass."""

import pytest
import torch

from flux2_core.errors import DataError
from flux2_core.model.soundness import check_latent

SOUND = torch.linspace(-3, 3, 128 * 4 * 6).view(128, 4, 6)


def spoilt(value: float) -> torch.Tensor:
    latent = SOUND.clone()
    latent[5, 1, 2] = value
    return latent


CASES = {
    "one NaN": (spoilt(float("nan")), "NaN"),
    "one infinity": (spoilt(float("inf")), "infinity"),
    "one negative infinity": (spoilt(float("-inf")), "infinity"),
    "all zeros": (torch.zeros(128, 4, 6), "nothing but zeros"),
    "half the channels": (SOUND[:64], r"shape \(64, 4, 6\), \(128, 4, 6\) is right"),
    "turned": (SOUND.transpose(1, 2), "shape"),
    "not patchified": (torch.ones(32, 8, 12), "shape"),
    "another precision": (SOUND.bfloat16(), "torch.bfloat16 where the table holds torch.float32"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_unsound_latent_is_named(case: str) -> None:
    """Each defect has its words."""
    latent, words = CASES[case]
    with pytest.raises(DataError, match=words):
        check_latent(latent, height=4, width=6, dtype=torch.float32)


def test_fp16_overflow_is_found_after_rounding() -> None:
    """65520 is finite in fp32 and infinite in fp16; what is judged is what would be stored."""
    large = spoilt(65520.0)
    check_latent(large, height=4, width=6, dtype=torch.float32)
    with pytest.raises(DataError, match=r'latents\.dtype="fp32"'):
        check_latent(large.half(), height=4, width=6, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_sound_latent_passes(dtype: torch.dtype) -> None:
    """No error in any precision."""
    check_latent(SOUND.to(dtype), height=4, width=6, dtype=dtype)
