"""TREAD: which tokens skip which blocks, that they come back as they were, and that how a base lies changes nothing."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_core.config.reading import apply_override, dump_toml, load, parse
from flux2_core.config.sections import Config
from flux2_core.errors import UsageError
from flux2_core.model import transformer
from flux2_core.model.folder import resolve
from flux2_core.model.latents import position_ids, to_tokens
from flux2_core.placement import compiled, planner
from flux2_core.train import preflight
from flux2_core.train.batches import TrainingData
from flux2_core.train.methods.protocol import Batch
from flux2_core.train.trainer import Trainer
from flux2_core.train.validate import Watch
from tests.flux2_core.placement.test_build import compare
from tests.flux2_core.train.test_resume import end, same_bits, told, train
from tests.in_process import fill_cache, process_group
from tests.random_adapter import prepared, randomised

Make = Callable[..., Config]
ACROSS = {"routes": [{"skip": 0.5, "start": 1, "end": -2}]}  # of four blocks: one double, one single
TWO = {"routes": [{"skip": 0.25, "start": -2, "end": -1}, {"skip": 0.6, "start": 0, "end": 1}]}


@pytest.fixture(autouse=True)
def _group(tmp_path: Path) -> Iterator[None]:
    with process_group(tmp_path):
        yield


@pytest.fixture(scope="session")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with a reference each; masks of the first two leave 12 and 4 of 16 tokens white, others have none."""
    folder, rng = tmp_path_factory.mktemp("masked"), np.random.default_rng(1)
    for name in ("own", "masks", "looks"):
        (folder / name).mkdir()
    for place in range(4):
        for name, shape in (("own", (64, 64, 3)), ("looks", (32, 48, 3))):
            Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / name / f"p{place}.png")
        (folder / "own" / f"p{place}.txt").write_text(f"a picture {place}")
    for place, columns in enumerate((48, 16)):
        white = np.zeros((64, 64), dtype=np.uint8)
        white[:, :columns] = 255
        Image.fromarray(white).save(folder / "masks" / f"p{place}.png")
    return folder


def with_all(make: Make, masked: Path, **sections: Any) -> Config:
    """A configuration whose samples have masks and references."""
    data = {"path": str(masked / "own"), "resolutions": [64], "references": [str(masked / "looks")]}
    tree = make(**sections).model_dump(mode="json", by_alias=True)
    return parse(tree | {"data": [data | {"masks": str(masked / "masks")}]})


def loss_of(trainer: Trainer, batch: Batch) -> torch.Tensor:
    return sum((term for _, term in trainer.terms(batch)), torch.zeros(()))


def grown(trainer: Trainer, batch: Batch) -> dict[str, torch.Tensor]:
    """Gradients of a batch."""
    trainer.optimizer.zero_grad()
    loss_of(trainer, batch).backward()
    return {name: parameter.grad.clone() for name, parameter in trainer.adapter.items() if parameter.grad is not None}


def by_hand(trainer: Trainer, batch: Batch, sample: int, spans: list[tuple[int, int, float]]) -> torch.Tensor:
    """The prediction of one sample alone, by the blocks as diffusers has them, along its own tokens."""
    built, one = trainer.transformer, batch.each(itemgetter(slice(sample, sample + 1)))
    tokens = [to_tokens(each) for each in (one.noisy_Bchw(), *one.references_RBchw)]
    sizes = [tuple(each.shape[2:]) for each in (one.latents_Bchw, *one.references_RBchw)]
    ids = position_ids(trainer.device, one.prompts_BLD.shape[1], *sizes)
    temb = built.time_guidance_embed(one.sigma_B * 1000, one.guidance_B * 1000)
    image, text = built.x_embedder(torch.cat(tokens, dim=1)), built.context_embedder(one.prompts_BLD)
    rotary = [torch.cat(parts) for parts in zip(*map(built.pos_embed, (ids["txt_ids"], ids["img_ids"])), strict=True)]
    rows, pictured = text.shape[1], tokens[0].shape[1]
    img_mod, txt_mod = built.double_stream_modulation_img(temb), built.double_stream_modulation_txt(temb)
    stay = torch.arange(image.shape[1])
    for place, block in enumerate(transformer.blocks(built)):
        for route, (start, _, _) in enumerate(spans):
            if place == start:
                whole = image
                stay = torch.cat([one.routes_RBk[route][0], torch.arange(pictured, image.shape[1])])
                image = image[:, stay]
        own = [torch.cat([part[:rows], part[rows:][stay]]) for part in rotary]
        forward = type(block).forward
        if place < len(built.transformer_blocks):
            text, image = forward(block, image, text, img_mod, txt_mod, own)
        else:
            joint = forward(
                block, torch.cat([text, image], dim=1), None, built.single_stream_modulation(temb), tuple(own)
            )
            text, image = joint[:, :rows], joint[:, rows:]
        if place in [last for _, last, _ in spans]:
            whole = whole.clone()
            whole[:, stay] = image
            image, stay = whole, torch.arange(whole.shape[1])
    return built.proj_out(built.norm_out(image, temb))[:, :pictured]


