"""Training every kind of adapter: layouts, workers, resuming, recomputing and compiling change nothing; what is
exported is what was trained."""

import copy
import json
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flux2_core.config.reading import dump_toml, parse
from flux2_core.config.sections import Config
from flux2_core.errors import UsageError
from flux2_core.lora import adapter, file, names, reading, targets, told, whole
from flux2_core.lora.kinds import KINDS
from flux2_core.model import transformer
from flux2_core.model.folder import resolve
from flux2_core.output import export
from flux2_core.placement import planner
from flux2_core.placement.compiled import Compiled
from flux2_core.train import preflight
from flux2_core.train.loop import run
from flux2_core.train.trainer import Trainer
from flux2_core.train.validate import Watch
from tests.flux2_core import sharded_process
from tests.flux2_core.placement.test_build import placed
from tests.flux2_core.train.test_trainer import weights_after
from tests.in_process import fill_cache, in_ranks, process_group
from tests.random_adapter import randomised

Make = Callable[..., Config]
CPU = torch.device("cpu")
MIXED = {"mlp": 2, "transformer_blocks.[0-0]": 6}
LORAS: dict[str, dict[str, Any]] = {kind: {"kind": kind, "rank": 4} for kind in KINDS} | {
    "lokr": {"kind": "lokr", "rank": 4, "factor": 2},
    "t-lora": {"kind": "t-lora", "rank": 4, "min_rank": 1, "dropout": 0.3},
    "dora": {"kind": "dora", "rank": 4, "alpha": 7.0, "dropout": 0.3},
    "ranks": {"rank": 4, "alpha": 7.0, "ranks": MIXED, "dropout": 0.2},
}


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    with process_group(tmp_path):
        yield


def gradients(trainer: Trainer, micro: int = 4) -> dict[str, torch.Tensor]:
    """Of step 0, in parts of so many samples."""
    randomised(trainer)
    batch = trainer.data.batch(0)
    for start in range(0, len(batch.sigma_B), micro):
        for _, term in trainer.terms(batch.each(itemgetter(slice(start, start + micro)))):
            term.backward()
    return {name: parameter.grad.clone() for name, parameter in trainer.adapter.items()}


def near(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], most: float = 1e-6) -> None:
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= most * max(1.0, float(gradient.abs().max())), name


@pytest.mark.slow
def test_layouts_and_workers(make_config: Make, tmp_path: Path) -> None:
    """Two processes with the base sharded, in few bits, or streamed have the gradients of one: of every kind, with a
    norm of rows that are elsewhere, with ranks by noise and with ranks left out, by the sample."""
    fill_cache(make_config())
    layouts = [("fsdp", "fp32"), ("fsdp", "int4"), ("stream", "int8")]
    trees = {
        f"{name}-{strategy}-{precision}": placed(partial(make_config, lora=lora), 2, strategy, precision)
        for name, lora in LORAS.items()
        for strategy, precision in (layouts if name in ("dora", "t-lora") else layouts[1:2])
    }
    dumped = {case: config.model_dump(mode="json", by_alias=True) for case, config in trees.items()}
    in_ranks(2, sharded_process.place, dumped, str(tmp_path), 2, folder=tmp_path)
    for case, config in trees.items():
        alone = placed(partial(make_config, lora=config.lora.model_dump()), 1, "ddp", config.train.precision)
        loss, wanted = sharded_process.gradients(Trainer(alone), 0, 1)
        for rank in range(2):
            assert json.loads((tmp_path / f"{case}-{rank}.json").read_text())["loss"] == pytest.approx(loss, rel=1e-6)
            near(load_file(tmp_path / f"{case}-{rank}"), wanted)


