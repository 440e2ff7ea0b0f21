"""What a sample carries beside its picture: weight, mask, references, roles; preservation, and a start from a file."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2Pipeline
from PIL import Image

from flux2_core.cache import publish
from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.data import needs
from flux2_core.data.needs import NULL_TEXT
from flux2_core.errors import DataError, UsageError
from flux2_core.lora import adapter, file
from flux2_core.model.latents import to_tokens
from flux2_core.model.seeded import generator
from flux2_core.run import metrics
from flux2_core.store import upkeep
from flux2_core.store.table import Table
from flux2_core.train.batches import TrainingData
from flux2_core.train.loop import run
from flux2_core.train.losses import mse_B
from flux2_core.train.methods.protocol import Batch, Caches, Carried, Draw, Method, Model
from flux2_core.train.methods.table import METHODS
from flux2_core.train.trainer import Trainer
from tests.in_process import fill_cache, in_ranks, process_group
from tests.random_adapter import randomised

Make = Callable[..., Config]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    with process_group(tmp_path):
        yield


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`own/` with masks (left half white) and a reference each, and `class/` with nothing but pictures."""
    folder, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(1)
    for name in ("own", "masks", "looks", "class"):
        (folder / name).mkdir()
    half = np.zeros((64, 64), dtype=np.uint8)
    half[:, :32] = 255
    for place in range(4):
        for name, shape in (("own", (64, 64, 3)), ("looks", (32, 48, 3)), ("class", (64, 64, 3))):
            Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / name / f"p{place}.png")
        Image.fromarray(half).save(folder / "masks" / f"p{place}.png")
        (folder / "own" / f"p{place}.txt").write_text(f"risks of [trigger] dog {place}")
        (folder / "class" / f"p{place}.txt").write_text(f"a dog {place}")
    return folder


def configured(make_config: Make, sets: Path, *, own: dict[str, Any] | None = None, **sections: Any) -> Config:
    """Two data sets: what is learned, with everything that a sample can have, and a regularisation set."""
    learned = {"path": str(sets / "own"), "trigger": "sks", "class_name": "cat", "resolutions": [64], **(own or {})}
    others = {"path": str(sets / "class"), "regularisation": True, "weight": 0.5, "resolutions": [64]}
    tree = make_config().model_dump(mode="json", by_alias=True)
    for name, values in sections.items():
        tree[name] = {**tree[name], **values}
    return parse(tree | {"data": [learned, others]})


def prepared(config: Config) -> Trainer:
    fill_cache(config)
    trainer = Trainer(config)
    randomised(trainer)
    return trainer


def forward(trainer: Trainer, batch: Batch) -> torch.Tensor:
    """The prediction of a whole batch."""
    return trainer.predict(batch.noisy_Bchw(), batch.prompts_BLD, batch.sigma_B, batch.references_RBchw)


def terms(trainer: Trainer, batch: Batch, where: slice = slice(None)) -> list[torch.Tensor]:
    """The terms of a part of a batch, one for each method here."""
    return [term for _, term in trainer.terms(batch.each(itemgetter(where)))]