@pytest.mark.parametrize("tread", [ACROSS, TWO])
def test_a_routed_pass_by_hand(make_config: Make, masked: Path, tread: dict[str, Any]) -> None:
    """Each sample of a batch goes along its own tokens with their own rotary rows, over the border between double and
    single blocks too, beside all of text and reference: as every sample does alone, block by block in diffusers."""
    trainer = prepared(with_all(make_config, masked, tread=tread, train={"batch_size": 3}))
    batch = trainer.data.batch(0)
    spans = trainer.config.tread.spans(4)
    assert len({tuple(stay.tolist()) for stay in batch.routes_RBk[0]}) == 3, "samples have tokens of their own"
    with torch.no_grad():
        found = trainer.predict(*batch.seen())
        for sample in range(3):
            assert (found[sample] - by_hand(trainer, batch, sample, spans)).abs().max() <= 2e-6
        assert (found - trainer.predict(*batch.seen()[:5])).abs().max() > 1e-3, "the routes had no say"


def test_skipped_tokens_come_back_unchanged(make_config: Make) -> None:
    """Behind a route the tokens that skipped it have to the bit the state that they had before it, the others none."""
    trainer = prepared(make_config(tread=ACROSS))
    blocks, seen = transformer.blocks(trainer.transformer), {}
    blocks[1].register_forward_pre_hook(
        lambda _, args, given: seen.update(before=given["hidden_states"]), with_kwargs=True
    )
    blocks[2].register_forward_hook(lambda _, args, out: seen.update(after=out))
    batch = trainer.data.batch(0)
    trainer.predict(*batch.seen())
    rows = batch.prompts_BLD.shape[1]
    for before, after, stay in zip(seen["before"], seen["after"][:, rows:], batch.routes_RBk[0], strict=True):
        same = (before == after).all(1)
        assert same.sum() == len(same) - len(stay) == len(same) // 2
        assert not same[stay].any()


def test_no_skipping_is_the_unrouted_model(make_config: Make, masked: Path) -> None:
    """`skip = 0` trains to the bit what no route does; so does a route whose tokens all stay, since masks are white."""
    fill_cache(make_config())
    found = []
    for routes in ([], [{"skip": 0.0, "start": 0, "end": -1}]):
        trainer = Trainer(make_config(tread={"routes": routes}))
        found.append([trainer.train_step(trainer.data.batch(step)) for step in range(2)])
    assert found[0] == found[1]
    trainer = prepared(make_config(tread=ACROSS))
    batch = trainer.data.batch(0)
    whole = torch.arange(batch.latents_Bchw[0, 0].numel()).expand(2, -1)
    found = [grown(trainer, replace(batch, routes_RBk=routes)) for routes in ((), (whole,))]
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_tokens_that_stay(make_config: Make, masked: Path) -> None:
    """Half of them skip, others in each step, place and route, whoever computes the sample; white ones never do: then
    as many stay as the whitest mask of the whole step needs, in every worker."""
    config = with_all(make_config, masked, tread=TWO, train={"batch_size": 4})
    fill_cache(config)
    data, drawn = TrainingData(config, resolve(config.model, parts=("transformer",))), set()
    for step in range(3):
        batch = data.batch(step)
        parts = [data.batch(step, rank=rank, world=3) for rank in range(3)]
        for route, stay in enumerate(batch.routes_RBk):
            assert stay.shape == (4, 12), "of 16 tokens 12 are white in one picture"
            dealt = torch.cat([part.routes_RBk[route][: len(part.ids)] for part in parts])
            assert torch.equal(dealt, stay)
            drawn |= {tuple(one.tolist()) for one in stay}
            for name, one in zip(batch.ids, stay, strict=True):
                white = {place for place in range(16) if place % 4 < {"p0": 3, "p1": 1}.get(name, 0)}
                assert white <= set(one.tolist())
    assert len(drawn) > 15
    free = make_config(tread=TWO)
    fill_cache(free)
    shapes = [
        tuple(stay.shape)
        for stay in TrainingData(free, resolve(free.model, parts=("transformer",))).batch(0).routes_RBk
    ]
    assert shapes in ([(2, 12), (2, 7)], [(2, 18), (2, 10)])  # of 16 or 24 tokens


