"""What is looked at while training: shares of all workers, and the validation loss by its definition."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from flux2_core.config.sections import Config
from flux2_core.model.flow import add_noise
from flux2_core.model.latents import to_tokens
from flux2_core.model.seeded import generator
from flux2_core.output import export
from flux2_core.placement import build
from flux2_core.placement.planner import Placement
from flux2_core.run import metrics
from flux2_core.run.folder import RunFolder
from flux2_core.store.parquet import Rows
from flux2_core.store.schemas import BUCKET_HEIGHT, BUCKET_WIDTH, DATASET
from flux2_core.train import loop, validate
from flux2_core.train.trainer import Trainer
from flux2_core.train.validate import SIGMAS, Watch, measured
from tests.in_process import fill_cache, process_group

Make = Callable[..., Config]


def of_world(world: int, rank: int) -> Any:
    looking: Any = Watch.__new__(Watch)
    looking.trainer = SimpleNamespace(world=world, rank=rank, device=torch.device("cpu"))
    return looking


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_shares_are_whole_and_even(monkeypatch: pytest.MonkeyPatch, world: int) -> None:
    """Every worker has as many places as the others; gathered and cut they are all places in order."""
    for count in range(1, 12):
        shares = [of_world(world, rank)._share(count) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1

        def all_gather(parts: list[torch.Tensor], _mine: torch.Tensor, shares: list[list[int]] = shares) -> None:
            for part, share in zip(parts, shares, strict=True):
                part.copy_(torch.tensor(share))

        monkeypatch.setattr(validate.dist, "all_gather", all_gather)
        gathered = of_world(world, 0)._gather(torch.tensor(shares[0]))
        assert gathered[:count].tolist() == list(range(count))


class Notes:
    """Keeps what would be written as metrics."""

    def __init__(self) -> None:
        self.validated: dict[int, dict[str, float]] = {}

    def validation(self, step: int, values: dict[str, float]) -> None:
        self.validated[step] = values


@pytest.fixture
def trainer(make_config: Make, tmp_path: Path) -> Iterator[Trainer]:
    config = make_config(validate={"every": 2, "prompts": []}, train={"steps": 5})
    fill_cache(config)
    with process_group(tmp_path):
        made = Trainer(config)
        made.data.validation = made.data.train[:2]  # six pictures are too few to hold any out
        yield made


def test_previews_are_decoded_where_the_planner_says(
    make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the card (here: meta, which cannot decode) has no room for it, the CPU decodes a preview, the same picture,
    and the first step's record says so."""
    config = make_config(validate={"every": 0}, train={"steps": 1})
    fill_cache(config)
    monkeypatch.setattr(build, "decide", lambda *_: Placement("ddp", "fp32", "none", decodes=False))
    with process_group(tmp_path):
        trainer = Trainer(config)
        assert loop.run(trainer, lambda _record: None)
    (first,) = metrics.read(RunFolder(config).metrics)
    assert first["warning"].startswith("previews are decoded by the CPU")
    latent_1chw = torch.randn(1, 128, 4, 4, generator=torch.Generator().manual_seed(0))
    wanted = Watch(trainer)._decode(latent_1chw)
    trainer.device = torch.device("meta")
    assert torch.equal(Watch(trainer)._decode(latent_1chw), wanted)


def test_validation_loss_by_its_definition(trainer: Trainer) -> None:
    """The mean over samples and four fixed sigmas of the error, with each sample's own fixed noise; weights untouched.

    It is looked at on every second step and at the end, and on no other.
    """
    notes: Any = Notes()
    looking = Watch(trainer)
    before = {name: value.detach().clone() for name, value in trainer.adapter.items()}
    for step in range(6):
        looking.look(step, notes)
    assert sorted(notes.validated) == [0, 2, 4, 5]
    assert all(torch.equal(before[name], value) and value.grad is None for name, value in trainer.adapter.items())
    errors = torch.zeros(2, len(SIGMAS))
    for place, sample in enumerate(trainer.data.validation):
        clean = trainer.data.latent_rows([sample])[0]
        noise = torch.randn(clean.shape, generator=generator(0, "validation", sample["latent_key"]))
        prompt = trainer.data.prompt_rows(sample["text_keys"][:1])
        for column, sigma in enumerate(SIGMAS):
            level = torch.tensor([sigma])
            with torch.no_grad():
                predicted = trainer.predict(add_noise(clean[None], noise[None], level), prompt, level)
            errors[place, column] = (predicted - to_tokens((noise - clean)[None])).square().mean()
    found = notes.validated[0]
    assert found["loss"] == pytest.approx(float(errors.mean()), rel=1e-5)
    for column, sigma in enumerate(SIGMAS):
        assert found[f"sigma {sigma:g}"] == pytest.approx(float(errors[:, column].mean()), rel=1e-5)
    assert all(0 < values.pop("seconds") < 60 for values in notes.validated.values())
    assert notes.validated[5] == found


