"""Drawing: what the planner's placement draws, against a model put together by hand."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flux2_core.cache import fingerprints, index
from flux2_core.cache.index import TableRef
from flux2_core.config.sections import Config
from flux2_core.errors import SetupError, UsageError
from flux2_core.lora import adapter, file, reading
from flux2_core.model import frozen_linear, transformer
from flux2_core.model.folder import resolve
from flux2_core.placement.planner import Placement
from flux2_core.store import schemas
from flux2_core.store.table import Table
from stages import sample as stage
from stages.encode_images import ImageWorker
from stages.encode_text import TextWorker
from stages.sample import SampleWorker
from tests.in_process import PARTS

Make = Callable[..., Config]
CPU = torch.device("cpu")
Q, OUT = "transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.attn.to_out"


def prompts_table(config: Config) -> TableRef:
    """A table with the rows of one prompt."""
    fingerprint = fingerprints.text_fingerprint(resolve(config.model, parts=PARTS), config)
    uri = index.text_uri(config, fingerprint)
    Table.open_or_create(uri, kind=schemas.KIND_TEXT, fingerprint=fingerprint)
    worker = TextWorker(config.model_dump(mode="json", by_alias=True), uri)
    worker.work(["a teapot"])
    worker.close()
    return TableRef(uri, Table.open(uri).version, fingerprint)


def lora(folder: Path, *, module: str = Q, width: int = 32) -> Path:
    """A LoRA file that changes pictures: two modules of different ranks."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, rank in ((module, 3), (OUT, 2)):
        columns = width if name == module else 128
        weights[f"{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator)
        weights[f"{name}.lora_B.weight"] = torch.randn(32, rank, generator=generator)
    return file.write(folder / "lora", "teapot", weights, metadata={}, dtype="fp32").diffusers


def worker(config: Config, table: TableRef, path: Path | None) -> SampleWorker:
    return SampleWorker(config.model_dump(mode="json", by_alias=True), table, path)


def by_hand(config: Config, table: TableRef, path: Path | None, *, seed: int = 5) -> np.ndarray:
    """A picture from a model that no planner saw: built, adapted, rounded, filled."""
    drawing = worker(config, table, None)
    drawing.load({})
    model = resolve(config.model, parts=PARTS)
    built = transformer.build(model, dtype=drawing.precision)
    if config.text.stored == "projected":
        transformer.skip_projection(built)
    if path is not None:
        adapter.attach(built, reading.from_file(path), device=CPU)
    frozen_linear.swap(built, config.train.precision, dtype=drawing.precision, device=CPU)
    transformer.load_weights(built, model, device=CPU)
    drawing.transformer = built.eval()
    return drawing.draw("a teapot", seed)


@pytest.mark.parametrize(
    ("sections", "chosen"),
    [
        ({}, ("fp32", "ddp")),
        ({"text": {"stored": "projected"}, "train": {"precision": "bf16", "recompute": "selective"}}, ("bf16", "ddp")),
        ({"train": {"precision": "int8"}, "cluster": {"strategy": "stream"}}, ("int8", "stream")),
        ({"cluster": {"strategy": "hsdp", "workers": 4}, "train": {"batch_size": 4}}, ("fp32", "ddp")),
    ],
)
def test_pictures_are_those_of_a_model_put_together_by_hand(
    make_config: Make, tmp_path: Path, sections: dict[str, Any], chosen: tuple[str, str]
) -> None:
    """Where the planner puts the model changes no pixel, whatever was set for training; an adapter does."""
    config = make_config(**sections)
    table = prompts_table(config)
    drawn = {}
    for path in (None, lora(tmp_path)):
        drawing = worker(config, table, path)
        assert drawing.load({}) == f'drawing with train.precision="{chosen[0]}" cluster.strategy="{chosen[1]}"'
        assert not drawing.transformer.training
        drawn[path] = drawing.draw("a teapot", 5)
        assert np.array_equal(drawn[path], drawing.draw("a teapot", 5)), "a second one is the same"
        assert np.array_equal(drawn[path], by_hand(config, table, path))
    first, second = drawn.values()
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("decodes", [True, False])
def test_where_pictures_are_decoded(make_config: Make, monkeypatch: pytest.MonkeyPatch, decodes: bool) -> None:
    """Where the planner found no room for it on the card, the VAE is the CPU's, and the line says so."""
    homes, config = list[str](), make_config()
    table = prompts_table(config)
    monkeypatch.setattr(stage.cluster, "device", lambda: "meta")
    monkeypatch.setattr(stage.build, "decide", lambda *_: Placement("ddp", "bf16", "none", decodes=decodes))
    monkeypatch.setattr(stage.build, "build", lambda *_, **__: None)
    monkeypatch.setattr(stage, "Vae", lambda _model, device: homes.append(device))
    told = worker(config, table, None).load({})
    assert homes == ["meta" if decodes else "cpu"]
    assert told.endswith(
        'strategy="ddp"' if decodes else "; pictures are decoded by the CPU, the card has no room for it"
    )


def test_no_actor_refuses_to_begin() -> None:
    """What an actor's constructor raises reaches the driver as Ray's own error: the first call refuses instead."""
    tree = {"modle": {"path": "x"}}  # of another cacheloom
    text, images = TextWorker(tree, ""), ImageWorker(tree, "")
    drawing = SampleWorker(tree, TableRef("", 0, {}), None)
    for begin in (lambda: text.work(["x"]), lambda: images.model, lambda: drawing.load({})):
        with pytest.raises(UsageError, match=r"^configuration: model: required"):
            begin()


@pytest.mark.ray
def test_a_worker_that_ends(ray_runtime: None, make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed while it loads ends the command in a line, not in Ray's traceback."""

    class Killed(SampleWorker):
        def load(self, driver: Any) -> str:
            os.kill(os.getpid(), signal.SIGKILL)
            return super().load(driver)

    monkeypatch.setattr(stage, "SampleWorker", Killed)
    config = make_config()
    with pytest.raises(SetupError, match=r"^the worker that draws has ended \(.*memory of the machine"):
        stage.sample(config, resolve(config.model, parts=PARTS), ["x"], TableRef("", 0, {}), adapter=None)


@pytest.mark.ray
def test_errors_of_ours_come_through_ray(ray_runtime: None, make_config: Make, tmp_path: Path) -> None:
    """The LoRA of another model is refused in one sentence by the driver; where it lies is said before it is drawn."""
    config = make_config()
    table, model = prompts_table(config), resolve(config.model, parts=PARTS)
    with pytest.raises(UsageError, match=r"for another model: its .*to_q takes 64 channels, this model's takes 32"):
        stage.sample(config, model, ["a teapot"], table, adapter=lora(tmp_path / "other", width=64))
    told: list[Any] = []
    drawn = stage.sample(
        config, model, ["a teapot"], table, adapter=None, say=told.append, progress=lambda *counts: told.append(counts)
    )
    assert told == [(0, 1), 'drawing with train.precision="fp32" cluster.strategy="ddp"', (1, 1)]
    assert np.array_equal(drawn[0], by_hand(config, table, None, seed=config.validation.seed))
