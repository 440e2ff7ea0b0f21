"""Differential LoRA: finished ones are part of the base, under every precision and layout; the new one stands alone."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from flux2_core.config.sections import Config
from flux2_core.errors import DataError, UsageError
from flux2_core.lora import adapter, file, names, reading
from flux2_core.model import frozen_linear, transformer
from flux2_core.model.folder import resolve
from flux2_core.output import export
from flux2_core.placement import build
from flux2_core.placement.planner import Placement
from flux2_core.train import preflight
from flux2_core.train.loop import run
from flux2_core.train.trainer import Trainer
from tests.flux2_core.placement.test_build import compare
from tests.in_process import fill_cache, process_group
from tests.random_adapter import randomised, state

Make = Callable[..., Config]
CPU = torch.device("cpu")
PARTS = ("transformer",)


@pytest.fixture
def made(make_config: Make, tmp_path: Path) -> list[str]:
    """Two finished LoRAs of the tiny model, of other targets and ranks than the one that is trained."""
    paths = []
    for place, (targets, rank) in enumerate((("attention", 2), ("all", 3))):
        config = make_config(lora={"targets": targets, "rank": rank}, train={"seed": place})
        built = transformer.build(resolve(config.model, parts=PARTS), dtype=torch.float32)
        adapter.inject(built, config.lora, build.targets.match(config.lora, transformer.linear_names(built)))
        rng = torch.Generator().manual_seed(place)
        shapes = {name: parameter.shape for name, parameter in adapter.parameters(built)}
        weights = {name: 0.1 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}
        paths.append(file.write(tmp_path, f"look{place}", weights, metadata={}, dtype="fp32").diffusers)
    return [str(path) for path in paths]


def predicted(trainer: Trainer) -> torch.Tensor:
    batch = trainer.data.batch(0)
    with torch.no_grad():
        return trainer.predict(batch.noisy_Bchw(), batch.prompts_BLD, batch.sigma_B, (), batch.guidance_B)


def test_presets_are_part_of_the_base(make_config: Make, made: list[str], tmp_path: Path) -> None:
    """The model with presets in its weights does what the model does with all three adapters beside each other; without
    the new one it is the base with the presets; what is trained and exported is the new one alone."""
    fill_cache(make_config())
    config = make_config(lora={"preset": made, "preset_scales": [0.5, 2.0]}, train={"precision": "fp32"})
    with process_group(tmp_path):
        trainer = Trainer(config)
        randomised(trainer)
        with_all = predicted(trainer)
        with trainer.base():
            without = predicted(trainer)
        own = state(trainer.transformer)
        plain = Trainer(make_config(lora={"targets": "all"}))
    linears = {name: module for name, module in plain.transformer.named_modules() if hasattr(module, "lora_A")}
    summed = reading.presets(config.lora)
    with torch.no_grad():
        for name, module in linears.items():
            a_RI, b_OR = summed[name]
            module.base_layer.weight += b_OR @ a_RI
    adapter.load(plain.transformer, own, device=CPU)
    assert torch.allclose(predicted(plain), with_all, atol=1e-6)
    with plain.base():
        assert torch.allclose(predicted(plain), without, atol=1e-6)
    assert (with_all - without).abs().max() > 1e-3
    assert own.keys() == dict(adapter.parameters(plain.transformer)).keys()


def test_presets_taken_away_again_leave_the_base(make_config: Make, made: list[str]) -> None:
    """The presets with the opposite strength in front of them are nothing: the base's own weights, to the bit."""
    model = resolve(make_config().model, parts=PARTS)
    lora = make_config(lora={"preset": [made[0], made[0]], "preset_scales": [0.75, -0.75]}).lora
    built, changed = (transformer.build(model, dtype=torch.float32) for _ in range(2))
    transformer.load_weights(built, model, device=CPU)
    added = reading.presets(lora)
    transformer.load_weights(changed, model, device=CPU, added=added)
    for (name, one), (_, other) in zip(built.named_parameters(), changed.named_parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-7), name


