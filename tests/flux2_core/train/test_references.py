"""References: as many as a sample has, in order, dropped for whole batches, and seen by previews too."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_core.cache import index, verify
from flux2_core.cache.garbage import collect
from flux2_core.config.reading import absolute, dump_toml, load
from flux2_core.config.sections import Config
from flux2_core.data import intake, needs
from flux2_core.errors import DataError, UsageError
from flux2_core.model import sampler
from flux2_core.model.folder import resolve
from flux2_core.model.latents import to_tokens
from flux2_core.plan import describe, survey
from flux2_core.run import checkpoint, previews
from flux2_core.run.folder import RunFolder
from flux2_core.run.metrics import Writer
from flux2_core.train import preflight
from flux2_core.train.batches import TrainingData
from flux2_core.train.loop import run
from flux2_core.train.losses import mse_B
from flux2_core.train.methods.protocol import Batch
from flux2_core.train.show import tensors_of
from flux2_core.train.trainer import Trainer
from flux2_core.train.validate import Watch
from tests.in_process import PARTS, fill_cache, in_ranks, process_group

Make = Callable[..., Config]
RAGGED = {"p0": (0,), "p1": (0,), "p2": (2,), "p3": (0, 1, 2), "p4": (0, 1, 2), "p5": (0, 1, 2)}  # folders with each


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    with process_group(tmp_path):
        yield


@pytest.fixture(scope="session")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures with captions and masks, and three folders of references, of which some pictures have but one."""
    folder, rng = tmp_path_factory.mktemp("edits"), np.random.default_rng(3)

    def save(name: str, shape: tuple[int, ...]) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / name)

    for name, folders in RAGGED.items():
        save(f"after/{name}.png", (64, 64, 3))
        (folder / "after" / f"{name}.txt").write_text(f"image 2 in the colours of the third picture, {name}")
        mask = np.zeros((64, 64), dtype=np.uint8)
        mask[:, :32] = 255
        (folder / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
        for number in folders:
            save(f"r{number}/{name}.png", ((32, 48, 3), (64, 64, 3), (48, 48, 3))[number])
    return folder


def data(edits: Path, **own: Any) -> list[dict[str, Any]]:
    folders = [str(edits / f"r{number}") for number in range(3)]
    return [{"path": str(edits / "after"), "resolutions": [64], "references": folders, **own}]


def opened(config: Config) -> TrainingData:
    fill_cache(config)
    return TrainingData(config, resolve(config.model, parts=PARTS))


def test_one_and_three_references_in_one_data_set(make_config: Make, edits: Path) -> None:
    """Each sample has those that exist, in the folders' order, as `show` shows them too; batches are of samples with
    as many of the same shapes; `plan` counts them, and captions that name one that is not there."""
    config = make_config(data=data(edits))
    found = opened(config)
    shapes = {"p0": [(2, 3)], "p2": [(3, 3)], "p4": [(2, 3), (4, 4), (3, 3)]}
    for name, wanted in shapes.items():
        shown = tensors_of(config, resolve(config.model, parts=PARTS), name)
        assert [tuple(shown[f"reference.{n}"].shape[1:]) for n in range(len(wanted))] == wanted
        assert f"reference.{len(wanted)}" not in shown
        times = shown["reference_ids"][:, 0].unique().tolist()
        assert times == [10 * (n + 1) for n in range(len(wanted))]
    for step in range(12):
        batch = found.batch(step)
        assert len({tuple(map(len, (RAGGED[name], {RAGGED[name][0]}))) for name in batch.ids}) == 1
        assert {len(RAGGED[name]) for name in batch.ids} == {len(batch.references_RBchw)}
        row = next(row for row in found.train if row["id"] == batch.ids[0])
        for seen, part in zip(batch.references_RBchw, row["references"], strict=True):
            assert torch.equal(seen[0], found.latent_rows([part])[0])
    model = resolve(config.model, parts=PARTS)
    told = describe.describe(config, model, survey.survey(config, model))
    assert told["references"] == {"pictures": {"1": 3, "3": 3}, "previews": 0, "unmatched": ["p0", "p1", "p2"]}
    assert any("captions of 3 pictures name a reference that is not there" in line for line in told["warnings"])
    assert any("it has 1 of 3 references" in line for line in told["warnings"])


def test_references_are_dropped_of_whole_batches(make_config: Make, edits: Path) -> None:
    """About the share that was asked for, the same batches at every start and for each worker; what else is drawn
    stays, and so does the cache. A set that drops none shares no batch with one that does."""
    never, some = (make_config(data=data(edits, **own)) for own in ({}, {"drop_references": 0.3}))
    fill_cache(never)
    always = opened(make_config(data=data(edits, drop_references=1.0)))
    plain, dropping = (TrainingData(config, resolve(never.model, parts=PARTS)) for config in (never, some))
    assert index.settings(never) == index.settings(some)
    gone = []
    for step in range(200):
        whole = dropping.batch(step)
        gone.append(not whole.references_RBchw)
        halves = [dropping.batch(step, rank=rank, world=2) for rank in range(2)]
        assert {not half.references_RBchw for half in halves} == {gone[-1]}
        assert torch.equal(torch.cat([half.noise_Bchw for half in halves]), whole.noise_Bchw)
        assert not always.batch(step).references_RBchw
        assert plain.batch(step).references_RBchw
    assert 0.2 < np.mean(gone) < 0.4
    assert [not TrainingData(some, resolve(never.model, parts=PARTS)).batch(step).references_RBchw
            for step in range(20)] == gone[:20]  # fmt: skip
    mixed = data(edits, drop_references=0.5) + data(edits)
    both = opened(make_config(data=mixed))
    assert {len({name.endswith("@1") for name in both.batch(step).ids}) for step in range(40)} == {1}


def _two(rank: int, world: int, config: Config) -> None:
    run(Trainer(config, rank=rank, world=world), lambda record: None)


def test_two_workers_and_a_resume_learn_the_same(make_config: Make, edits: Path, tmp_path: Path) -> None:
    """Ragged references, dropped at random, with masks, in batches of two: two workers come to the weights of one
    within 1e-5, and a run that was cut goes on bit for bit."""
    own = data(edits, drop_references=0.4, masks=str(edits / "masks"))

    def config(name: str, **output: int) -> Config:
        return make_config(run=name, data=own, train={"steps": 8}, output=output)

    fill_cache(config("one"))
    _two(0, 1, config("one"))
    stopped = Trainer(config("cut", save_every=3))
    run(stopped, lambda record: None, noticed=lambda: stopped.step == 4)
    _two(0, 1, config("cut", save_every=3))
    in_ranks(2, _two, config("two"), folder=tmp_path)
    one, cut, two = (checkpoint.newest(RunFolder(config(name)).checkpoints) for name in ("one", "cut", "two"))
    assert one is not None
    assert cut is not None
    assert two is not None
    assert (one.step, cut.step, two.step) == (8, 8, 8)
    for name, weight in one.adapter.items():
        assert torch.equal(weight, cut.adapter[name])
        assert (weight - two.adapter[name]).abs().max() <= 1e-5


def test_a_mask_concerns_the_picture_alone(make_config: Make, edits: Path) -> None:
    """With references a mask still weighs the picture's own tokens: what is masked out of the target has no say, and
    references have no loss but all of them are seen."""
    config = make_config(data=data(edits, masks=str(edits / "masks")))
    fill_cache(config)
    trainer = Trainer(config)
    batch = next(b for b in map(trainer.data.batch, range(20)) if len(b.references_RBchw) == 3)
    assert batch.mask_Bhw is not None
    assert batch.mask_Bhw.shape[1:] == batch.latents_Bchw.shape[2:]

    def loss(one: Batch) -> float:
        return sum(float(term.detach()) for _, term in trainer.terms(one))

    predicted = trainer.predict(batch.noisy_Bchw(), batch.prompts_BLD, batch.sigma_B, batch.references_RBchw)
    target = to_tokens(batch.noise_Bchw - batch.latents_Bchw)
    by_hand = mse_B(predicted[:, :16], target, batch.mask_Bhw.flatten(1)).mean()
    assert loss(batch) == pytest.approx(float(by_hand.detach()), rel=1e-5)


def test_the_size_of_references_is_part_of_what_is_cached(make_config: Make, edits: Path) -> None:
    """Unset, an index has no such setting and its keys are those of before; set, only references are encoded anew."""
    plain, small = (make_config(data=data(edits, **own)) for own in ({}, {"reference_size": 32}))
    assert "reference_size" not in str(index.settings(plain))
    assert index.settings(small)["data.0.reference_size"] == 32
    keys = []
    for config in (plain, small):
        samples = survey.survey(config, resolve(config.model, parts=PARTS)).samples
        keys.append({name: set(needs.LATENTS[name].keys(samples).to_pylist()) for name in ("picture", "references")})
    assert keys[0]["picture"] == keys[1]["picture"]
    assert len(keys[0]["references"] - keys[1]["references"]) == 7, "5 of the 12 have about that size anyway"


def shown(edits: Path, *names: str) -> dict[str, Any]:
    """Two prompts of which the second one has references."""
    prompt = {"text": "a [trigger] like image 1", "references": [str(edits / name) for name in names]}
    return {"every": 4, "steps": 2, "prompts": ["a [trigger]"], "prompt": [prompt]}


def test_previews_show_with_references_what_was_learned(make_config: Make, edits: Path) -> None:
    """A prompt's references are encoded by `cache` in the pictures' table, and every preview is drawn beside them: its
    latents are those of the sampler on the same rows; the grid has them on the left of its row."""
    validate = shown(edits, "r0/p0.png", "r2/p3.png")
    config = make_config(data=data(edits, trigger="sks"), validate=validate)
    model = fill_cache(config)
    found = TrainingData(config, model)
    assert [tuple(one.shape) for one in found.beside_prompt(1)] == [(1, 128, 2, 3), (1, 128, 3, 3)]
    assert found.beside_prompt(0) == []
    assert len(found.train) == 6, "what previews show is no sample"
    row = next(row for row in found.train if row["id"] == "p3")
    assert torch.equal(found.beside_prompt(1)[1][0], found.latent_rows([row["references"][2]])[0]), "encoded once"
    trainer = Trainer(config)
    watch, drawn = Watch(trainer), list[torch.Tensor]()
    decode = watch._decode
    watch._decode = lambda latent: (drawn.append(latent), decode(latent))[1]  # type: ignore[method-assign]
    with Writer(trainer.folder.path, resume_step=0) as metrics:
        watch.look(0, metrics)
    prompt_1LD = trainer.prompts(found.prompt_rows([found.key("a sks like image 1")]))
    told = {"size": (64, 64), "steps": 2, "guidance": 1.0}
    with trainer.wearing(trainer.weights()) as transformer:
        beside = sampler.draw(transformer, prompt_1LD, [43], references_RBchw=found.beside_prompt(1), **told)
        alone = sampler.draw(transformer, prompt_1LD, [43], **told)
    assert torch.equal(drawn[-1], beside)
    assert (beside - alone).abs().max() > 1e-4
    grid, tiles = previews.grid_path(watch.folder, 0), watch.folder / "tiles" / "references"
    assert sorted(path.name for path in tiles.iterdir()) == ["001-0.png", "001-1.png"]
    plain = make_config(run="plain", data=data(edits, trigger="sks"), validate={**validate, "prompt": []})
    fill_cache(plain)
    bare = Watch(Trainer(plain))
    with Writer(bare.trainer.folder.path, resume_step=0) as metrics:
        bare.look(0, metrics)
    assert Image.open(grid).width > 2 * Image.open(previews.grid_path(bare.folder, 0)).width * 0.8


def test_two_workers_draw_the_same_previews(make_config: Make, edits: Path, tmp_path: Path) -> None:
    """The picture beside references does not depend on how many workers share the prompts."""
    one, two = (
        make_config(run=name, data=data(edits, trigger="sks"), validate=shown(edits, "r0/p0.png")) for name in "ab"
    )
    fill_cache(one)
    _two(0, 1, one)
    in_ranks(2, _two, two, folder=tmp_path)
    for place in range(2):
        tiles = [
            np.asarray(Image.open(previews.tile_path(RunFolder(c).previews, 4, place))).astype(int) for c in (one, two)
        ]
        assert np.abs(tiles[0] - tiles[1]).max() <= 1


def test_what_previews_show_is_kept_and_known(make_config: Make, edits: Path) -> None:
    """`plan` counts it, `verify` reads it, `gc` keeps it; another picture is other settings of the cache, the words of
    a prompt are not; without references nothing is said of previews."""
    config = make_config(data=data(edits, trigger="sks"), validate=shown(edits, "r0/p0.png", "after/p1.png"))
    model = resolve(config.model, parts=PARTS)
    told = describe.describe(config, model, survey.survey(config, model))
    plain = make_config(data=data(edits, trigger="sks"))
    before = describe.describe(plain, model, survey.survey(plain, model))
    assert (told["references"]["previews"], before["references"]["previews"]) == (2, 0)
    assert told["samples"] == before["samples"]
    assert told["buckets"] == before["buckets"]
    assert told["rows"]["latents"]["needed"] == before["rows"]["latents"]["needed"], "they are known pictures"
    fill_cache(config)
    assert verify.verify_rows(config, model)["missing"] == []
    rows = [row["latent_key"] for each in TrainingData(config, model).shown for row in each]
    collect(config, keep=timedelta(0), dry_run=False)
    assert TrainingData(config, model).latents_reader.missing == []
    assert len(rows) == 2
    reworded = shown(edits, "r0/p0.png", "after/p1.png")
    reworded["prompt"][0]["text"] = "a [trigger] of other words"
    assert index.settings(make_config(data=data(edits, trigger="sks"), validate=reworded)) == index.settings(config)
    assert "validate.prompt.0.references" in index.settings(config)
    assert not [key for key in index.settings(plain) if key.startswith("validate.prompt") or key == "validate.size"]


@pytest.mark.parametrize(("name", "said"), [("r0/none.png", "[Nn]o such file"), ("after/p0.txt", "not a picture|text")])
def test_a_reference_that_cannot_be_shown_is_refused_by_name(
    make_config: Make, edits: Path, name: str, said: str
) -> None:
    """By `plan` and by `cache`, with the key that names it; one that is missing before anything is started."""
    config = make_config(data=data(edits, trigger="sks"), validate=shown(edits, "r0/p0.png", name))
    with pytest.raises(DataError, match=rf"validate\.prompt\.0\.references\.1='.*{name}': .*({said})"):
        survey.survey(config, resolve(config.model, parts=PARTS))
    if name.endswith("none.png"):
        with pytest.raises(DataError, match=r"validate\.prompt\.0\.references\.1=.*no such file"):
            preflight.before_caching(config, resolve(config.model, parts=PARTS), parts=PARTS)


def test_a_reference_that_breaks_while_it_is_encoded_is_no_quarantine(make_config: Make, edits: Path) -> None:
    """Nothing stands in for what a preview shows: the cache is refused, by the key, and no sample is blamed."""
    config = make_config(data=data(edits, trigger="sks"), validate=shown(edits, "r0/p0.png", "r2/p3.png"))
    planned = survey.survey(config, resolve(config.model, parts=PARTS))
    broken = planned.samples.to_pylist()[-1]["latent_key"]
    with pytest.raises(DataError, match=r"validate\.prompt\.0\.references\.1=.*: cut off"):
        intake.without(replace(planned, samples=planned.samples.slice(6)), {broken: "cut off"})


def test_prompts_of_both_kinds_in_a_file(tmp_path: Path) -> None:
    """Several tables, overridden by their number, made absolute, written down and read again; one table alone, and one
    that is not in the file, are told."""
    file = tmp_path / "c.toml"
    text = '[model]\npath = "m"\n[[data]]\npath = "d"\n[validate]\nprompts = ["a"]\n'
    file.write_text(text + '[[validate.prompt]]\ntext = "b"\nreferences = ["x.png", "s3://y/z.png"]\n')
    config = absolute(load(file, ["validate.prompt.0.text=c"]))
    assert [one.text for one in config.validation.drawn] == ["a", "c"]
    assert config.validation.drawn[1].references == (str(Path("x.png").absolute()), "s3://y/z.png")
    copy = tmp_path / "copy.toml"
    copy.write_text(dump_toml(config))
    assert load(copy) == config
    file.write_text(text)
    with pytest.raises(UsageError, match=r"the file has no \[\[validate.prompt\]\]"):
        load(file, ["validate.prompt.0.text=d"])
    file.write_text(text + '[validate.prompt]\ntext = "b"\n')
    with pytest.raises(UsageError, match=r"its heading has two brackets: \[\[validate.prompt\]\]"):
        load(file)
