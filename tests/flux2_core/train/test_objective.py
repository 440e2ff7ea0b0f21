"""`[noise]` and `[loss]` through the trainer: what is set is what a step minimises, on one worker and on several."""

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_core.cache import index
from flux2_core.config.sections import Config
from flux2_core.data.needs import NULL_TEXT
from flux2_core.errors import UsageError
from flux2_core.model.flow import velocity
from flux2_core.model.latents import to_tokens
from flux2_core.train.losses import LOSSES
from flux2_core.train.trainer import Trainer
from tests.in_process import fill_cache, process_group
from tests.random_adapter import randomised

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
    noise = {"distribution": "levels", "parameters": [1.0]}
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


@pytest.fixture
def sets(tmp_path: Path, photos: Path) -> Path:
    """`own/` with masks whose left half is white, and `class/`, a regularisation set."""
    half = np.zeros((64, 64), dtype=np.uint8)
    half[:, :32] = 255
    for name in ("own", "class"):
        shutil.copytree(photos, tmp_path / name)
    for text in (tmp_path / "class").glob("*.txt"):
        text.write_text(text.read_text().replace("[trigger]", "a dog"))
    (tmp_path / "masks").mkdir()
    for place in range(6):
        Image.fromarray(half).resize(Image.open(photos / f"p{place}.png").size).save(tmp_path / f"masks/p{place}.png")
    return tmp_path


def both(sets: Path, *, masks: bool = False, **regularisation: Any) -> list[dict[str, Any]]:
    own: dict[str, Any] = {"path": str(sets / "own"), "trigger": "sks", "resolutions": [64]}
    others = {"path": str(sets / "class"), "regularisation": True, "resolutions": [64], **regularisation}
    return [own | ({"masks": str(sets / "masks")} if masks else {}), others]


def randomly(config: Config) -> Trainer:
    trainer = Trainer(config)
    randomised(trainer)
    return trainer


def flow(trainer: Trainer, batch: Any) -> torch.Tensor:
    [(_, term)] = trainer.terms(batch)
    return term


def grown(trainer: Trainer, loss: torch.Tensor) -> torch.Tensor:
    loss.backward()
    found = torch.cat(
        [parameter.grad.flatten() for parameter in trainer.adapter.values() if parameter.grad is not None]
    )
    trainer.optimizer.zero_grad(set_to_none=True)
    return found


def test_contrastive_guidance_by_hand(make_config: Make) -> None:
    """target = e + f (t - e), e being the base model's prediction for the empty caption; a factor of 1 is plain, bit
    for bit; between two ends each sample has its own; `sigma` lets it grow with the noise; zero-star fits e to t."""
    fill_cache(make_config())
    plain = randomly(make_config(train={"batch_size": 3}))
    batch = plain.data.batch(0)
    empty_BLD = plain.data.prompt_rows([plain.data.key(NULL_TEXT)]).expand(3, -1, -1)
    with torch.no_grad():
        on = plain.predict(batch.noisy_Bchw(), batch.prompts_BLD, batch.sigma_B)
        with plain.base():
            e = plain.predict(batch.noisy_Bchw(), empty_BLD, batch.sigma_B)
    t = to_tokens(velocity(batch.latents_Bchw, batch.noise_Bchw))
    fitted = e * ((t * e).sum((1, 2)) / e.square().sum((1, 2))).view(-1, 1, 1)
    growing = (1 + 2 * batch.sigma_B).view(-1, 1, 1)
    for keys, target in (
        ({}, e + 3 * (t - e)),
        ({"contrastive_schedule": "sigma"}, e + growing * (t - e)),
        ({"contrastive_zero_star": True}, fitted + 3 * (t - fitted)),
    ):
        guided = randomly(make_config(loss={"contrastive_guidance": 3.0, **keys}, train={"batch_size": 3}))
        own = guided.data.batch(0)
        wanted = (on - target).square().flatten(1).mean(1).mean()
        assert float(flow(guided, own).detach()) == pytest.approx(float(wanted), rel=1e-4)
    drawn = make_config(loss={"contrastive_guidance": [2.0, 4.0]}, train={"batch_size": 3})
    factors = randomly(drawn).data.batch(0).carried["flow"]["factor_B"]
    assert len(set(factors.tolist())) == 3
    assert bool(((factors >= 2) & (factors <= 4)).all())
    one = make_config(loss={"contrastive_guidance": 1.0}, train={"batch_size": 3})
    assert torch.equal(flow(randomly(one), batch), flow(plain, batch))


