"""Rollouts: from which levels, in how many steps, along which way, to which target, and nothing of it where none is."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from flux2_core.config.objective import Noise
from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.errors import UsageError
from flux2_core.model.flow import add_noise, sampling_sigmas, velocity
from flux2_core.model.latents import from_tokens, to_tokens
from flux2_core.train.losses import mse_B
from flux2_core.train.methods import rollout
from flux2_core.train.methods.protocol import Batch
from flux2_core.train.trainer import Trainer
from tests.in_process import fill_cache, process_group
from tests.random_adapter import prepared

Make = Callable[..., Config]
ALWAYS = {"probability": 1.0, "steps": 2}


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    with process_group(tmp_path):
        yield


def loss_of(trainer: Trainer, batch: Batch) -> torch.Tensor:
    [(_, term)] = trainer.terms(batch)
    return term


def grid_of(tokens: int) -> np.ndarray[Any, Any]:
    return rollout.sampler(Noise(), tokens=tokens)


def test_ways_are_the_samplers_own() -> None:
    """From a level of FLUX.2's sampler of 50 steps the way back is its own levels, to the bit of fp32; between two of
    them steps are as long as in between; pure noise has nothing before it, and below the last level no sampler is."""
    grid = grid_of(4096)
    assert np.array_equal(grid[::-1].astype(np.float32), sampling_sigmas(4096, 50).numpy())
    for place in (1, 7, 30):
        assert rollout.way(grid[place], 3, grid) == pytest.approx(grid[place + 3 : place - 1 : -1], abs=1e-12)
    between = rollout.way((grid[7] + grid[8]) / 2, 1, grid)
    assert between.tolist() == pytest.approx([(grid[8] + grid[9]) / 2, (grid[7] + grid[8]) / 2])
    assert rollout.way(grid[49], 3, grid).tolist() == [1, 1, 1, grid[49]]
    assert rollout.way(1.0, 2, grid).tolist() == [1, 1, 1]
    assert rollout.way(grid[1] - 0.01, 2, grid).tolist() == [grid[1] - 0.01] * 3


def test_next_sample_is_a_special_case() -> None:
    """Eight levels and one step each time: from each of eight levels to the next, by the noise's own shift; a
    list of levels is a sampler's too."""
    noise = Noise(distribution="levels", parameters=(8,), shift=3.0)
    grid = rollout.sampler(noise, tokens=256)
    assert grid.tolist() == pytest.approx([3 * u / (1 + 2 * u) for u in np.arange(9) / 8])
    for place in range(1, 8):
        assert rollout.way(grid[place], 1, grid) == pytest.approx(grid[[place + 1, place]], abs=1e-12)
    few = rollout.sampler(Noise(distribution="levels", parameters=(0.3, 0.6)), tokens=256)
    assert few.tolist() == [0, 0.3, 0.6, 1]


def test_a_true_model_gives_the_plain_target(make_config: Make) -> None:
    """Where the model predicts the true velocity, every way ends where noise and picture are mixed, with the noise that
    was drawn; what has no way keeps it to the bit."""
    trainer = prepared(make_config(rollout={"probability": 1.0, "steps": 5}, train={"batch_size": 4}))
    batch = trainer.data.batch(0)
    true = to_tokens(velocity(batch.latents_Bchw, batch.noise_Bchw))
    grid = grid_of(batch.latents_Bchw[0, 0].numel())
    sigmas = [1.0, 0.01, 0.3, 0.7]
    levels = torch.tensor([rollout.way(sigma, 5, grid).tolist() for sigma in sigmas])
    model: Any = SimpleNamespace(predict=lambda *seen: true)
    given = replace(batch, sigma_B=torch.tensor(sigmas))
    found = rollout.reached(model, given, levels)
    assert torch.equal(found.noise_Bchw[:2], batch.noise_Bchw[:2])
    assert not torch.equal(found.noise_Bchw[2:], batch.noise_Bchw[2:])
    assert (found.noise_Bchw - batch.noise_Bchw).abs().max() <= 1e-5
    assert (found.noisy_Bchw() - given.noisy_Bchw()).abs().max() <= 1e-5