def test_what_is_compared_takes_the_same_routes(make_config: Make, masked: Path) -> None:
    """Preservation and priors compare passes along the same tokens, so that of a new adapter nothing is left to keep;
    the empty caption of contrastive guidance, validation and previews go with all tokens."""
    own = {"path": str(masked / "own"), "resolutions": [64]}
    tree = make_config(tread=ACROSS, train={"preservation": "blank"}).model_dump(mode="json", by_alias=True)
    tree["data"] = [own, own | {"regularisation": "prior"}]
    fill_cache(config := parse(tree))
    trainer = Trainer(config)
    batch = trainer.data.batch(0)
    everything = {**batch.carried["flow"], "prior_B": torch.ones(2, dtype=torch.bool)}
    batch = replace(batch, carried={**batch.carried, "flow": everything})
    assert [float(term.detach()) for _, term in trainer.terms(batch)] == [0, 0]
    routed = []
    trainer.predict = partial(noted, trainer.predict, routed)  # type: ignore[method-assign]
    empty = {"empty_BLD": batch.prompts_BLD, "factor_B": torch.ones(2)}
    [*trainer.terms(replace(batch, carried={**batch.carried, "flow": everything | empty}))]
    assert routed == [False, True, True, True, True], "of the empty caption, of the prior, and three that are learned"
    trainer.config = trainer.config.model_copy(update={"validate_": config.validation.model_copy(update={"every": 1})})
    watch = Watch(trainer)
    watch.samples = [trainer.data.train[0]]
    watch._losses()
    assert not any(routed[5:])


def noted(predict: Callable[..., Any], routed: list[bool], *seen: Any) -> Any:
    routed.append(len(seen) > 5 and bool(seen[5]))
    return predict(*seen)