def grown(trainer: Trainer, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a loss, which are taken away again."""
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in trainer.adapter.items() if parameter.grad is not None}
    trainer.optimizer.zero_grad(set_to_none=True)
    return found


def test_masks_come_from_the_cache(make_config: Make, sets: Path) -> None:
    """A masked sample's batch carries the mask on the token grid, a sample without one carries ones."""
    config = configured(make_config, sets, own={"masks": str(sets / "masks")}, train={"batch_size": 8})
    trainer = prepared(config)
    batch = trainer.data.batch(0)
    assert batch.mask_Bhw is not None
    half = torch.zeros(4, 4)
    half[:, :2] = 1
    seen = set()
    for name, mask in zip(batch.ids, batch.mask_Bhw, strict=True):
        seen.add(masked := "@1" not in name)
        assert torch.equal(mask, half if masked else torch.ones(4, 4))
    assert seen == {True, False}


def test_what_is_masked_out_has_no_gradient(make_config: Make, sets: Path) -> None:
    """The loss is the mean over tokens weighted by the mask: the masked-out half of prediction and target is free."""
    trainer = prepared(configured(make_config, sets))
    batch = trainer.data.batch(0)
    mask = torch.ones(2, 4, 4)
    mask[:, :, 2:] = 0
    prediction = torch.randn(2, 16, 128, requires_grad=True)
    target = torch.randn(2, 16, 128)
    mse_B(prediction, target, mask.flatten(1)).sum().backward()
    assert prediction.grad is not None
    assert not prediction.grad[mask.flatten(1) == 0].any()
    assert prediction.grad[mask.flatten(1) == 1].all()
    kept = mask.flatten(1).bool()
    by_hand = [(prediction[i][kept[i]] - target[i][kept[i]]).square().mean() for i in range(2)]
    assert torch.allclose(mse_B(prediction, target, mask.flatten(1)), torch.stack(by_hand))
    assert torch.allclose(mse_B(prediction, target, torch.ones(2, 16)), mse_B(prediction, target))
    assert mse_B(prediction, target, torch.zeros(2, 16)).tolist() == [0, 0]
    [free], [masked] = terms(trainer, batch), terms(trainer, replace(batch, mask_Bhw=mask))
    assert float(free.detach()) != float(masked.detach())


def test_weights_multiply(make_config: Make, sets: Path) -> None:
    """A data set's `weight` is a factor on its samples' losses, and so on their gradients."""
    trainer = prepared(configured(make_config, sets, train={"batch_size": 8}))
    batch = trainer.data.batch(0)
    expected = {(1.0 if "@1" not in name else 0.5) for name in batch.ids}
    assert set(batch.weight_B.tolist()) == expected == {1.0, 0.5}
    even = replace(batch, weight_B=torch.ones(8))
    own = [float(terms(trainer, even, slice(i, i + 1))[0].detach()) for i in range(8)]
    whole = float(terms(trainer, batch)[0].detach())
    assert whole == pytest.approx(sum(w * x for w, x in zip(batch.weight_B.tolist(), own, strict=True)), rel=1e-5)


def test_references_as_in_diffusers(make_config: Make, sets: Path) -> None:
    """References stand after the target with ids T = 10, 20, free of noise; the prediction is the target's: the
    forward pass of diffusers' pipeline on the same tensors."""
    config = configured(make_config, sets, own={"references": [str(sets / "looks"), str(sets / "own")]})
    trainer = prepared(config)
    steps = [trainer.data.batch(step) for step in range(8)]
    batch = next(batch for batch in steps if batch.references_RBchw)
    assert {len(batch.references_RBchw) for batch in steps} == {0, 2}, (
        "samples without references have buckets of their own"
    )
    shapes = [tuple(one.shape[1:]) for one in batch.references_RBchw]
    assert shapes == [(128, 2, 3), (128, 4, 4)]
    ours, noisy = forward(trainer, batch), to_tokens(batch.noisy_Bchw())
    one = [reference[:1] for reference in batch.references_RBchw]
    ids = torch.cat(
        [
            Flux2Pipeline._prepare_latent_ids(batch.latents_Bchw),
            Flux2Pipeline._prepare_image_ids(one).expand(len(noisy), -1, -1),
        ],
        dim=1,
    )
    theirs = trainer.transformer(
        hidden_states=torch.cat([noisy, *(to_tokens(r) for r in batch.references_RBchw)], dim=1),
        encoder_hidden_states=batch.prompts_BLD,
        timestep=batch.sigma_B,
        img_ids=ids,
        txt_ids=Flux2Pipeline._prepare_text_ids(batch.prompts_BLD),
        guidance=torch.full((len(noisy),), config.train.guidance),
        return_dict=False,
    )[0][:, : noisy.shape[1]]
    assert (ours - theirs).abs().max() <= 1e-6
    alone = forward(trainer, replace(batch, references_RBchw=()))
    assert (ours - alone).abs().max() > 1e-3, "the references had no say"


def captions_of(data: TrainingData, keys: Sequence[str]) -> dict[str, str]:
    return {key: str(data.text_reader.attributes(key)["text"]) for key in keys}


def texts_of(trainer: Trainer, steps: int) -> list[tuple[str, str, str | None]]:
    """(sample, prompt, preserved prompt) of many draws, as texts."""
    rows = {row["id"]: row for row in trainer.data.train}
    texts = captions_of(trainer.data, [key for row in rows.values() for key in row["text_keys"]])
    texts |= {part["key"]: part["text"] for row in rows.values() for part in row["roles"]}
    texts[trainer.data.key(NULL_TEXT)] = ""
    found = []
    caches: Any = SimpleNamespace(key=trainer.data.key, prompt_rows=lambda keys: keys)
    for step in range(steps):
        for place, (name, row) in enumerate(rows.items()):
            draw = trainer.data._draw((0, "draw", step, place), row, (1,))
            own = METHODS["dop"].carry(caches, [draw])
            found.append((name, texts[draw.prompt], texts[own["prompts_BLD"][0]] if own["kept_B"][0] else None))
    return found


def test_prompts_and_what_is_preserved(make_config: Make, sets: Path) -> None:
    """Dropped captions become empty, dropped scenes the trigger alone, each as often as asked; `dop` exchanges the
    trigger at word boundaries and becomes the class alone with them; regularisation pictures preserve nothing."""
    train = {"caption_dropout": 0.2, "trigger_dropout": 0.3, "preservation": "dop"}
    trainer = prepared(configured(make_config, sets, train=train))
    drawn = texts_of(trainer, 500)
    own = [(prompt, kept) for name, prompt, kept in drawn if "@1" not in name]
    assert {kept for prompt, kept in own if prompt in ("", "sks")} == {"cat"}
    assert {kept for prompt, kept in own if prompt == "risks of sks dog 0"} == {"risks of cat dog 0"}
    shares = [sum(prompt == text for prompt, _ in own) / len(own) for text in ("", "sks")]
    assert shares == pytest.approx([0.2, 0.3], abs=0.03)
    others = [(prompt, kept) for name, prompt, kept in drawn if "@1" in name]
    assert {kept for _, kept in others} == {None}
    assert "sks" not in {prompt for prompt, _ in others}
    assert sum(prompt == "" for prompt, _ in others) / len(others) == pytest.approx(0.2, abs=0.03)


def test_each_caption_is_preserved_as_its_own_class(make_config: Make, sets: Path, tmp_path: Path) -> None:
    """Of a picture's captions the drawn one is exchanged, never another; in many steps every one of them is drawn."""
    folder = tmp_path / "lines"
    folder.mkdir()
    for place in range(4):
        shutil.copy(sets / "own" / f"p{place}.png", folder)
        lines = [f"{way} sks {place}" for way in ("one", "another", "a third")]
        (folder / f"p{place}.txt").write_text("\n".join(lines))
    own = {"path": str(folder), "caption": "lines"}
    data = prepared(configured(make_config, sets, own=own, train={"preservation": "dop", "batch_size": 4})).data
    own_keys = [key for row in data.train for key in row["text_keys"] if not row["regularisation"]]
    exchanged = {caption: caption.replace("sks", "cat") for caption in captions_of(data, own_keys).values()}
    rows = {text: data.prompt_rows([data.key(text)])[0] for pair in exchanged.items() for text in pair}
    seen = set()
    for batch in map(data.batch, range(30)):
        carried = batch.carried["dop"]
        for prompt_LD, kept_LD, kept in zip(batch.prompts_BLD, carried["prompts_BLD"], carried["kept_B"], strict=True):
            if kept:
                [caption] = [text for text in exchanged if torch.equal(rows[text], prompt_LD)]
                assert torch.equal(rows[exchanged[caption]], kept_LD), caption
                seen.add(caption)
    assert len(seen) == 12


@pytest.mark.parametrize("preservation", ["dop", "blank"])
def test_preservation_by_hand(make_config: Make, sets: Path, preservation: str) -> None:
    """L = mse(pred, target) + weight * mse(adapter on, adapter off) at the same noise; no gradient through "off"."""
    train = {"preservation": preservation, "preservation_weight": 2.0, "batch_size": 4}
    trainer = prepared(configured(make_config, sets, train=train))
    batch = next(b for b in map(trainer.data.batch, range(9)) if 0 < b.carried[preservation]["kept_B"].sum() < 4)
    prompts_BLD, kept_B = (batch.carried[preservation][name] for name in ("prompts_BLD", "kept_B"))
    with torch.no_grad():
        on = trainer.predict(batch.noisy_Bchw(), prompts_BLD, batch.sigma_B)
        before = trainer.weights()
        for name, parameter in trainer.adapter.items():
            if name.endswith("lora_B.weight"):
                parameter.zero_()
        off = trainer.predict(batch.noisy_Bchw(), prompts_BLD, batch.sigma_B)
        adapter.load(trainer.transformer, before, device=CPU)
    factor = torch.tensor([float("@1" not in name) for name in batch.ids])
    assert torch.equal(kept_B.float(), factor)
    wanted = 2.0 * (factor * (on - off).square().flatten(1).mean(1)).sum() / 4
    _, ours = terms(trainer, batch)
    assert float(ours.detach()) == pytest.approx(float(wanted), rel=1e-4)
    assert float(wanted) > 0
    gradients = grown(trainer, ours)
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients.items() if name.endswith("lora_B.weight"))
    record = trainer.train_step(batch)
    assert record["preservation"] == pytest.approx(float(wanted), rel=1e-4)
    assert record["loss"] > record["preservation"]


