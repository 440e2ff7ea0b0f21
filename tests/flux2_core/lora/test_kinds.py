"""Every kind of adapter: nothing at first, its exact difference afterwards, as its library has it, over every base."""

import copy
import math
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, inject_adapter_in_model
from torch import nn

from flux2_core import accelerator
from flux2_core.accelerator import CPU
from flux2_core.config.adapter import Lora
from flux2_core.embedded import tiny_model
from flux2_core.errors import UsageError
from flux2_core.lora import adapter, names, targets, whole
from flux2_core.lora.kinds import KINDS, sides
from flux2_core.lora.layer import AdaptedLinear
from flux2_core.model.frozen_linear import FrozenLinear, quantise, widen
from flux2_core.model.transformer import linear_names
from tests.flux2_core.lora.test_file import forward
from tests.random_adapter import state

RANK = 4
GIVEN = {kind: {"kind": kind, "rank": RANK, "alpha": 6.0} for kind in KINDS} | {
    "oft": {"kind": "oft", "rank": RANK},
    "lokr": {"kind": "lokr", "rank": RANK, "alpha": 6.0, "factor": 2},
    "whole lokr": {"kind": "lokr", "rank": 64, "alpha": 6.0, "factor": 4},
}


@pytest.fixture(scope="module")
def base() -> Any:
    model = tiny_model.transformer(tiny_model.RANDOM_SHAPE)
    tiny_model.randomize(model, torch.Generator().manual_seed(1))
    return model.eval().requires_grad_(False)


def adapted(base: Any, seed: int = 7, **given: Any) -> Any:
    """The model under a new adapter."""
    model, lora = copy.deepcopy(base), Lora(**given)
    model.told = adapter.inject(model, lora, targets.match(lora, linear_names(model)))
    adapter.initialise(model, seed=seed, device=CPU)
    return model


def moved(model: Any, by: float = 0.2) -> Any:
    """The same model after its adapter has learned something in every parameter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in adapter.parameters(model):
            parameter += by * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return model


def merged(base: Any, finished: dict[str, torch.Tensor]) -> Any:
    """The base with the exact differences in its weights."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for module, weights in names.modules(finished).items():
            weight = model.get_submodule(module).weight
            weight += whole.difference(weights, lambda weight=weight: weight.detach().clone())
    return model


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_nothing_is_changed_at_first(base: Any, given: dict[str, Any]) -> None:
    """A new adapter of any kind is the base model, to the bit, and has its shapes' parameters, all of them to train."""
    model = adapted(base, **given)
    assert torch.equal(forward(model), forward(base))
    linears = {n: (m.in_features, m.out_features) for n, m in base.named_modules() if isinstance(m, nn.Linear)}
    wanted = targets.shapes(Lora(**given), linears)
    assert {name: tuple(parameter.shape) for name, parameter in adapter.parameters(model)} == wanted
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for _, p in adapter.parameters(model)}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
def test_what_it_computes_is_its_exact_difference(base: Any, given: dict[str, Any]) -> None:
    """An adapter that has learned, with alpha != rank, does what the base does with the difference in its weights; put
    on as a finished one, what it did while training; switched off, nothing."""
    sigma_zero = 0.0  # where t-lora has all its ranks
    model = moved(adapted(base, **given))
    finished = targets.finished(Lora(**given), state(model))
    wanted, plain = forward(merged(base, finished), sigma_zero), forward(base, sigma_zero)
    assert (forward(model, sigma_zero) - wanted).norm() <= 2e-6 * wanted.norm()
    assert (wanted - plain).norm() > 5e-3 * plain.norm()
    drawing = copy.deepcopy(base)
    adapter.attach(drawing, finished, device=CPU)
    adapter.measure(drawing, device=CPU)
    assert (forward(drawing, sigma_zero) - wanted).norm() <= 2e-6 * wanted.norm()
    with adapter.switched_off(model):
        assert torch.equal(forward(model, sigma_zero), plain)


PEFT = {
    "dora": lambda t: LoraConfig(r=RANK, lora_alpha=6, use_dora=True, target_modules=t),
    "loha": lambda t: LoHaConfig(r=RANK, alpha=6, target_modules=t),
    "lokr": lambda t: LoKrConfig(r=RANK, alpha=6, decompose_factor=2, target_modules=t),
    "whole lokr": lambda t: LoKrConfig(r=64, alpha=6, decompose_factor=4, target_modules=t),
}