@pytest.mark.parametrize(
    ("train", "cluster"),
    [
        ({"recompute": "selective"}, {}),
        ({"recompute": "full"}, {"micro_batch": 1}),
        ({"recompute": 2, "precision": "int8"}, {}),
        ({}, {"strategy": "stream"}),
        pytest.param({"compile": True, "recompute": "selective"}, {}, marks=pytest.mark.all_cases),
    ],
)
def test_placements_take_the_same_tokens(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, train: dict[str, Any], cluster: dict[str, Any]
) -> None:
    """Computed again, streamed, in few bits, compiled, in parts: the gradients are those of plain routed blocks."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    fill_cache(make_config())
    precision = {"precision": train.get("precision", "auto")}
    plain, other = (
        Trainer(make_config(tread=ACROSS, **sections))
        for sections in ({"train": precision}, {"train": train, "cluster": cluster})
    )
    for trainer in (plain, other):
        randomised(trainer)
    batch, micro = plain.data.batch(0), cluster.get("micro_batch", 2)
    wanted = grown(plain, batch)
    parts = [grown(other, batch.each(itemgetter(slice(at, at + micro)))) for at in range(0, 2, micro)]
    for name, gradient in wanted.items():
        assert (sum(part[name] for part in parts) - gradient).abs().max() <= 1e-6 * max(1, float(gradient.abs().max()))


@pytest.mark.slow
def test_two_workers_train_as_one(make_config: Make, tmp_path: Path) -> None:
    """Sharded, replicated, streamed and in few bits, two processes have the loss and gradients of one within 1e-6; with
    rollouts beside, of which every worker makes the same passes."""
    make = partial(make_config, tread=ACROSS, rollout={"probability": 1.0, "steps": 2, "reflexflow": True})
    told = compare(
        make, tmp_path, [("fsdp", "fp32"), ("ddp", "fp32"), ("stream", "int8"), ("fsdp", "int4")], world=2, local=2
    )
    assert len(told) == 8


def test_a_resumed_run_goes_on(make_config: Make) -> None:
    """Killed in its third step of four and begun again, it ends with the bits of a run that did not stop."""
    rollout = {"probability": [0.3, 1.0], "steps": 2}
    sections = {"tread": ACROSS, "rollout": rollout, "output": {"save_every": 2}}
    whole, again = (make_config(run=name, **sections) for name in ("whole", "again"))
    fill_cache(whole)
    train(whole)
    train(again, stop=3)
    train(again)
    assert same_bits(end(again), end(whole))
    assert told(again) == told(whole)


def checked(make: Make, routes: list[dict[str, Any]]) -> None:
    """Read a configuration and hold it against its model."""
    config, parts = make(tread={"routes": routes}), ("transformer",)
    preflight.check(config, resolve(config.model, parts=parts), parts=parts)


@pytest.mark.parametrize(
    ("routes", "named"),
    [
        ([{"skip": 1.0, "start": 0, "end": 1}], r"tread\.routes\.0\.skip: .*less than 1"),
        ([{"skip": 0.5, "start": 0}], r"tread\.routes\.0\.end: required"),
        ([{"skip": 0.5, "start": 2, "end": 2}], r"tread\.routes\.0: start=2 and end=2 are blocks 2 to 2 of 0 to 3"),
        ([{"skip": 0.5, "start": -1, "end": 1}], r"tread\.routes\.0: start=-1 and end=1 are blocks 3 to 1"),
        ([{"skip": 0.5, "start": 0, "end": 4}], r"tread\.routes\.0: .*are blocks 0 to 4 of 0 to 3"),
        ([{"skip": 0.5, "start": -5, "end": 2}], r"tread\.routes\.0: .*are blocks -1 to 2"),
        (
            [{"skip": 0.5, "start": 0, "end": 1}, {"skip": 0.5, "start": 1, "end": 3}],
            r"tread\.routes\.1: .*some of which tread\.routes\.0 has",
        ),
    ],
)
def test_routes_that_cannot_be(make_config: Make, routes: list[dict[str, Any]], named: str) -> None:
    """A route that is empty, runs backwards, leaves the model or overlaps, and one that all skip, is refused by name,
    before anything is started."""
    with pytest.raises(UsageError, match=named):
        checked(make_config, routes)


def test_routes_are_planned(make_config: Make, masked: Path) -> None:
    """The planner counts what routed blocks keep of the tokens that go through them; with masks, of all of them."""
    plain, routed = (make_config(tread=tread) for tread in ({}, ACROSS))
    model = resolve(plain.model, parts=("transformer",))
    jobs = [planner.job(config, model, world=1, local=1) for config in (plain, routed)]
    assert jobs[1].routed == [2 * (16 + 96), 2 * (8 + 96), 2 * (8 + 96), 2 * (16 + 96)]
    found = [planner.place(job, "ddp", "fp32", "none").activations for job in jobs]
    costs = planner.block_costs(jobs[0], "fp32")["none"]
    assert found[0] - found[1] == pytest.approx(2 * 8 * sum(costs))
    hidden = planner.job(with_all(make_config, masked, tread=ACROSS), model, world=1, local=1)
    assert set(hidden.routed) == {hidden.tokens}


def test_another_method_would_take_no_routes(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method whose passes know of no routes is refused beside them, instead of being trained without."""
    monkeypatch.setattr(Config, "methods", property(lambda config: ("flow", "moonlit")))
    with pytest.raises(UsageError, match=r"tread\.routes: the passes of moonlit take no routes"):
        make_config(tread=ACROSS)


def test_routes_are_read_and_written(make_config: Make) -> None:
    """A route is a table in the file, one of its numbers can be overridden, and it stands in what is kept of a run."""
    tree = make_config(tread=TWO).model_dump(mode="json", by_alias=True)
    apply_override(tree, "tread.routes.1.skip=0.7")
    config = parse(tree)
    assert [route.skip for route in config.tread.routes] == [0.25, 0.7]
    file = Path(config.output.root).parent / "kept.toml"
    file.write_text(dump_toml(config))
    assert load(file) == config
    assert [*itertools.chain(*config.tread.spans(4))] == [2, 3, 0.25, 0, 1, 0.7]