@pytest.mark.parametrize("name", LORAS)
def test_recomputed_and_in_parts(make_config: Make, name: str) -> None:
    """Blocks that are computed again, and a batch in parts, have the same gradients: a sample keeps its own ranks."""
    make = partial(make_config, lora=LORAS[name])
    fill_cache(make())
    wanted = gradients(Trainer(make(train={"batch_size": 4})))
    assert all(gradient.any() for gradient in wanted.values())
    for again in ("full", "selective"):
        near(gradients(Trainer(make(train={"batch_size": 4, "recompute": again}))), wanted)
    near(gradients(Trainer(make(train={"batch_size": 4})), micro=1), wanted)


@pytest.mark.parametrize("again", ["none", "full", "selective"])
def test_two_passes_of_unlike_noise(make_config: Make, again: str) -> None:
    """Where a method passes twice before it differentiates, each pass goes back with what it was told itself."""
    make = partial(make_config, lora={"kind": "t-lora", "rank": 4, "min_rank": 1, "targets": "all"})
    fill_cache(make())

    def passed(trainer: Trainer, *, at_once: bool) -> dict[str, torch.Tensor]:
        randomised(trainer)
        batch = trainer.data.batch(0)
        sums = [
            trainer.predict(batch.noisy_Bchw(), batch.prompts_BLD, torch.full_like(batch.sigma_B, sigma)).square().sum
            for sigma in ((0.0, 1.0) if at_once else ())
        ]
        if at_once:
            sum(each() for each in sums).backward()
        for sigma in () if at_once else (0.0, 1.0):
            sigma_B = torch.full_like(batch.sigma_B, sigma)
            trainer.predict(batch.noisy_Bchw(), batch.prompts_BLD, sigma_B).square().sum().backward()
        return {name: parameter.grad.clone() for name, parameter in trainer.adapter.items()}

    wanted = passed(Trainer(make()), at_once=False)
    near(passed(Trainer(make(train={"recompute": again})), at_once=True), wanted, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.all_cases] * (n != "dora")) for n in LORAS])