def test_adapter_of_zero_changes_nothing_to_preserve(make_config: Make, sets: Path) -> None:
    """A fresh adapter does nothing, so there is nothing to preserve: the part is exactly zero."""
    config = configured(make_config, sets, train={"preservation": "blank"})
    fill_cache(config)
    trainer = Trainer(config)
    assert float(terms(trainer, trainer.data.batch(0))[1].detach()) == 0
    assert all(parameter.requires_grad for parameter in trainer.adapter.values())


def test_a_method_is_one_entry_in_each_table(
    make_config: Make, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A made-up method: its role and its text are cached because it names them, batches carry what it asks for, on two
    workers too, its loss is minimised beside the others', and the records name it. Nothing else knows of it."""
    wanted = needs.Needs(frozenset({needs.CLASS_ONLY}), {"moon": "a moon"}, frozenset({"references"}))
    monkeypatch.setitem(needs.NEEDS, "moonlit", lambda config: wanted)
    monkeypatch.setitem(METHODS, "moonlit", Method("moonlight", _moon, _moonlight))
    monkeypatch.setattr(Config, "methods", property(lambda config: ("flow", "moonlit")))
    trainer = prepared(configured(make_config, sets, own={"references": [str(sets / "looks")]}, train={"steps": 3}))
    data = trainer.data
    assert {data.key(text) for text in ("a moon", "cat")} <= data.text_reader.keys()
    run(trainer, lambda record: None)
    records = metrics.read(trainer.folder.metrics)
    assert [0 < record["moonlight"] < record["loss"] for record in records] == [True] * 3
    batch = data.batch(0)
    parts = [data.batch(0, rank=rank, world=2).carried["moonlit"] for rank in range(2)]
    for name, whole in batch.carried["moonlit"].items():
        assert torch.equal(torch.cat([part[name] for part in parts]), whole)


def _moon(caches: Caches, draws: Sequence[Draw]) -> Carried:
    phases = [torch.rand((), generator=generator(*draw.origin, "moon")) for draw in draws]
    return {"moons_BLD": caches.prompt_rows([caches.key("a moon")] * len(draws)), "phase_B": torch.stack(phases)}


def _moonlight(model: Model, batch: Batch, own: Carried) -> Iterator[torch.Tensor]:
    for half in batch.latents_Bchw, batch.noise_Bchw:  # two terms, each with a pass of its own
        predicted_BSc = model.predict(half, own["moons_BLD"], batch.sigma_B, batch.references_RBchw)
        yield (batch.weight_B * own["phase_B"] * predicted_BSc.square().mean((1, 2))).sum() / batch.total


@pytest.mark.parametrize("kind", ["masks", "references", "roles"])
def test_what_is_missing_beside_the_picture_is_refused(make_config: Make, sets: Path, kind: str) -> None:
    """A mask, a reference or a role that is not cached is refused before training, and named."""
    own = {"masks": {"masks": str(sets / "masks")}, "references": {"references": [str(sets / "looks")]}, "roles": {}}
    config = configured(make_config, sets, own=own[kind])
    fill_cache(config)
    data = Trainer(config).data
    row = next(row for row in data.train if not row["regularisation"])
    if kind == "roles":
        with pytest.raises(DataError, match=r"text rows are missing, the first is for 'cat'"):
            Trainer(configured(make_config, sets, train={"preservation": "dop"}))
        return
    key = row["mask"]["latent_key"] if kind == "masks" else row["references"][0]["latent_key"]
    upkeep.drop(data.latents.uri, [key])
    without = replace(data.index.latents, version=Table.open(data.latents.uri).version)
    publish.write_index(config, replace(data.index, latents=without))
    needed, whose = len(data.latents_reader.keys()), {"masks": "the mask of", "references": "a reference of"}[kind]
    with pytest.raises(DataError, match=rf"1 of {needed} latent rows are missing, the first is for '{whose} p"):
        Trainer(config)


@pytest.mark.parametrize("names", ["diffusers", "comfyui"])
def test_a_start_from_a_file(make_config: Make, photos: Path, tmp_path: Path, names: str) -> None:
    """`lora.init` gives the forward pass of the file's adapter within 1e-6, whatever alpha this run has."""
    fill_cache(make_config())
    first = Trainer(make_config())
    randomised(first)
    paths = file.write(tmp_path / "lora", "first", first.weights(), metadata={}, dtype="fp32")
    given = {"init": str(getattr(paths, names)), "alpha": 2.0}
    second = Trainer(make_config(run="second", lora=given))
    batch = first.data.batch(0)
    outputs = [forward(trainer, batch) for trainer in (first, second)]
    assert (outputs[0] - outputs[1]).abs().max() <= 1e-6
    base = Trainer(make_config(run="base"))
    there = forward(base, batch)
    assert (outputs[0] - there).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("other", "named"),
    [({"rank": 8}, r"lora\.init=.*first\.safetensors: .*lora\.rank asks for"), ({"targets": "tiny"}, "lora.targets")],
)
def test_a_start_from_another_adapter_is_refused(make_config: Make, tmp_path: Path, other: dict, named: str) -> None:
    """A file of another rank or of other targets is refused with the file, the setting and the way out."""
    fill_cache(make_config())
    fresh = Trainer(make_config()).weights()
    paths = file.write(tmp_path / "lora", "first", fresh, metadata={}, dtype="fp32")
    with pytest.raises(UsageError, match=named):
        Trainer(make_config(lora={"rank": 4, "init": str(paths.diffusers), **other}))


