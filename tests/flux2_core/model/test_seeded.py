"""Generators from seeds: the numbers that every run so far was drawn with."""

import torch

from flux2_core.model.seeded import generator, numpy_generator


def test_numbers_of_every_run_so_far() -> None:
    """A step's draws, an adapter's first weights and the order of samples are those of the first release."""
    drawn = generator(42, "draw", 3, 0)
    assert torch.randint(1000, (4,), generator=drawn).tolist() == [69, 113, 94, 243]
    first = generator(42, "transformer_blocks.0.attn.to_q.lora_A.weight")
    assert torch.randint(1000, (4,), generator=first).tolist() == [167, 903, 421, 359]
    assert numpy_generator(42, "samples", 64, 96, 1).permutation(8).tolist() == [1, 4, 3, 7, 2, 5, 0, 6]