@pytest.mark.parametrize("name", PEFT)
def test_it_is_what_peft_has(base: Any, name: str) -> None:
    """The same prediction and the same gradient of every parameter as peft's own layer with the same weights."""
    ours = moved(adapted(base, **GIVEN[name]))
    modules = targets.match(Lora(), linear_names(base))
    theirs = inject_adapter_in_model(PEFT[name](modules), copy.deepcopy(base), adapter_name="default")
    weights = state(ours)
    other = {}
    for key, parameter in theirs.named_parameters():
        plain = key.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")
        if plain in weights:
            other[plain] = parameter
            parameter.data.copy_(weights[plain])
    assert other.keys() == weights.keys()
    found, wanted = forward(ours, grad=True), forward(theirs, grad=True)
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    found.square().sum().backward()
    wanted.square().sum().backward()
    for key, parameter in adapter.parameters(ours):
        assert (parameter.grad - other[key].grad).norm() <= 2e-5 * other[key].grad.norm(), key


def test_oft_is_lycoris() -> None:
    """A turn of outputs is peft's turn of inputs on the weight the other way round, and ComfyUI's formula."""
    generator = torch.Generator().manual_seed(0)
    weight_NK, blocks = torch.randn(12, 8, generator=generator), 0.3 * torch.randn(3, 4, 4, generator=generator)
    found = weight_NK + whole.difference({"oft_blocks": blocks}, lambda: weight_NK)
    skew, one = blocks - blocks.transpose(1, 2), torch.eye(4)
    turn = (one + skew) @ (one - skew).inverse()  # comfy/weight_adapter/oft.py, read 2026-11
    comfyui = torch.einsum("k n m, k n ... -> k m ...", turn, weight_NK.view(3, 4, 8)).flatten(0, 1)
    assert torch.allclose(found, comfyui, atol=1e-6)
    linear = nn.Linear(12, 8, bias=False)
    linear.weight.data = weight_NK.t().clone()
    settings = OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["it"])
    theirs = inject_adapter_in_model(settings, nn.ModuleDict({"it": linear}), adapter_name="default")["it"]
    rows, columns = torch.triu_indices(4, 4, 1)
    theirs.oft_R["default"].weight.data = -skew[:, rows, columns]  # its Cayley has the other sign,
    x = torch.randn(5, 12, generator=generator)
    turned = theirs(x)
    theirs.oft_R["default"].weight.data *= -1
    assert any(torch.allclose(each, x @ found, atol=1e-5) for each in (turned, theirs(x)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["bf16", "int8", "nf4", "int8-matmul"])
def test_over_a_rounded_base(kind: str, precision: str) -> None:
    """Beside a base in bf16 or few bits nothing is changed at first, and what was learned is what the exact weights do
    with its difference, up to bf16's own error (and that of products in 8 bits)."""
    torch.manual_seed(2)
    linear = nn.Linear(64, 96, bias=False).requires_grad_(False).bfloat16()
    lora = Lora(**GIVEN[kind])
    shapes = KINDS[kind].shapes(64, 96, RANK, 2)
    model = nn.ModuleDict(
        {"it": AdaptedLinear(linear, kind, shapes, KINDS[kind].run, factor=targets.strength(lora, RANK))}
    )
    weight_NK = linear.weight.float()
    if precision != "bf16":
        model["it"].base_layer = frozen = FrozenLinear(64, 96, precision, torch.bfloat16)
        frozen.payload, frozen.scale = (nn.Parameter(p, requires_grad=False) for p in quantise(weight_NK, precision))
        weight_NK = widen(frozen.payload, frozen.scale, precision, torch.float32)
    adapter.initialise(model, seed=0, device=CPU)
    x = torch.randn(2, 24, 64)
    with accelerator.autocast(CPU, torch.bfloat16):
        assert torch.equal(model["it"](x), model["it"].base_layer(x.bfloat16()))
    moved(model)
    with accelerator.autocast(CPU, torch.bfloat16):
        found = model["it"](x).float()
    weights = names.modules(targets.finished(lora, state(model)))["it"]
    wanted = x @ (weight_NK + whole.difference(weights, lambda: weight_NK)).t()
    assert (found - wanted).norm() <= (0.02 if "matmul" in precision else 0.008) * wanted.norm()


def test_each_sample_has_the_ranks_of_its_own_noise(base: Any) -> None:
    """Samples of unlike noise in one pass are what each is alone: floor((1 - sigma) (rank - least)) + least ranks."""
    model = moved(adapted(base, kind="t-lora", rank=RANK, min_rank=1))
    sigmas = [0.0, 0.3, 0.7, 1.0]
    together = forward(model, *sigmas)
    for place, sigma in enumerate(sigmas):
        assert (forward(model, sigma) - together[place : place + 1]).abs().max() <= 1e-5
        ranks = math.floor((1 - sigma) * (RANK - 1)) + 1
        cut = {
            key: (value[:ranks] if key.endswith(names.A) else value[:, :ranks]) for key, value in state(model).items()
        }
        drawing = copy.deepcopy(base)
        adapter.attach(drawing, {key: value.contiguous() for key, value in cut.items()}, device=CPU)
        assert (forward(drawing, sigma) - together[place : place + 1]).abs().max() <= 1e-5
    assert (together[0] - together[3]).abs().max() > 1e-3


def test_all_ranks_at_all_levels_is_a_lora(base: Any) -> None:
    """min_rank = rank is a plain LoRA with the same weights, to the bit; its first A has orthogonal rows, as long as
    peft's are on average."""
    timed = adapted(base, kind="t-lora", rank=RANK, min_rank=RANK)
    for name, value in state(timed).items():
        if name.endswith(names.A):
            assert torch.allclose(value @ value.t(), torch.eye(RANK) / 3, atol=1e-6)
    moved(timed)
    plain = adapted(base, rank=RANK)
    adapter.load(plain, state(timed), device=CPU)
    assert torch.equal(forward(timed, 0.7), forward(plain, 0.7))
    with pytest.raises(UsageError, match=r"no more ranks than the 32 inputs"):
        adapted(base, kind="t-lora", rank=40)


def test_dropout_is_told_and_off_where_pictures_are_drawn(base: Any) -> None:
    """Factors of 1 are a plain LoRA; others leave ranks out of one sample and not of the other; none in eval mode."""
    plain = moved(adapted(base, rank=RANK))
    dropping = adapted(base, rank=RANK, dropout=0.5)
    adapter.load(dropping, state(plain), device=CPU)
    count = RANK * len(names.modules(state(plain)))
    kept = torch.stack([torch.ones(count), torch.zeros(count)])
    dropping.told.dropped_BR = kept
    dropping.train()
    found = forward(dropping, 0.5, 0.5)
    assert torch.allclose(found[:1], forward(plain, 0.5), atol=1e-6)
    assert torch.allclose(found[1:], forward(base, 0.5), atol=1e-6)
    assert torch.equal(forward(dropping.eval(), 0.5, 0.5), forward(plain, 0.5, 0.5))


@pytest.mark.parametrize("width", [12, 24, 32, 36, 96, 97, 128, 6144, 15360, 55296])
@pytest.mark.parametrize("factor", [2, 5, 16])
def test_sides_are_pefts(width: int, factor: int) -> None:
    """Widths are taken apart as peft takes them apart, or its readers would expect other shapes."""
    from peft.tuners.lokr.layer import factorization

    assert sides(width, factor) == factorization(width, factor)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "lokr", "dropout": 0.1}, 'kind="lokr" takes no dropout'),
        ({"kind": "lora", "factor": 8}, 'takes no factor, which is a side of lokr.*take "lokr"'),
        ({"kind": "dora", "min_rank": 2}, 'takes no min_rank.*"t-lora"'),
        ({"kind": "oft", "alpha": 4.0}, "takes no alpha.*a rotation has none"),
        ({"kind": "dora", "preset": ("a.safetensors",)}, "takes no preset"),
        ({"kind": "t-lora", "rank": 8, "min_rank": 9}, "min_rank=9 is more than the rank 8"),
        ({"kind": "t-lora", "rank": 8, "ranks": {"mlp": 4}, "min_rank": 6}, "min_rank=6 is more than the rank 4"),
    ],
)
def test_keys_of_other_kinds_are_refused(given: dict[str, Any], said: str) -> None:
    """A key that a kind does not have is refused by its name, with why and with the kinds that have it."""
    with pytest.raises(ValueError, match=said):
        Lora(**given)