def shares(rank: int, world: int, tree: str, out: str) -> None:
    """One process of a group: the gradient norm and the record of one step, and what this worker was dealt."""
    config = Config.model_validate_json(tree)
    trainer = Trainer(config, rank=rank, world=world)
    randomised(trainer)
    batch: Batch = trainer.data.batch(0, rank=rank, world=world)
    record = trainer.train_step(batch)
    torch.save([record["loss"], record["grad_norm"], len(batch.ids), len(batch.sigma_B)], f"{out}/{world}-{rank}")


def test_norm_and_loss_do_not_depend_on_the_workers(make_config: Make, sets: Path, tmp_path: Path) -> None:
    """A batch of 3 on 2 workers: shares of 2 and 1, the same loss and gradient norm as on one within 1e-5, and clipped
    to the same step."""
    config = configured(
        make_config,
        sets,
        train={"batch_size": 3, "preservation": "dop", "max_grad_norm": 1e-3},
        cluster={"micro_batch": 1},
    )
    fill_cache(config)
    for world in (1, 2):
        in_ranks(world, shares, config.model_dump_json(by_alias=True), str(tmp_path), folder=tmp_path)
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert first[:2] == second[:2]
    assert first[:2] == pytest.approx(one[:2], rel=1e-5)
    assert (first[2:], second[2:]) == ([2, 2], [1, 2])
