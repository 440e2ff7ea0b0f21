"""Noise levels: each distribution against its definition, and against what other trainers were seen to draw."""

import math
import tomllib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from flux2_core.config.objective import Noise
from flux2_core.config.reading import dump_toml, parse
from flux2_core.config.sections import Config
from flux2_core.errors import UsageError
from flux2_core.model.flow import empirical_mu, sampling_sigmas
from flux2_core.model.seeded import generator
from flux2_core.noise import DISTRIBUTIONS, SHOWN, Levels, density, factor
from flux2_core.train.batches import TrainingData
from flux2_core.train.losses import Weights
from tests.in_process import fill_cache

COUNT = 4000
Make = Callable[..., Config]


def sigmoid_cdf(x: float, mean: float = 0, std: float = 1) -> float:
    return 0.5 * (1 + math.erf((math.log(x / (1 - x)) - mean) / std / math.sqrt(2)))


def unshifted(x: float, by: float) -> float:
    return x / (by - (by - 1) * x)


CDFS: list[tuple[dict[str, Any], Callable[[float], float]]] = [
    ({"distribution": "linear"}, lambda x: x),
    ({"distribution": "weighted"}, lambda x: x),
    ({}, sigmoid_cdf),
    ({"distribution": "sigmoid", "parameters": [0.0, 0.5]}, lambda x: sigmoid_cdf(x, std=0.5)),
    ({"parameters": [1.0, 0.7]}, lambda x: sigmoid_cdf(x, 1.0, 0.7)),
    ({"distribution": "beta"}, lambda x: 3 * x**2 - 2 * x**3),
    ({"distribution": "beta", "parameters": [3.0, 1.0]}, lambda x: x**3),
    ({"distribution": "beta", "parameters": [0.5, 0.5]}, lambda x: 2 / math.pi * math.asin(math.sqrt(x))),
    ({"distribution": "cubic", "parameters": [1.0, 1.0]}, lambda x: x),
    ({"distribution": "cubic", "parameters": [0.0, 1.0, 2.0, 3.0]}, lambda x: x**2),
    ({"distribution": "linear", "shift": 3}, lambda x: unshifted(x, 3)),
    ({"distribution": "linear", "bias": "content"}, lambda x: 1 - (1 - x) ** (1 / 3)),
    ({"distribution": "linear", "bias": "style"}, lambda x: x ** (1 / 3)),
    ({"distribution": "linear", "range": [0.25, 0.75]}, lambda x: 2 * (x - 0.25)),
    ({"shift": 3.0, "range": [0.5, 1.0]}, lambda x: 1 - (1 - sigmoid_cdf(unshifted(x, 3))) / (1 - sigmoid_cdf(0.25))),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "cdf"), CDFS)
@pytest.mark.parametrize("stratified", [False, True])
def test_levels_have_their_distribution(keys: dict[str, Any], cdf: Callable[[float], float], stratified: bool) -> None:
    """4,000 draws stay within Kolmogorov and Smirnov's 0.1 % bound of what is documented, one by one or by parts."""
    levels, rng = Levels(Noise(**keys)), generator(0, "test", str(keys))
    drawn = sorted(
        levels.draw(rng, tokens=1024, part=(place % 8, 8) if stratified else (0, 1)) for place in range(COUNT)
    )
    assert 0 <= drawn[0] < drawn[-1] <= 1
    expected = np.array([cdf(x) for x in drawn])
    assert np.abs(expected - (np.arange(COUNT) + 0.5) / COUNT).max() < 1.95 / math.sqrt(COUNT)


def test_mode_is_stable_diffusion_3s() -> None:
    """Levels at equal places are SD3's f(u) = 1 - u - s (cos(pi u / 2)^2 - 1 + u), its u being counted from noise."""
    u = np.linspace(0, 1, 101)
    for scale in (-1.0, 0.0, 1.29):
        published = 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
        ours = Levels(Noise(distribution="mode", parameters=(scale,))).at(1 - u, tokens=4096)
        assert np.abs(ours - published).max() < 1e-12
        assert (np.diff(ours) <= 1e-12).all()