@pytest.mark.parametrize("at_once", [1, 3])
def test_noise_levels_in_parts(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """On a GPU a pass takes as many noise levels as the planner says, and the losses are those of one pass."""
    whole = Watch(trainer)._losses()
    passes: list[int] = []
    predict = trainer.predict
    monkeypatch.setattr(trainer, "predict", lambda noisy, *rest: passes.append(len(noisy)) or predict(noisy, *rest))
    monkeypatch.setattr(validate.relief, "levels_at_once", lambda *_: at_once)
    monkeypatch.setattr(validate.accelerator, "is_gpu", lambda _device: True)
    assert Watch(trainer)._losses().tolist() == pytest.approx(whole.tolist(), rel=1e-5)
    assert passes == {1: [1] * 8, 3: [3, 1, 3, 1]}[at_once]


def held_out(groups: dict[tuple[int, int, int], int]) -> Rows:
    """Rows of so many samples per data set, bucket height and width, in an order of their own."""
    rows = [(key, number) for key, count in groups.items() for number in range(count)]
    rows.sort(key=lambda row: hash((row[1], *row[0])))
    names = (DATASET, BUCKET_HEIGHT, BUCKET_WIDTH)
    columns = {name: [key[place] for key, _ in rows] for place, name in enumerate(names)}
    return Rows(pa.table(columns | {"place": range(len(rows))}), np.arange(len(rows)))


def test_what_is_measured_has_its_share() -> None:
    """Of 300 held-out samples 16 are measured, the same ones each time, in their order: each data set and bucket has
    its share of them, rounded; up to 16, and with 0, it is all of them, as they are."""
    groups = {(0, 64, 96): 150, (0, 96, 64): 60, (1, 64, 64): 70, (2, 64, 64): 18, (2, 96, 96): 2}
    rows = held_out(groups)
    taken = measured(rows, 16)
    assert taken == measured(rows, 16)
    assert [row["place"] for row in taken] == sorted({row["place"] for row in taken})
    counts = Counter((row[DATASET], row[BUCKET_HEIGHT], row[BUCKET_WIDTH]) for row in taken)
    assert counts.total() == 16
    assert all(abs(counts[key] - 16 * count / 300) < 1 for key, count in groups.items())
    assert [row["place"] for row in taken] != [row["place"] for row in rows][:16]
    for few, most in ((held_out({(0, 1, 1): 16}), 16), (rows, 0), (rows, 300)):
        assert measured(few, most) is few


def test_validation_costs_no_more_than_its_samples(make_config: Make, tmp_path: Path) -> None:
    """`validate.samples` held-out samples are measured at each look, with and without an average; the record says in
    how many seconds, and the run what share of its time that was."""
    config = make_config(validate={"every": 2, "samples": 2}, train={"steps": 4, "ema": 0.9})
    model = fill_cache(config)
    with process_group(tmp_path):
        trainer = Trainer(config)
        trainer.data.validation = trainer.data.train
        assert len(trainer.data.validation) > 2
        predict, passes = trainer.predict, []
        trainer.predict = lambda noisy, *rest: passes.append(len(noisy)) or predict(noisy, *rest)
        notes: Any = Notes()
        Watch(trainer).look(2, notes)
        assert passes == [len(SIGMAS)] * 2 * 2
        trainer.predict = predict
        assert loop.run(trainer, lambda record: None)
    looks = metrics.read(RunFolder(config).validation)
    spent, steps = (sum(one["seconds"] for one in many) for many in (looks, metrics.read(RunFolder(config).metrics)))
    assert [look["step"] for look in looks] == [0, 2, 4]
    facts = export.export(config, model, resumed_from=0)["facts"]
    assert facts["Validation time"].startswith(f"{spent:.1f} s")
    assert facts["Validation time"].endswith(f" s, {spent / (spent + steps):.1%} of training and validation")
    assert facts["Validation time"] in (RunFolder(config).path / "report.html").read_text()


def test_each_preview_has_a_seed_of_its_own(make_config: Make, tmp_path: Path) -> None:
    """The k-th prompt is drawn from `validate.seed` + k: the same prompt twice gives two pictures, and the second is
    what the next seed gives alone."""
    drawn = []
    with process_group(tmp_path):
        for seed, prompts in ((5, ["a dog", "a dog"]), (6, ["a dog"])):
            config = make_config(run=f"r{seed}", validate={"every": 2, "prompts": prompts, "seed": seed, "size": 64})
            fill_cache(config)
            notes: Any = SimpleNamespace(image=lambda step, name, picture: drawn.append(picture))
            Watch(Trainer(config)).look(0, notes)
    first, second, alone = drawn
    assert not np.array_equal(first, second)
    assert np.array_equal(second, alone)


@pytest.mark.parametrize("kind", ["ema", "schedule-free"])
def test_what_is_exported_is_what_is_measured(make_config: Make, tmp_path: Path, kind: str) -> None:
    """The average of `train.ema` has a validation loss of its own; schedule-free is measured at its average. The
    weights that are trained come back bit for bit."""
    train = {"ema": 0.9} if kind == "ema" else {"optimizer": "schedule-free"}
    config = make_config(validate={"every": 2}, train={"steps": 5, **train})
    fill_cache(config)
    with process_group(tmp_path):
        trainer = Trainer(config)
        trainer.data.validation = trainer.data.train[:1]
        for step in range(4):
            trainer.train_step(trainer.data.batch(step))
        trained = {name: value.detach().clone() for name, value in trainer.adapter.items()}
        notes: Any = Notes()
        Watch(trainer).look(4, notes)
        assert all(torch.equal(trained[name], value) for name, value in trainer.adapter.items())
        with trainer.wearing(trainer.ema or trainer.weights()) as transformer:
            assert not transformer.training, "what is dropped at random while training is all there when one looks"
            own = Watch(trainer)._losses()
        assert trainer.transformer.training
        trained_loss = float(Watch(trainer)._losses().mean())
    found = notes.validated[4]
    assert found["ema loss" if kind == "ema" else "loss"] == pytest.approx(float(own.mean()), rel=1e-6)
    assert float(own.mean()) != trained_loss
    assert ("ema loss" in found) == (kind == "ema")
