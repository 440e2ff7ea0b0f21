"""`[noise]` and `[loss]` through the trainer: what is set is what a step minimises, on one worker and on several."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flux2_core.config.sections import Config
from flux2_core.train.losses import LOSSES
from flux2_core.train.trainer import Trainer
from tests.in_process import fill_cache, process_group

Make = Callable[..., Config]


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    with process_group(tmp_path):
        yield


def losses(config: Config, steps: int = 2) -> list[float]:
    """Losses of the first steps."""
    trainer = Trainer(config)
    return [trainer.train_step(trainer.data.batch(step))["loss"] for step in range(steps)]


def test_every_loss_is_its_own(make_config: Make) -> None:
    """Each kind trains, and none is another one under a second name; with a large delta Huber's is mse to the bit."""
    fill_cache(make_config())
    found = {kind: losses(make_config(loss={"kind": kind})) for kind in LOSSES}
    assert all(math.isfinite(loss) for each in found.values() for loss in each)
    assert len({tuple(each) for each in found.values()}) == len(LOSSES)
    assert losses(make_config(loss={"kind": "huber", "delta": 1e3})) == found["mse"]


def test_weights_of_levels_reach_the_loss(make_config: Make) -> None:
    """In pure noise `cosmap` counts every loss 2 / pi; its gradient is multiplied too, not only the figure."""
    noise = {"distribution": "levels", "levels": [1.0]}
    fill_cache(make_config())
    plain, weighted = (
        Trainer(make_config(noise=noise, loss={"weighting": weighting}, train={"max_grad_norm": 1e9}))
        for weighting in ("none", "cosmap")
    )
    first, second = (each.train_step(each.data.batch(0)) for each in (plain, weighted))
    assert second["loss"] == pytest.approx(first["loss"] * 2 / math.pi, rel=1e-6)
    assert second["grad_norm"] == pytest.approx(first["grad_norm"] * 2 / math.pi, rel=1e-5)


def test_each_data_set_has_its_levels(make_config: Make, photos: Path) -> None:
    """Levels are drawn by the data set that a sample comes from."""
    data: list[dict[str, Any]] = [
        {"path": str(photos), "trigger": "sks", "resolutions": [64], "noise": {"range": ends}}
        for ends in ([0.0, 0.3], [0.7, 1.0])
    ]
    config = make_config(data=data, train={"batch_size": 4})
    fill_cache(config)
    drawn = Trainer(config).data
    seen = set()
    for step in range(6):
        batch = drawn.batch(step)
        for place, level in enumerate(batch.sigma_B.tolist()):
            own = drawn.train[drawn.order.batch(step)[place]]["dataset"]
            assert (level <= 0.3) if own == 0 else (level >= 0.7)
            seen.add(own)
    assert seen == {0, 1}


def test_settings_of_noise_cost_no_cache(make_config: Make, photos: Path) -> None:
    """Noise and loss are no settings of the cache: what was cached before them serves with any of them."""
    fill_cache(make_config())
    data = [{"path": str(photos), "trigger": "sks", "resolutions": [64], "noise": {"bias": "style"}}]
    changed = make_config(data=data, noise={"shift": "tokens"}, loss={"kind": "mae"})
    assert math.isfinite(losses(changed, 1)[0])


@pytest.mark.parametrize("more", [{"stratified": True, "distribution": "beta"}, {"shift": "flux2", "bias": "content"}])
def test_workers_change_nothing(make_config: Make, more: dict[str, Any]) -> None:
    """A step's levels and weights are the same whatever the number of workers, fillers included."""
    config = make_config(noise=more, loss={"weighting": "min-snr"}, train={"batch_size": 5})
    fill_cache(config)
    data = Trainer(config).data
    whole = data.batch(1)
    parts = [data.batch(1, rank=rank, world=2) for rank in range(2)]
    for name in ("sigma_B", "counts_B", "noise_Bchw"):
        kept = torch.cat([getattr(part, name)[part.weight_B > 0] for part in parts])
        assert torch.equal(kept, getattr(whole, name))