@pytest.mark.parametrize(("levels", "drawn"), [
    ([1], {1.0}), ([2], {0.5, 1.0}), ([], {0.25, 0.5, 0.75, 1.0}), ([8], {place / 8 for place in range(1, 9)}),
    ([0.9, 0.3], {0.3, 0.9}),
])  # fmt: skip
def test_few_levels(levels: Any, drawn: set[float]) -> None:
    """Those of a sampler of few steps, or of a list, are all drawn, each as often; shifted, the sampler's own."""
    rng, ours = generator(1), Levels(Noise(distribution="levels", parameters=levels))
    found = np.array([ours.draw(rng, tokens=4096) for _ in range(1000)], dtype=np.float32)
    values, counts = np.unique(found, return_counts=True)
    assert values.tolist() == pytest.approx(sorted(drawn))
    assert counts.min() > 1000 / len(drawn) * 0.7
    if levels == [8]:
        shifted = Levels(Noise(distribution="levels", parameters=levels, shift=math.exp(empirical_mu(4096, 8))))
        grid = sorted({float(level) for level in shifted.at((np.arange(64) + 0.5) / 64, tokens=4096)})
        assert grid == pytest.approx(sampling_sigmas(4096, 8)[:-1].flip(0).tolist(), abs=1e-6)


# (what it is called there, our keys, mean, 5 %, 50 %, 95 %): seen with their own code at 1024 px
OTHERS = [
    ("DiffSynth", {"distribution": "linear", "shift": math.exp(0.8)}, 0.631, (0.105, 0.688, 0.976)),
    ("Automodel", {"distribution": "linear", "shift": 3}, 0.677, (0.135, 0.751, 0.983)),
    ("musubi flux2_shift", {"distribution": "sigmoid", "shift": "tokens"}, 0.722, (0.378, 0.759, 0.942)),
    ("diffusion-pipe", {"shift": 3}, 0.714, (0.365, 0.750, 0.940)),
    ("OneTrainer", {"distribution": "logit-normal", "shift": "tokens"}, 0.723, (0.378, 0.760, 0.943)),
    (
        "FLUX.2's sampler",
        {"distribution": "levels", "parameters": [50], "shift": "flux2"},
        0.807,
        (0.326, 0.887, 0.995),
    ),
]


@pytest.mark.parametrize(("name", "keys", "mean", "quantiles"), OTHERS)
def test_others_are_one_setting_away(
    name: str, keys: dict[str, Any], mean: float, quantiles: tuple[float, ...]
) -> None:
    """What other trainers were seen to draw is drawn by these keys, to the error of having seen it."""
    levels = Levels(Noise(**keys))
    assert levels.at((np.arange(4096) + 0.5) / 4096, tokens=4096).mean() == pytest.approx(mean, abs=0.005)
    found = levels.at(SHOWN, tokens=4096)
    assert found.tolist() == pytest.approx(quantiles, abs=0.006)


def test_the_shift_counts_tokens_truly() -> None:
    """A picture of 1024 px has 4,096 tokens, not 1,024 or 16,384: e^1.15; of 256 px e^0.5."""
    assert factor("tokens", 4096) == pytest.approx(math.exp(1.15))
    assert factor("tokens", 256) == pytest.approx(math.exp(0.5))
    assert factor("flux2", 4096) == pytest.approx(7.6, abs=0.1)
    assert (factor("none", 4096), factor(2.5, 4096)) == (1.0, 2.5)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_levels_rise_with_their_places(name: str) -> None:
    """Whatever is set, a larger place has no less noise, which `range` and equal parts rest upon."""
    for more in ({}, {"bias": "content"}, {"bias": "style", "shift": 3.0}, {"range": (0.2, 0.9), "shift": "flux2"}):
        levels = Levels(Noise.model_validate({"distribution": name, **more}))
        found = levels.at(np.linspace(1e-9, 1 - 1e-9, 999), tokens=1024)
        assert (np.diff(found) >= -1e-12).all()
        low, high = more.get("range", (0.0, 1.0))
        assert low - 1e-6 <= found.min() <= found.max() <= high + 1e-6
        assert density(levels, tokens=1024).sum() == pytest.approx(1)


def test_plain_draws_are_those_of_before() -> None:
    """Levels of `linear` and `logit-normal` are those of earlier releases to the bit; one number is taken."""
    for name, natural in (("linear", torch.rand), ("logit-normal", torch.randn)):
        ours, then = generator(3, "draw"), generator(3, "draw")
        for _ in range(50):
            drawn = natural((), generator=then)
            wanted = float(drawn if name == "linear" else torch.sigmoid(drawn))
            assert Levels(Noise.model_validate({"distribution": name})).draw(ours, tokens=64) == wanted
        assert torch.equal(ours.get_state(), then.get_state())