@pytest.mark.parametrize("precision", ["int8", "fp8-matmul", "int4"])
@pytest.mark.parametrize("strategy", ["ddp", "stream"])
def test_few_bits_are_those_of_the_sum(make_config: Make, made: list[str], precision: str, strategy: str) -> None:
    """A base in few bits is rounded once, after the presets were added."""
    config = make_config(lora={"preset": made[:1]}, train={"precision": precision}, cluster={"strategy": strategy})
    model, chosen = (
        resolve(config.model, parts=PARTS),
        Placement(strategy, precision, "full" if strategy == "stream" else "none"),
    )
    built = build.build(build.job(config, model, world=1, device=CPU), chosen, model, device=CPU)
    exact = transformer.build(model, dtype=torch.float32)
    transformer.load_weights(exact, model, device=CPU)
    for module, (a_RI, b_OR) in reading.presets(config.lora).items():
        weight = exact.get_submodule(module).weight + b_OR @ a_RI
        rounded = built.get_submodule(module).base_layer
        payload, scale = frozen_linear.quantise(weight.detach(), precision)
        assert torch.equal(rounded.payload.view(torch.uint8), payload.view(torch.uint8)), module
        assert torch.equal(rounded.scale, scale), module


@pytest.mark.slow
def test_sharded_rows_get_their_own_part(make_config: Make, made: list[str], tmp_path: Path) -> None:
    """Processes that hold some rows of a weight each add the same rows of the presets: gradients are those of one."""
    make = partial(make_config, lora={"preset": made, "rank": 4})
    compare(make, tmp_path, [("fsdp", "fp32"), ("fsdp", "int8")], world=2, local=2)


def test_presets_that_do_not_fit(make_config: Make, made: list[str], tmp_path: Path) -> None:
    """A file that is not there, is no LoRA or is for another model, scales without files: refused before a run."""
    model = resolve(make_config().model, parts=PARTS)
    for path, error, said in (("none.safetensors", DataError, "no such file"), (__file__, DataError, "safetensors")):
        with pytest.raises(error, match=said):
            preflight.check(make_config(lora={"preset": [path]}), model, parts=("transformer",))
    weights = {f"transformer_blocks.0.attn.to_q.{end}": torch.ones(7, 7) for end in (names.A, names.B)}
    other = str(file.write(tmp_path, "other", weights, metadata={}).diffusers)
    with pytest.raises(UsageError, match=r"other\.safetensors: the LoRA is for another model"):
        preflight.check(make_config(lora={"preset": [other]}), model, parts=("transformer",))
    with pytest.raises(UsageError, match="2 preset_scales for 1 files"):
        make_config(lora={"preset": made[:1], "preset_scales": [1.0, 2.0]})


def test_an_export_names_its_presets(make_config: Make, made: list[str]) -> None:
    """Files of a run with presets say by a hash which ones, and have the new adapter's weights alone."""
    config = make_config(lora={"preset": made, "rank": 4}, train={"steps": 1})
    model = fill_cache(config)
    trainer = Trainer(config)
    run(trainer, lambda record: None)
    export.export(config, model, resumed_from=0)
    with safe_open(str(trainer.folder.lora_files[0]), framework="pt") as stored:
        assert len(stored.metadata()["cacheloom.presets"]) == 64
    weights = load_file(trainer.folder.lora_files[0])
    assert {len(weight) for name, weight in weights.items() if "lora_A" in name} == {4}


def ranged(make: Make, expression: str) -> list[str]:
    config: Any = make(lora={"targets": [expression]})
    built = transformer.build(resolve(config.model, parts=PARTS), dtype=torch.float32)
    return build.targets.match(config.lora, transformer.linear_names(built))


def test_ranges_of_blocks(make_config: Make) -> None:
    """`blocks.[0-1]` are both blocks, whole or some Linears of each; a range that runs backwards is refused."""
    every = ranged(make_config, r"single_transformer_blocks\.\d+\..*")
    first = ranged(make_config, "single_transformer_blocks.[0-0]")
    assert first == [name for name in every if name.startswith("single_transformer_blocks.0.")]
    assert ranged(make_config, "single_transformer_blocks.[0-99]") == every
    part = ranged(make_config, r"single_transformer_blocks\.[0-1].attn\.to_out")
    assert part == [f"single_transformer_blocks.{place}.attn.to_out" for place in range(2)]
    with pytest.raises(UsageError, match="bad character range 1-0"):
        ranged(make_config, "single_transformer_blocks.[1-0]")
