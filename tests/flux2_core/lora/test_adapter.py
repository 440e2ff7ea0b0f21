"""The adapter: which Linears are chosen, its first weights, and in and out."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel

from flux2_core.config.adapter import Lora
from flux2_core.config.sections import Model
from flux2_core.errors import UsageError
from flux2_core.lora.adapter import attach, initialise, inject, load, parameters
from flux2_core.lora.layer import ADAPTER
from flux2_core.lora.targets import PRESETS, match, strength
from flux2_core.model import transformer
from flux2_core.model.folder import resolve
from tests.random_adapter import state

CPU = torch.device("cpu")
DOUBLE = [f"attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")]
TEXT_SIDE = [f"attn.{n}" for n in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
MLP = [f"{ff}.{n}" for ff in ("ff", "ff_context") for n in ("linear_in", "linear_out")]
SINGLE = ["attn.to_qkv_mlp_proj", "attn.to_out"]
CHOSEN = {  # by preset: in a double block, in a single block
    "all": (DOUBLE + TEXT_SIDE + MLP, SINGLE),
    "attention": (DOUBLE + TEXT_SIDE, SINGLE),
    "mlp": (MLP, SINGLE),
    "tiny": (DOUBLE[:3], []),
    "diffusers": (DOUBLE, SINGLE),
}
AT_RANK_16 = {"diffusers": 77.1e6, "all": 100.7e6}  # ground-truth.md, Transformer


@pytest.fixture(scope="module")
def dev() -> Any:
    """FLUX.2-dev's transformer, without weights."""
    with torch.device("meta"):
        return Flux2Transformer2DModel(
            in_channels=128, num_layers=8, num_single_layers=48, attention_head_dim=128, num_attention_heads=48,
            joint_attention_dim=15360, timestep_guidance_channels=256, mlp_ratio=3.0, axes_dims_rope=(32, 32, 32, 32),
        )  # fmt: skip


@pytest.fixture
def built(tiny_model: Path) -> Any:
    """The tiny transformer with its weights."""
    model = resolve(Model(path=str(tiny_model)), parts=("transformer",))
    made = transformer.build(model, dtype=torch.float32)
    transformer.load_weights(made, model, device=CPU)
    return made


def test_dev_has_the_size_of_dev(dev: Any) -> None:
    """The structure that the presets are counted on is FLUX.2-dev's: 32.2 billion parameters."""
    assert sum(parameter.numel() for parameter in dev.parameters()) == 32_223_281_152


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_on_dev(dev: Any, preset: str) -> None:
    """Each preset selects exactly its modules in each of the 8 double and 48 single blocks, in the model's order."""
    linears = transformer.linear_names(dev)
    chosen = match(Lora(targets=preset), linears)
    double, single = CHOSEN[preset]
    expected = {f"transformer_blocks.{i}.{name}" for i in range(8) for name in double}
    expected |= {f"single_transformer_blocks.{j}.{name}" for j in range(48) for name in single}
    assert set(chosen) == expected
    assert chosen == [name for name in linears if name in expected]
    if preset in AT_RANK_16:
        modules = dict(dev.named_modules())
        count = sum(16 * (modules[name].in_features + modules[name].out_features) for name in chosen)
        assert count == pytest.approx(AT_RANK_16[preset], abs=0.05e6)


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        ("atention", "no such preset; there are all, attention"),
        (("attention", r".*\.nothing"), r"nothing' selects no Linear; names look like .*whole name"),
        (("to_q",), "selects no Linear"),
        (("(",), "not a regular expression"),
        (r".*", "selects context_embedder: only Linears inside blocks|selects .*: only Linears inside blocks"),
        (("proj_out",), "proj_out: only Linears inside blocks"),
    ],
)
def test_targets_that_select_wrongly(dev: Any, targets: Any, wanted: str) -> None:
    """A preset that does not exist, an expression that selects nothing or too much: refused, never ignored."""
    with pytest.raises(UsageError, match=wanted):
        match(Lora(targets=targets), transformer.linear_names(dev))


def test_expressions_add_up(dev: Any) -> None:
    """Several expressions and presets select the union."""
    chosen = match(Lora(targets=("tiny", r".*blocks\.0\.ff\.linear_in")), transformer.linear_names(dev))
    assert len(chosen) == 8 * 3 + 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rank": 16}, 1.0),
        ({"rank": 16, "alpha": 8}, 0.5),
        ({"rank": 16, "alpha": 8, "kind": "rslora"}, 2.0),
        ({"rank": 16, "kind": "rslora"}, 4.0),
    ],
)
def test_strength(built: Any, given: dict[str, Any], expected: float) -> None:
    """alpha / rank, or alpha / sqrt(rank): in our exports and in what is computed while training."""
    assert strength(Lora(**given), 16) == expected
    targets = match(Lora(), transformer.linear_names(built))
    inject(built, Lora(**given), targets)
    initialise(built, seed=0, device=CPU)
    module = built.get_submodule(targets[0])
    assert module.factor == pytest.approx(expected)
    with torch.no_grad():
        b = module.lora_B[ADAPTER].weight.normal_()
        x = torch.randn(3, module.in_features)
        delta = module(x) - module.base_layer(x)
        assert torch.allclose(delta, expected * (x @ module.lora_A[ADAPTER].weight.T @ b.T), atol=1e-5)