def test_a_batch_is_dealt_over_the_levels(make_config: Make) -> None:
    """Stratified, a batch of 6 has one level in each sixth, whatever the number of workers; a data set has its own."""
    config = make_config(
        noise={"distribution": "linear", "stratified": True}, train={"batch_size": 6}, validate={"held_out": 0.0}
    )
    data = TrainingData(config, fill_cache(config))
    for step in range(4):
        whole = data.batch(step)
        assert sorted((whole.sigma_B * 6).long().tolist()) == list(range(6))
        parts = [data.batch(step, rank=rank, world=3) for rank in range(3)]
        assert torch.equal(torch.cat([part.sigma_B for part in parts]), whole.sigma_B)
    assert len({tuple((data.batch(step).sigma_B * 6).long().tolist()) for step in range(8)}) > 1


@pytest.mark.parametrize("keys", [
    {"distribution": "linear", "parameters": [1.0]}, {"distribution": "beta", "parameters": [0.2, 1.0]},
    {"distribution": "levels", "parameters": [0.2], "range": [0.5, 1.0]}, {"range": [0.9, 0.2]}, {"shift": 0},
    {"distribution": "cubic", "parameters": [0.0, 0.0]}, {"distribution": "levels", "parameters": [1.5]},
    {"distribution": "normal"}, {"shift": "auto"}, {"parameters": [0.0, 1.0, 2.0]}, {"parameters": [0.0, 0.0]},
    {"distribution": "levels", "parameters": [0.5, 2.0]}, {"distribution": "mode", "parameters": [1.5]},
])  # fmt: skip
def test_what_cannot_be_meant_is_refused(keys: dict[str, Any]) -> None:
    """Parameters that a distribution does not have or take, an empty range, a level that is none: each by its name."""
    with pytest.raises(UsageError, match=r"noise"):
        parse({"model": {"path": "x"}, "data": [{"path": "y"}], "noise": keys})


def test_a_data_set_may_differ(make_config: Make) -> None:
    """`data[].noise` holds over `[noise]`, key by key, and comes back from `config.toml` as it was."""
    config = make_config(noise={"shift": 3.0, "parameters": [0.5, 1.0]}, data=[
        {"path": "a"}, {"path": "b", "noise": {"range": [0.5, 1.0]}}, {"path": "c", "noise": {"distribution": "linear"}}
    ])  # fmt: skip
    plain, ranged, linear = config.noises
    assert (plain.shift, plain.range, plain.values) == (3.0, (0.0, 1.0), (0.5, 1.0))
    assert (ranged.shift, ranged.range, ranged.values) == (3.0, (0.5, 1.0), (0.5, 1.0))
    assert (linear.shift, linear.distribution, linear.parameters) == (3.0, "linear", ())
    assert parse(tomllib.loads(dump_toml(config))) == config


def test_the_former_name_is_taken(make_config: Make, caplog: pytest.LogCaptureFixture) -> None:
    """`train.timesteps` still names the distribution, and its new place is told; both at once: the new one rules."""
    assert make_config(train={"timesteps": "linear"}).noise.distribution == "linear"
    assert "noise.distribution" in caplog.text
    both = make_config(train={"timesteps": "linear"}, noise={"distribution": "beta"})
    assert both.noise.distribution == "beta"


def test_weights_of_levels() -> None:
    """AI Toolkit's table at its published entries, its top, its mean; DiffSynth's bell from 0 to 1.69, shifted."""
    loss: Any = parse({"model": {"path": "x"}, "data": [{"path": "y"}]}).loss
    weighted = Weights(loss, Levels(Noise(distribution="weighted")))
    at = {0: 0.906, 100: 1.507, 124: 1.5227, 200: 1.441, 300: 1.264, 400: 1.083, 500: 0.925, 600: 0.805, 700: 0.731}
    for place, weight in (at | {800: 0.716, 900: 0.716, 999: 0.447}).items():
        assert weighted.weight(1 - place / 1000, tokens=4096) == pytest.approx(weight, abs=0.001)
    table = [weighted.weight(1 - place / 1000, tokens=4096) for place in range(1000)]
    assert np.argmax(table) == 124
    assert np.mean(table) == pytest.approx(1, abs=0.002)
    shifted = Levels(Noise(distribution="linear", shift=math.exp(0.8)))
    bell = Weights(loss.model_copy(update={"weighting": "bell"}), shifted)
    assert bell.weight(0.5, tokens=4096) == pytest.approx(1.69, abs=0.02)
    assert bell.weight(0.0, tokens=4096) == bell.weight(1.0, tokens=4096) == pytest.approx(0)