def test_compiled(make_config: Make, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled blocks of every kind are whole graphs, and have the eager gradients."""
    monkeypatch.setattr("flux2_core.placement.compiled.BACKEND", "aot_eager")
    make = partial(make_config, lora=LORAS[name])
    fill_cache(make())
    wanted = gradients(Trainer(make(train={"batch_size": 4})))
    torch._dynamo.reset()
    trainer = Trainer(make(train={"batch_size": 4, "compile": True, "recompute": "selective"}))
    assert isinstance(trainer.compiler, Compiled)
    near(gradients(trainer), wanted)
    assert not trainer.compiler.failed


@pytest.mark.parametrize("name", LORAS)
def test_resumed_equals_uninterrupted(make_config: Make, name: str) -> None:
    """Interrupted after step 3 and resumed from the checkpoint of step 2, weights are equal bit for bit; so are those
    of the average."""
    straight = make_config(lora=LORAS[name], run="straight", train={"ema": 0.9})
    fill_cache(straight)
    whole_run = weights_after(straight)
    broken = make_config(lora=LORAS[name], run="broken", output={"save_every": 2}, train={"ema": 0.9})
    weights_after(broken, stop=3)
    resumed = weights_after(broken)
    assert all(torch.equal(whole_run[key], resumed[key]) for key in whole_run)


def prediction(trained: Any, sigma: float, trainer: Trainer) -> torch.Tensor:
    """Of the first sample at a noise level, as pictures are drawn."""
    batch = trainer.data.batch(0)
    worn, trainer.transformer = trainer.transformer, trained.eval()
    with torch.no_grad():
        found = trainer.predict(batch.noisy_Bchw(), batch.prompts_BLD, torch.full_like(batch.sigma_B, sigma))
    trainer.transformer = worn.train()
    return found


@pytest.mark.parametrize("name", LORAS)
def test_what_is_exported_is_what_was_trained(make_config: Make, name: str) -> None:
    """Three steps, then the files: what `sample --lora` draws with each of them is what the run's previews are drawn
    with, within bf16; of kinds that diffusers does not load, its file is as far off as is said."""
    config = make_config(lora=LORAS[name], train={"steps": 3, "learning_rate": 1e-2})
    model = fill_cache(config)
    trainer = Trainer(config)
    run(trainer, lambda record: None)
    result = export.export(config, model, resumed_from=0)
    exact = copy.deepcopy(trainer.transformer)
    native = KINDS[config.lora.kind].diffusers
    for loader, path in result["lora"].items():
        if loader == "comfyui" and config.lora.kind == "dora":
            continue  # read by ComfyUI alone; see test_kind_files
        drawing = transformer.build(model, dtype=torch.float32)
        adapter.attach(drawing, reading.to_draw(path), device=CPU)
        transformer.load_weights(drawing, model, device=CPU)
        adapter.measure(drawing, device=CPU)
        for sigma in (0.1, 0.9):
            wanted = prediction(exact, sigma, trainer)
            with adapter.switched_off(exact):
                changed = (prediction(exact, sigma, trainer) - wanted).norm()
            left_out = 0.0 if native or loader == "comfyui" else 2 * result["as_lora"]["error"] * changed
            assert (prediction(drawing, sigma, trainer) - wanted).norm() <= 0.003 * wanted.norm() + left_out
            assert changed > 0.005 * wanted.norm()
    if not native:
        assert result["as_lora"]["rank"] == 16
        assert result["as_lora"]["diffusers"] == result["lora"]["diffusers"]
        assert 0 <= result["as_lora"]["error"] < 0.5
    assert ("as_lora" in result) == (not native)
    assert export.result(config, resumed_from=0) == result


def test_a_plain_lora_beside(make_config: Make) -> None:
    """`output.as_lora`: two more files with the nearest LoRA of that rank, its error in the result, in the facts of the
    report and in the file; off, nothing of it is there."""
    config = make_config(lora=LORAS["dora"], train={"steps": 3, "learning_rate": 1e-2}, output={"as_lora": 2})
    model = fill_cache(config)
    trainer = Trainer(config)
    run(trainer, lambda record: None)
    result = export.export(config, model, resumed_from=0)
    beside = result["as_lora"]
    assert [Path(beside[loader]).name for loader in ("diffusers", "comfyui")] == [
        "test-lora.safetensors",
        "test-lora-comfyui.safetensors",
    ]
    done = targets.finished(config.lora, trainer.weights())
    _, error = whole.plain(done, 2, partial(transformer.weight, model))
    assert beside["error"] == pytest.approx(error, rel=1e-6)
    assert float(reading.said(beside["diffusers"])[export.ERROR]) == beside["error"]
    assert f"leaves out {error:.1%}" in result["facts"]["As a plain LoRA"]
    read = reading.from_file(beside["comfyui"])
    assert {len(a_RI) for a_RI, _ in names.pairs(read).values()} == {2}


def test_previews_and_validation_leave_nothing_out(make_config: Make) -> None:
    """With dropout the validation loss and the previews are those of the same weights without it; a step is not."""
    dropping = make_config(
        lora={"rank": 4, "dropout": 0.5}, validate={"every": 1, "held_out": 0.5, "prompts": ["a sks"]}
    )
    fill_cache(dropping)
    plain = make_config(lora={"rank": 4}, validate={"every": 1, "held_out": 0.5, "prompts": ["a sks"]})
    found = []
    for config in (dropping, plain):
        trainer = Trainer(config)
        randomised(trainer)
        batch = trainer.data.batch(0)
        [(_, loss)] = trainer.terms(batch)
        watch = Watch(trainer)
        with trainer.wearing(trainer.weights()):
            measured = watch._losses() if watch.samples else prediction(trainer.transformer, 0.5, trainer)
        found.append((float(loss.detach()), measured))
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][0] != found[1][0]


def test_what_is_left_out_follows_from_the_place(make_config: Make) -> None:
    """Ranks are left out by (seed, step, place of the sample) alone: two workers' parts are one worker's batch; about
    the share that was asked for, and what stays counts so much more."""
    config = make_config(lora={"rank": 4, "dropout": 0.25}, train={"batch_size": 4})
    fill_cache(config)
    data = Trainer(config).data
    batch = data.batch(1)
    parts = [data.batch(1, rank=rank, world=2).dropped_BR for rank in range(2)]
    assert torch.equal(torch.cat(parts), batch.dropped_BR)
    assert not torch.equal(data.batch(2).dropped_BR, batch.dropped_BR)
    assert not torch.equal(batch.dropped_BR[0], batch.dropped_BR[1])
    assert batch.dropped_BR.unique().tolist() == pytest.approx([0.0, 4 / 3])
    many = told.drop(0.25, 100_000, torch.Generator().manual_seed(0))
    assert float(many.mean()) == pytest.approx(1.0, abs=0.01)
    assert float((many == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert Trainer(make_config()).data.batch(0).dropped_BR is None


def test_ranks_by_pattern(make_config: Make) -> None:
    """The first expression that selects a Linear gives its rank, presets and ranges of blocks among them; the planner
    counts what is there; one that selects nothing is refused; the configuration that is kept reads back the same."""
    config = make_config(lora={"rank": 4, "ranks": {"transformer_blocks.[0-0]": 8, "mlp": 2}})
    model = fill_cache(config)
    trainer = Trainer(config)
    ranks = {name: len(a_RI) for name, (a_RI, _) in names.pairs(trainer.weights()).items()}
    assert ranks["transformer_blocks.0.ff.linear_in"] == 8
    assert ranks["transformer_blocks.1.ff.linear_in"] == 2
    assert ranks["transformer_blocks.1.attn.to_q"] == 4
    assert planner.job(config, model, world=1, local=1).adapter == sum(p.numel() for p in trainer.adapter.values())
    assert targets.strength(config.lora, 8) == 1
    assert targets.strength(make_config(lora={"rank": 4, "alpha": 4.0}).lora, 8) == 0.5
    assert parse(__import__("tomllib").loads(dump_toml(config))) == config
    none = make_config(lora={"ranks": {r"single_transformer_blocks\.9\..*": 2}})
    with pytest.raises(UsageError, match=r"lora\.ranks: .* selects no Linear"):
        preflight.check(none, model, parts=("transformer",))


@pytest.mark.parametrize("name", ["rslora", "t-lora", "lokr", "loha"])
def test_above_a_preset(make_config: Make, tmp_path: Path, name: str) -> None:
    """Differential: over a base with a preset in it, what is exported is the new one alone, and both loaded beside each
    other are what was trained."""
    make = partial(make_config, train={"precision": "fp32"})
    model = fill_cache(make())
    shapes = targets.shapes(make().lora, planner.sizes(model).linears())
    look = {key: 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(5)) for key, shape in shapes.items()}
    preset = file.write(tmp_path, "look", look, metadata={}, dtype="fp32").diffusers
    turned = {"single_transformer_blocks.0.attn.to_out.oft_blocks": torch.zeros(8, 4, 4)}
    turning = file.write(tmp_path, "turning", turned, metadata={}).diffusers
    with pytest.raises(UsageError, match=r"turning\.safetensors: what oft does.*output\.as_lora"):
        preflight.check(make(lora={"preset": [str(turning)]}), model, parts=("transformer",))
    lora = {key: value for key, value in LORAS[name].items() if key != "dropout"}
    trainer = Trainer(make(lora=lora | {"preset": [str(preset)]}))
    randomised(trainer)
    plain = transformer.build(resolve(make().model, parts=("transformer",)), dtype=torch.float32)
    transformer.load_weights(plain, model, device=CPU)
    with torch.no_grad():
        for weights in (look, targets.finished(trainer.config.lora, trainer.weights())):
            for module, own in names.modules(weights).items():
                weight = plain.get_submodule(module).weight
                weight += whole.difference(own, weight.detach)
    wanted = prediction(plain, 0.0, trainer)
    assert (prediction(trainer.transformer, 0.0, trainer) - wanted).norm() <= 1e-5 * wanted.norm()