def injected(built: Any, *, rank: int = 4, seed: int = 7) -> Any:
    settings = Lora(rank=rank)
    inject(built, settings, match(settings, transformer.linear_names(built)))
    initialise(built, seed=seed, device=CPU)
    return built


def test_only_the_adapter_trains(built: Any) -> None:
    """After injection the trainable parameters are the adapter's, two a target, in fp32 under plain names."""
    own = dict(parameters(injected(built)))
    trainable = {id(parameter) for parameter in built.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in own.values()}
    assert {parameter.dtype for parameter in own.values()} == {torch.float32}
    double, single = CHOSEN["all"]
    assert len(own) == 2 * (2 * len(double) + 2 * len(single))
    assert own["transformer_blocks.0.attn.to_q.lora_A.weight"].shape == (4, 32)


def test_first_weights(built: Any) -> None:
    """B is zero, A uniform in +-1/sqrt(in) as peft's; every tensor by (seed, name) alone, so no world size matters."""
    first = state(injected(built))
    again = {}
    for name, value in first.items():
        if name.endswith("lora_B.weight"):
            assert not value.any()
            continue
        bound = 1 / math.sqrt(value.shape[1])
        assert value.abs().max() <= bound
        assert value.std() == pytest.approx(bound / math.sqrt(3), rel=0.35)
        again[name] = value
    assert len({tuple(value.flatten()[:3].tolist()) for value in again.values()}) == len(again)
    initialise(built, seed=8, device=CPU)
    other = state(built)
    assert not any(torch.equal(other[name], value) for name, value in again.items())
    torch.manual_seed(123)
    initialise(built, seed=7, device=CPU)
    assert all(torch.equal(state(built)[name], value) for name, value in again.items())


def test_first_weights_do_not_depend_on_the_other_targets(tiny_model: Path, built: Any) -> None:
    """A module's first weights are the same whether others are adapted too: the name decides, not the order."""
    first = state(injected(built))
    model = resolve(Model(path=str(tiny_model)), parts=("transformer",))
    other = transformer.build(model, dtype=torch.float32)
    inject(other, Lora(rank=4), ["transformer_blocks.1.attn.to_k"])
    initialise(other, seed=7, device=CPU)
    (a, b) = state(other).items()
    assert torch.equal(a[1], first[a[0]])
    assert torch.equal(b[1], first[b[0]])


def test_weights_load_back(built: Any) -> None:
    """Loading brings weights back bit for bit, into the same parameters: an optimizer goes on with them."""
    kept, own = state(injected(built)), dict(parameters(built))
    with torch.no_grad():
        for parameter in own.values():
            parameter.add_(1)
    load(built, kept, device=CPU)
    assert all(torch.equal(state(built)[name], kept[name]) for name in kept)
    assert all(parameter is own[name] for name, parameter in parameters(built))


def test_files_that_do_not_fit(built: Any) -> None:
    """Other names, or another rank, are refused by name with both shapes."""
    first = state(injected(built))
    short = {name: value for name, value in first.items() if "blocks.1.attn.to_k.lora_B" not in name}
    with pytest.raises(UsageError, match=r"transformer_blocks\.1\.attn\.to_k\.lora_B\.weight"):
        load(built, short, device=CPU)
    with pytest.raises(UsageError, match=r"has shape \[1, 1\], lora\.rank asks for \[4, 32\]"):
        load(built, {name: torch.zeros(1, 1) for name in first}, device=CPU)


def inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 4, 128, generator=generator),
        "encoder_hidden_states": torch.randn(1, 6, 96, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": torch.zeros(4, 4),
        "txt_ids": torch.zeros(6, 4),
        "return_dict": False,
    }


def test_attach_equals_merged_weights(built: Any) -> None:
    """A finished adapter of different ranks gives the forward pass of W + B A, and changes it."""
    names = ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_out"]
    adapter, merged, generator = {}, {}, torch.Generator().manual_seed(3)
    for rank, name in enumerate(names, start=2):
        out, width = built.get_submodule(name).weight.shape
        a, b = (torch.randn(shape, generator=generator) * 0.3 for shape in ((rank, width), (out, rank)))
        adapter |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        merged[name] = b @ a
    with torch.no_grad():
        plain = built(**inputs())[0]
        for name, delta in merged.items():
            built.get_submodule(name).weight.add_(delta)
        expected = built(**inputs())[0]
        for name, delta in merged.items():
            built.get_submodule(name).weight.sub_(delta)
        attach(built, adapter, device=CPU)
        found = built(**inputs())[0]
    assert (found - expected).abs().max() <= 1e-5
    assert (found - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [
        (
            "transformer_blocks.99.attn.to_q",
            (2, 32),
            "adapts transformer_blocks.99.attn.to_q, which this model does not",
        ),
        ("transformer_blocks.0.attn", (2, 32), "adapts transformer_blocks.0.attn, which this model does not have"),
        ("transformer_blocks.0.attn.to_q", (2, 64), "takes 64 channels, this model's takes 32"),
    ],
)
def test_attach_to_another_model(built: Any, name: str, shape: tuple[int, int], wanted: str) -> None:
    """An adapter of another model is refused with the module that does not fit."""
    adapter = {f"{name}.lora_A.weight": torch.zeros(shape), f"{name}.lora_B.weight": torch.zeros(32, 2)}
    with pytest.raises(UsageError, match=wanted):
        attach(built, adapter, device=CPU)