def test_guidance_is_drawn_for_each_sample(make_config: Make) -> None:
    """Between two ends each sample is told its own guidance, the same on any number of workers, and nothing else is
    drawn otherwise; a constant is told as it was."""
    fill_cache(make_config())
    plain = randomly(make_config(train={"batch_size": 4, "guidance": 3.0}))
    ranged = randomly(make_config(train={"batch_size": 4, "guidance": [1.0, 5.0]}))
    told, batch = [], ranged.data.batch(0)
    ranged.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: told.append(kwargs["guidance"]), with_kwargs=True
    )
    drawn = float(flow(ranged, batch).detach())
    assert torch.equal(told[0], batch.guidance_B)
    assert len(set(batch.guidance_B.tolist())) == 4
    assert bool(((batch.guidance_B >= 1) & (batch.guidance_B <= 5)).all())
    parts = [ranged.data.batch(0, rank=rank, world=2).guidance_B for rank in range(2)]
    assert torch.equal(torch.cat(parts), batch.guidance_B)
    other = plain.data.batch(0)
    assert torch.equal(other.noise_Bchw, batch.noise_Bchw)
    assert float(flow(plain, other).detach()) != drawn
    assert float(flow(plain, replace(other, guidance_B=batch.guidance_B)).detach()) == drawn
    assert ranged.guidance == 3.0


def test_differential_guidance_is_a_factor_on_the_gradient(make_config: Make) -> None:
    """With mse the gradient is s times the plain one, and the loss s^2 times; 1 is plain, bit for bit."""
    fill_cache(make_config())
    plain, beyond = (randomly(make_config(loss={"differential_guidance": s})) for s in (1.0, 3.0))
    batch = plain.data.batch(0)
    first, second = flow(plain, batch), flow(beyond, batch)
    assert float(second.detach()) == pytest.approx(9 * float(first.detach()), rel=1e-5)
    assert torch.allclose(grown(beyond, second), 3 * grown(plain, first), rtol=1e-4, atol=1e-7)


def test_prior_regularisation(make_config: Make, sets: Path) -> None:
    """A set with `regularisation = "prior"` has the base model's prediction as its target, the others their pictures;
    of a fresh adapter that part of the loss is exactly zero."""
    config = make_config(data=both(sets, regularisation="prior"), train={"batch_size": 6})
    fill_cache(config)
    trainer = Trainer(config)
    batch = next(b for b in map(trainer.data.batch, range(9)) if 0 < b.carried["flow"]["prior_B"].sum() < 6)
    prior_B = batch.carried["flow"]["prior_B"]
    assert prior_B.tolist() == ["@1" in name for name in batch.ids]
    alone = replace(batch, weight_B=batch.weight_B * prior_B)
    assert float(flow(trainer, alone).detach()) == 0
    randomised(trainer)
    with torch.no_grad():
        on = trainer.predict(batch.noisy_Bchw(), batch.prompts_BLD, batch.sigma_B)
        with trainer.base():
            off = trainer.predict(batch.noisy_Bchw(), batch.prompts_BLD, batch.sigma_B)
    t = to_tokens(velocity(batch.latents_Bchw, batch.noise_Bchw))
    target = torch.where(prior_B.view(-1, 1, 1), off, t)
    wanted = (on - target).square().flatten(1).mean(1).mean()
    assert float(flow(trainer, batch).detach()) == pytest.approx(float(wanted), rel=1e-4)