def test_a_rollout_by_hand(make_config: Make) -> None:
    """Two of the sampler's steps by the model itself, and the target from there to the picture, (x - x0) / sigma; told
    guidance and level by level, and no gradient but that of the last pass."""
    trainer = prepared(make_config(rollout=ALWAYS, train={"guidance": [1.0, 4.0]}))
    batch = next(b for b in map(trainer.data.batch, range(20)) if b.carried["rollout"]["levels_BK"].shape[1] == 3)
    levels = batch.carried["rollout"]["levels_BK"]
    assert torch.equal(levels[:, 2], batch.sigma_B)
    assert (levels[:, :2] > levels[:, 1:]).all()
    x = add_noise(batch.latents_Bchw, batch.noise_Bchw, levels[:, 0])
    with torch.no_grad():
        for now, then in ((levels[:, 0], levels[:, 1]), (levels[:, 1], levels[:, 2])):
            v = trainer.predict(x, batch.prompts_BLD, now, (), batch.guidance_B)
            x = x + (then - now).view(-1, 1, 1, 1) * from_tokens(v, height=x.shape[2], width=x.shape[3])
    target = to_tokens((x - batch.latents_Bchw) / batch.sigma_B.view(-1, 1, 1, 1))
    predicted = trainer.predict(x, batch.prompts_BLD, batch.sigma_B, (), batch.guidance_B)
    wanted = mse_B(predicted, target).mean()
    ours = loss_of(trainer, batch)
    assert float(ours.detach()) == pytest.approx(float(wanted.detach()), rel=1e-4)
    found = torch.autograd.grad(ours, [*trainer.adapter.values()], allow_unused=True)
    by_hand = torch.autograd.grad(wanted, [*trainer.adapter.values()], allow_unused=True)
    for one, other in zip(found, by_hand, strict=True):
        assert one is None or (one - other).abs().max() <= 1e-4 * max(1e-3, float(other.abs().max()))
    plain = loss_of(trainer, replace(batch, carried={"rollout": {}}))
    assert abs(float((plain - ours).detach())) > 1e-4


def test_steps_that_are_not_rolled_out_are_plain(make_config: Make) -> None:
    """With a probability of 0, and in each step for which none is drawn, the loss is that of plain training to the bit;
    of the others it is not."""
    fill_cache(make_config())
    plain, never, some = (
        Trainer(make_config(rollout={"probability": share})) for share in (0.0, [0.0, 0.0], [0.5, 0.5])
    )
    seen = set()
    for step in range(8):
        losses = [float(loss_of(each, each.data.batch(step)).detach()) for each in (plain, never, some)]
        rolled = "levels_BK" in some.data.batch(step).carried["rollout"]
        assert losses[0] == losses[1]
        assert (losses[0] == losses[2]) != rolled
        seen.add(rolled)
    assert seen == {True, False}


def test_one_draw_for_all_workers(make_config: Make) -> None:
    """A step is rolled out or not, and by as many steps, for all samples alike, each number as often; over the run the
    share goes from one end to the other."""
    config = make_config(rollout={"probability": [0.0, 1.0], "steps": 3}, train={"steps": 4000, "batch_size": 3})
    drawn = np.array([rollout.length(config, 42, step) for step in range(4000)])
    counts = Counter(drawn[drawn > 0].tolist())
    assert counts.keys() == {1, 2, 3}
    assert [count / counts.total() for count in counts.values()] == pytest.approx([1 / 3] * 3, abs=0.03)
    shares = [(drawn[at : at + 400] > 0).mean() for at in range(0, 4000, 400)]
    assert shares == pytest.approx(np.arange(0.05, 1, 0.1), abs=0.07)
    fill_cache(config)
    data = Trainer(config).data
    for step in (3990, 3995):
        whole = data.batch(step).carried["rollout"]["levels_BK"]
        parts = [data.batch(step, rank=rank, world=2) for rank in range(2)]
        assert torch.equal(torch.cat([p.carried["rollout"]["levels_BK"][: len(p.ids)] for p in parts]), whole)
        assert whole.shape[1] == 1 + drawn[step]


def test_parts_of_a_batch_add_up(make_config: Make) -> None:
    """Rolled out one picture at a time, the loss is that of all of them at once."""
    trainer = prepared(make_config(rollout=ALWAYS | {"reflexflow": True}, train={"batch_size": 3}))
    batch = trainer.data.batch(0)
    parts = [loss_of(trainer, batch.each(itemgetter(slice(at, at + 1)))) for at in range(3)]
    assert float(sum(part.detach() for part in parts)) == pytest.approx(
        float(loss_of(trainer, batch).detach()), rel=1e-5
    )


