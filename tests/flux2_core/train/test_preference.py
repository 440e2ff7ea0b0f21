"""Preference pairs: the loss by hand, its limits, mixed with plain pictures, on two workers, and what is cached."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_core.cache import garbage, publish, verify
from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.data.needs import LATENTS
from flux2_core.errors import DataError, UsageError
from flux2_core.model.flow import add_noise, velocity
from flux2_core.model.folder import resolve
from flux2_core.model.latents import to_tokens
from flux2_core.plan import describe, survey
from flux2_core.run import metrics
from flux2_core.store import parquet, schemas, upkeep
from flux2_core.store.table import Table
from flux2_core.train import show
from flux2_core.train.loop import run
from flux2_core.train.losses import mse_B
from flux2_core.train.methods.protocol import Batch
from flux2_core.train.trainer import Trainer
from tests.in_process import PARTS, fill_cache, in_ranks, process_group
from tests.random_adapter import randomised

Make = Callable[..., Config]


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    with process_group(tmp_path):
        yield


@pytest.fixture(scope="session")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`better/` with captions, `worse/` (one of another size), `masks/`, `looks/`, and `plain/` beside them."""
    folder, rng = tmp_path_factory.mktemp("pairs"), np.random.default_rng(2)
    for name in ("better", "worse", "masks", "looks", "plain"):
        (folder / name).mkdir()
    half = np.zeros((64, 64), dtype=np.uint8)
    half[:, :32] = 255
    for place in range(4):
        sides = {"better": (64, 64, 3), "worse": (96, 64, 3) if place == 3 else (64, 64, 3), "looks": (32, 48, 3)}
        for name, shape in (sides | {"plain": (64, 64, 3)}).items():
            Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / name / f"p{place}.png")
        Image.fromarray(half).save(folder / "masks" / f"p{place}.png")
        (folder / "better" / f"p{place}.txt").write_text(f"a photo of sks {place}")
        (folder / "plain" / f"p{place}.txt").write_text(f"a plain photo {place}")
    return folder


def configured(
    make_config: Make, pairs: Path, *, own: dict[str, Any] | None = None, plain: bool = False, **sections: Any
) -> Config:
    """A set of pairs, and one of plain pictures where asked."""
    paired = {"preferred": str(pairs / "better"), "rejected": str(pairs / "worse"), "resolutions": [64], **(own or {})}
    others = {"path": str(pairs / "plain"), "resolutions": [64], "weight": 0.5}
    tree = make_config().model_dump(mode="json", by_alias=True)
    for name, values in ({"loss": {"preference_beta": 50.0}} | sections).items():
        tree[name] = {**tree[name], **values}
    return parse(tree | {"data": [paired, others] if plain else [paired]})


def prepared(config: Config) -> Trainer:
    fill_cache(config)
    trainer = Trainer(config)
    randomised(trainer)
    return trainer


def by_hand(trainer: Trainer, batch: Batch) -> list[float]:
    """The loss of each pair of a batch, its pictures passed one by one."""
    own, found = batch.carried["preference"], []
    for place in range(len(batch.ids)):
        one = batch.each(itemgetter(slice(place, place + 1)))
        errors = {}
        for kind, latents in (("w", one.latents_Bchw), ("l", own["rejected_Bchw"][place : place + 1])):
            seen = add_noise(latents, one.noise_Bchw, one.sigma_B), one.prompts_BLD, one.sigma_B, one.references_RBchw
            target = to_tokens(velocity(latents, one.noise_Bchw))
            mask = None if one.mask_Bhw is None else one.mask_Bhw.flatten(1)
            with torch.no_grad():
                errors[kind] = float(mse_B(trainer.predict(*seen), target, mask))
                with trainer.base():
                    errors[f"{kind} base"] = float(mse_B(trainer.predict(*seen), target, mask))
        margin = (errors["w"] - errors["w base"]) - (errors["l"] - errors["l base"])
        beta = trainer.config.loss.preference_beta
        found.append(math.log1p(math.exp(beta / 2 * margin)))
    return found


@pytest.mark.parametrize("beside", ["nothing", "masks and references"])
def test_the_loss_by_hand(make_config: Make, pairs: Path, beside: str) -> None:
    """-log sigmoid(-beta / 2 * difference) of both pictures' errors over the base's, at one noise and level, with the
    preferred's mask and references for both; the records name it."""
    own = {} if beside == "nothing" else {"masks": str(pairs / "masks"), "references": [str(pairs / "looks")]}
    trainer = prepared(configured(make_config, pairs, own=own, train={"batch_size": 4}))
    assert list(trainer.data.methods) == ["preference"]
    batch = trainer.data.batch(0)
    wanted = by_hand(trainer, batch)
    assert len({round(one, 6) for one in wanted}) == 4
    record = trainer.train_step(batch)
    assert record["preference"] == record["loss"] == pytest.approx(np.mean(wanted), rel=1e-4)
    assert record["grad_norm"] > 0