def test_what_masks_leave_out_stays_the_bases(make_config: Make, sets: Path) -> None:
    """`masked_prior` adds the mean, over what is masked out, of what the adapter changes there, times its weight; a
    weight of 0 is plain, bit for bit."""
    data = both(sets, masks=True)
    config = make_config(data=data, loss={"masked_prior": 0.5}, train={"batch_size": 6})
    fill_cache(config)
    plain = randomly(make_config(data=data, train={"batch_size": 6}))
    trainer = randomly(config)
    batch = next(b for b in map(trainer.data.batch, range(9)) if b.mask_Bhw is not None)
    assert batch.mask_Bhw is not None
    with torch.no_grad():
        on = trainer.predict(batch.noisy_Bchw(), batch.prompts_BLD, batch.sigma_B)
        with trainer.base():
            off = trainer.predict(batch.noisy_Bchw(), batch.prompts_BLD, batch.sigma_B)
    out_BS = 1 - batch.mask_Bhw.flatten(1)
    kept = ((on - off).square().mean(2) * out_BS).sum(1) / out_BS.sum(1).clamp_min(1e-6)
    wanted = float(flow(plain, batch).detach()) + 0.5 * float(kept.mean())
    assert float(flow(trainer, batch).detach()) == pytest.approx(wanted, rel=1e-4)
    assert float(kept.mean()) > 0


@pytest.mark.parametrize(("sections", "said"), [
    ({"loss": {"masked_prior": 1.0}}, "data.0.masks"),
    ({"loss": {"contrastive_guidance": [4.0, 2.0]}}, "lower end comes first"),
    ({"loss": {"contrastive_guidance": 0.5}}, "loss.contrastive_guidance"),
    ({"train": {"guidance": [4.0, 2.0]}}, "lower end comes first"),
    ({"loss": {"delta": 0.5}}, r'delta is for kind="huber" or .*; here it is "mse"'),
    ({"loss": {"kind": "mae", "delta_schedule": "snr"}}, r'delta_schedule is for kind=.*; here it is "mae"'),
    ({"loss": {"weighting": "bell", "gamma": 1.0}}, r'gamma is for weighting="min-snr"'),
    ({"loss": {"contrastive_schedule": "sigma"}}, "contrastive_guidance=1 leaves the target"),
    ({"loss": {"contrastive_zero_star": True}}, "contrastive_guidance=1 leaves the target"),
    ({"train": {"preservation_weight": 2.0}}, 'set preservation="dop" or "blank"'),
    ({"data": [{"path": "x", "steps": [1, 2]}]}, "step 3 has no data set"),
    ({"data": [{"path": "x", "steps": [1, 1]}, {"path": "y", "steps": [3, 9]}]}, "step 2 has no data set"),
    ({"data": [{"path": "x", "steps": [3, 2]}]}, "the first step comes first"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(make_config: Make, sections: dict[str, Any], said: str) -> None:
    """Each with what to do instead."""
    with pytest.raises(UsageError, match=said):
        make_config(**sections)


def test_a_curriculum(make_config: Make, sets: Path) -> None:
    """A data set is drawn from at its own steps and no other; the cache is the same as without a curriculum."""
    data = both(sets)
    fill_cache(make_config(data=data))
    data[0]["steps"], data[1]["steps"] = [1, 3], [3, 6]
    trainer = Trainer(make_config(data=data, train={"steps": 6, "batch_size": 4}))
    drawn = [{"@1" in name for name in trainer.data.batch(step).ids} for step in range(6)]
    assert drawn[:2] == [{False}] * 2
    assert drawn[3:] == [{True}] * 3
    assert {name for step in range(2, 3) for name in drawn[step]} <= {False, True}


def test_captions_that_are_edited_or_skipped(make_config: Make, sets: Path) -> None:
    """Text rows are of edited captions, none of skipped ones; without either the cache is the one of before there were
    such keys."""
    data = both(sets)[:1]
    plain = make_config(data=data)
    fill_cache(plain)
    data[0] |= {"caption_edits": [["a photo of", "a print of"]], "skip_captions": ["/number [45]/"]}
    config = make_config(data=data)
    fill_cache(config)
    rows = Trainer(config).data
    texts = {row["text"] for key in sorted(rows.text_reader.keys()) for row in [rows.text_reader.attributes(key)]}
    assert "a print of sks number 0" in texts
    assert not [text for text in texts if "photo" in text or "number 4" in text]
    assert "caption_edits" not in str(index.settings(plain))
    assert index.settings(config)["data.0.skip_captions"] == ["/number [45]/"]