def test_reflexflow_by_hand(make_config: Make) -> None:
    """Tokens count by how far the prediction strays from that where nothing drifted, 1 and the share of the mean; the
    direction to the picture is held with weight 10; a mask leaves out of both what is black."""
    trainer = prepared(make_config(rollout=ALWAYS | {"reflexflow": True}))
    batch = trainer.data.batch(0)
    height, width = batch.latents_Bchw.shape[2:]
    mask = (torch.arange(width) < width // 2).float().expand(2, height, width)
    for given in (batch, replace(batch, mask_Bhw=mask)):
        there = rollout.reached(trainer, given, given.carried["rollout"]["levels_BK"])
        with torch.no_grad():
            exact, predicted = (trainer.predict(*each.seen()) for each in (given, there))
        target = to_tokens(velocity(there.latents_Bchw, there.noise_Bchw))
        bias = (predicted - exact).norm(dim=2)
        shares = 1 + bias / bias.mean(1, keepdim=True)
        left = torch.ones_like(shares) if given.mask_Bhw is None else mask.flatten(1)
        error = (predicted - target).square().mean(2)
        mean = (shares * left * error).sum(1) / (shares * left).sum(1)
        cosine = F.cosine_similarity((left[..., None] * predicted).flatten(1), (left[..., None] * target).flatten(1))
        wanted = (mean + 10 * (2 - 2 * cosine)).mean()
        assert float(loss_of(trainer, given).detach()) == pytest.approx(float(wanted), rel=1e-4)
    still = replace(batch, carried={"rollout": {"levels_BK": batch.sigma_B.unsqueeze(1).expand(-1, 3)}})
    plain = replace(batch, carried={"rollout": {}})
    assert float(loss_of(trainer, still).detach()) == pytest.approx(float(loss_of(trainer, plain).detach()), rel=1e-6)


def test_what_is_passed(make_config: Make) -> None:
    """A step makes as many passes as steps were drawn, with all tokens whatever routes say, and for ReflexFlow one more
    along the routes, beside the one that is learned; all but that one without a gradient."""
    tread = {"routes": [{"skip": 0.5, "start": 1, "end": 2}]}
    trainer = prepared(make_config(tread=tread, rollout=ALWAYS | {"reflexflow": True}))
    batch = next(b for b in map(trainer.data.batch, range(20)) if b.carried["rollout"]["levels_BK"].shape[1] == 3)
    passes, predict = [], trainer.predict

    def noted(*seen: Any) -> torch.Tensor:
        passes.append((bool(seen[5]), torch.is_grad_enabled()))
        return predict(*seen)

    trainer.predict = noted  # type: ignore[method-assign]
    loss_of(trainer, batch)
    assert passes == [(True, False), (False, False), (False, False), (True, True)]


def test_what_a_rollout_does_to_the_rest(make_config: Make) -> None:
    """With preservation, another loss, contrastive guidance, its own distribution and weights it trains, finitely."""
    config = make_config(
        rollout=ALWAYS,
        train={"preservation": "blank", "batch_size": 3},
        loss={"kind": "wavelet", "contrastive_guidance": 3.0, "differential_guidance": 2.0},
        noise={"distribution": "weighted", "stratified": True},
        cluster={"micro_batch": 2},
    )
    trainer = prepared(config)
    records = [trainer.train_step(trainer.data.batch(step)) for step in range(2)]
    assert all(
        np.isfinite([record["loss"], record["grad_norm"]]).all() and record["preservation"] for record in records
    )


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"rollout": {"steps": 4}}, r"rollout: steps is of a rollout, and probability is 0"),
        ({"rollout": {"reflexflow": True}}, r"reflexflow is of a rollout"),
        ({"rollout": {"probability": 1.5}}, r"rollout\.probability: .*less than or equal to 1"),
        ({"rollout": {"probability": 1.0, "steps": 51}}, r"rollout\.steps: .*less than or equal to 50"),
        (
            {"rollout": {"probability": 1.0}, "noise": {"distribution": "levels", "parameters": [1]}},
            r"rollout\.probability: noise\.parameters trains pure noise alone, to which no step leads",
        ),
    ],
)
def test_rollouts_that_make_no_sense(make_config: Make, sections: dict[str, Any], named: str) -> None:
    """What would do nothing, or what no sampler does, is refused by name; what is kept of a run without is read."""
    with pytest.raises(UsageError, match=named):
        make_config(**sections)
    config = make_config()
    assert parse(config.model_dump(mode="json", by_alias=True)) == config


def test_a_method_without_noise_is_refused(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a method that is not flow matching a rollout would be left out in silence."""
    monkeypatch.setattr(Config, "methods", property(lambda config: ("moonlit",)))
    with pytest.raises(UsageError, match=r"rollout\.probability: moonlit has no noise that could be reached"):
        make_config(rollout={"probability": 0.5})