def test_the_rejected_is_what_its_name_says(make_config: Make, pairs: Path) -> None:
    """Each batch carries the latents of the picture of the same name, cut to the preferred's bucket, in two workers'
    parts the same; `show` has them too."""
    config = configured(make_config, pairs, train={"batch_size": 4})
    data = prepared(config).data
    alone = {"path": str(pairs / "worse"), "caption": "a b", "resolutions": [64], "crop_aspect": "square"}
    squares = prepared(make_config(run="worse", data=[alone]))
    rows = {row["id"]: squares.data.latent_rows([row])[0] for row in squares.data.train}
    batch = data.batch(0)
    for name, latents in zip(batch.ids, batch.carried["preference"]["rejected_Bchw"], strict=True):
        assert torch.equal(latents, rows[name])
    parts = [data.batch(0, rank=rank, world=2).carried["preference"]["rejected_Bchw"] for rank in range(2)]
    assert torch.equal(torch.cat(parts), batch.carried["preference"]["rejected_Bchw"])
    assert torch.equal(show.tensors_of(config, squares.model, "p0")["rejected"], rows["p0"])


def test_limits(make_config: Make, pairs: Path) -> None:
    """beta 0: the loss is log 2 and no weight has a gradient. A pair of equal pictures: log 2, and no gradient either.
    A fresh adapter: log 2, and a gradient."""
    trainer = prepared(configured(make_config, pairs, loss={"preference_beta": 0}))
    record = trainer.train_step(trainer.data.batch(0))
    assert (record["loss"], record["grad_norm"]) == (pytest.approx(math.log(2), abs=1e-7), 0)
    config = configured(make_config, pairs)
    trainer = Trainer(config.model_copy(update={"run": "equal"}))
    fresh = trainer.train_step(trainer.data.batch(0))
    assert fresh["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert fresh["grad_norm"] > 1e-3
    randomised(trainer)
    batch = trainer.data.batch(1)
    own = batch.carried["preference"] | {"rejected_Bchw": batch.latents_Bchw}
    record = trainer.train_step(replace(batch, carried={"preference": own}))
    assert record["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert record["grad_norm"] < 1e-4


def test_plain_pictures_beside_pairs(make_config: Make, pairs: Path) -> None:
    """Pairs and plain pictures in one batch: each has its own term alone, with its data set's weight."""
    trainer = prepared(configured(make_config, pairs, plain=True, train={"batch_size": 8}))
    assert list(trainer.data.methods) == ["flow", "preference"]
    batch = trainer.data.batch(0)
    paired = batch.carried["preference"]["paired_B"]
    assert paired.tolist() == ["@1" not in name for name in batch.ids]
    assert torch.equal(batch.carried["flow"]["single_B"], ~paired)
    wanted = [one for one, pair in zip(by_hand(trainer, batch), paired, strict=True) if pair]
    record = trainer.train_step(batch)
    assert record["preference"] == pytest.approx(sum(wanted) / 8, rel=1e-4)
    single = prepared(trainer.config)  # the same weights again
    seen = batch.noisy_Bchw(), batch.prompts_BLD, batch.sigma_B
    with torch.no_grad():
        off = mse_B(single.predict(*seen), to_tokens(velocity(batch.latents_Bchw, batch.noise_Bchw)))
    assert record["loss"] - record["preference"] == pytest.approx(float((0.5 * ~paired * off).sum() / 8), rel=1e-4)


def ranked(rank: int, world: int, tree: str, out: str) -> None:
    """One process of a group: three steps' losses and norms."""
    trainer = Trainer(Config.model_validate_json(tree), rank=rank, world=world)
    randomised(trainer)
    records = [trainer.train_step(trainer.data.batch(step, rank=rank, world=world)) for step in range(3)]
    Path(f"{out}/{world}-{rank}").write_text(json.dumps([[one["loss"], one["grad_norm"]] for one in records]))


def test_two_workers_and_parts(make_config: Make, pairs: Path, tmp_path: Path) -> None:
    """Batches of 3 out of pairs and plain pictures: the same losses and norms on one and on two workers, in parts."""
    config = configured(
        make_config, pairs, plain=True, train={"batch_size": 3, "preservation": "blank"}, cluster={"micro_batch": 1}
    )
    fill_cache(config)
    for world in (1, 2):
        in_ranks(world, ranked, config.model_dump_json(by_alias=True), str(tmp_path), folder=tmp_path)
    one, first, second = (json.loads((tmp_path / name).read_text()) for name in ("1-0", "2-0", "2-1"))
    assert first == second
    assert np.array(first) == pytest.approx(np.array(one), rel=1e-4)


def test_a_run_that_goes_on_is_the_uninterrupted_one(make_config: Make, pairs: Path) -> None:
    """Three steps at once, and two and one after a checkpoint: the same adapter to the bit."""
    config = configured(make_config, pairs, train={"steps": 3}, output={"save_every": 2})
    fill_cache(config)
    whole = Trainer(config.model_copy(update={"run": "whole"}))
    run(whole, lambda record: None)
    broken = Trainer(config)
    for step in range(2):
        broken.train_step(broken.data.batch(step))
    broken.save()
    resumed = Trainer(config)
    assert resumed.step == 2
    resumed.train_step(resumed.data.batch(2))
    assert all(torch.equal(weight, whole.weights()[name]) for name, weight in resumed.weights().items())
    assert all(record["preference"] > 0 for record in metrics.read(whole.folder.metrics))


def test_a_table_without_pairs_is_the_one_of_before(make_config: Make, pairs: Path) -> None:
    """Only a samples table with pairs has the column; others keep schema and content, and so their name."""
    fill_cache(config := make_config())
    assert parquet.read_parquet(Trainer(config).data.index.samples).schema.names == schemas.samples_schema().names
    data = prepared(configured(make_config, pairs)).data
    names = parquet.read_parquet(data.index.samples).schema.names
    assert set(names) - set(schemas.samples_schema().names) == {schemas.REJECTED}


def test_whoever_walks_the_cache_knows_the_rejected(make_config: Make, pairs: Path) -> None:
    """`gc` keeps the rejected latents, `verify` misses one, and training without it is refused, with its sample."""
    config = configured(make_config, pairs)
    trainer = prepared(config)
    data = trainer.data
    assert garbage.collect(config, keep=timedelta(0), dry_run=False)["dropped"] == {"text": 0, "latents": 0}
    assert Table.open(data.latents.uri).rows() == 8
    key = data.train[0]["rejected"]["latent_key"]
    assert key in LATENTS["rejected"].keys(parquet.read_parquet(data.index.samples)).to_pylist()
    upkeep.drop(data.latents.uri, [key])
    lacking = replace(data.index.latents, version=Table.open(data.latents.uri).version)
    publish.write_index(config, replace(data.index, latents=lacking))
    with pytest.raises(DataError, match="the first is for 'the rejected picture of p"):
        Trainer(config)
    model = resolve(config.model, parts=PARTS)
    assert len(verify.verify_rows(config, model)["missing"]) == 1
    told = describe.describe(config, model, survey.survey(config, model))
    assert told["samples"]["pairs"] == told["samples"]["kept"] == 4
    assert told["rows"]["latents"] | {"why": None} == {"needed": 8, "cached": 7, "missing": 1, "why": None}
    assert told["bytes"]["latents"] == 8 * 16 * 128 * 4
    assert any("another size: cut to the preferred's bucket" in warning for warning in told["warnings"])


REFUSED = {
    "without rejected": ({"rejected": None}, {}, "without rejected"),
    "two places": ({"path": "elsewhere"}, {}, "stands in place of path"),
    "a column and a folder": ({"rejected": "column:worse"}, {}, "two folders or two columns"),
    "regularisation": ({"regularisation": True}, {}, "remove rejected"),
    "moved target": ({}, {"loss": {"contrastive_guidance": 3.0}}, "loss.contrastive_guidance is for single pictures"),
    "differential": ({}, {"loss": {"differential_guidance": 3.0}}, "loss.differential_guidance is for single"),
    "prior": ({"masks": "masks"}, {"loss": {"masked_prior": 1.0}}, "set data.0.masks"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_pairs_do_not_take(make_config: Make, pairs: Path, case: str) -> None:
    """Each is refused with its key when the configuration is read."""
    own, sections, said = REFUSED[case]
    with pytest.raises(UsageError, match=said):
        configured(make_config, pairs, own=own, **sections)


def test_beta_without_pairs_is_refused(make_config: Make) -> None:
    """A key that would do nothing is refused, with the way out."""
    with pytest.raises(UsageError, match=r"loss\.preference_beta is for pairs.*set data\.0\.rejected"):
        make_config(loss={"preference_beta": 100.0})
