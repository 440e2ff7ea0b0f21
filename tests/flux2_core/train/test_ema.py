"""The moving average of the adapter, against its definition."""

import torch

from flux2_core.train import ema


def test_it_follows_the_definition() -> None:
    """a <- d a + (1 - d) w with d = min(decay, (1 + s) / (10 + s)), step by step."""
    rng = torch.Generator().manual_seed(0)
    average = {"a": torch.zeros(3, 4), "b": torch.ones(5)}
    wanted = {name: value.double().clone() for name, value in average.items()}
    for step in range(1, 60):
        weights = {name: torch.randn(value.shape, generator=rng) for name, value in average.items()}
        ema.update(average, weights, decay=0.75, step=step)
        kept = min(0.75, (1 + step) / (10 + step))
        wanted = {name: kept * wanted[name] + (1 - kept) * weights[name].double() for name in wanted}
        for name, value in wanted.items():  # at each step: after 59 nothing is left of how the average began
            assert torch.allclose(average[name].double(), value, atol=1e-6), step
