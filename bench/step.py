"""One training step: ours under a process group of one, against the step of diffusers' script.

Theirs is put together as examples/dreambooth/train_dreambooth_lora_flux2.py does (transformer + peft + AdamW; its
accelerate layer, which only adds time, is left out), with the same targets, rank, first weights, batch and settings.
Both losses are compared before anything is measured. Then our compiled step, what recomputing costs, and what a step
costs as blocks, tokens and workers grow: there "theirs" is our own step before, so a ratio of 0.5 means twice the cost.
The same batch is dealt to more workers, and the CPU time of all of them counts: what is above that of one is the price
of sharing.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import Flux2Pipeline, Flux2Transformer2DModel
from peft import LoraConfig

from bench.measure import Row, Timings, alternate, compared
from bench.tiny_cache import prepare
from flux2_core.config.reading import parse
from flux2_core.config.routing import Route, Tread
from flux2_core.config.sections import Config
from flux2_core.embedded.tiny_model import RANDOM_SHAPE, ModelShape
from flux2_core.lora import adapter
from flux2_core.lora.targets import match
from flux2_core.model import transformer
from flux2_core.train.batches import Batch
from flux2_core.train.trainer import Trainer
from tests.in_process import in_ranks


@dataclass(frozen=True)
class Case:
    """One model and the batch that it is trained on."""

    name: str
    shape: ModelShape
    side: int
    text_rows: int
    rank: int
    batch: int
    steps: int
    """Steps of one measured round."""
    rounds: int


SMALL = Case("small: width 32, 4 blocks", RANDOM_SHAPE, side=64, text_rows=96, rank=4, batch=2, steps=15, rounds=5)
WIDE = ModelShape(text_width=64, heads=4, head_width=32, rope_axes=(8, 8, 8, 8))
MIDDLE = Case(
    "mid-size: width 384, 8 blocks",
    ModelShape(text_width=64, heads=6, head_width=64, rope_axes=(16, 16, 16, 16), double_blocks=3, single_blocks=5),
    side=256, text_rows=512, rank=16, batch=1, steps=1, rounds=5,
)  # fmt: skip


def run(*, quick: bool = False) -> list[Row]:
    """CPU milliseconds of a step on each model."""
    rows = []
    for case in (SMALL,) if quick else (SMALL, MIDDLE):
        with tempfile.TemporaryDirectory() as name:
            rows += _measure(case, _config(Path(name), case), rounds=1 if quick else case.rounds)
    return rows + ([] if quick else [*_growth(rounds=SMALL.rounds), _routed(MIDDLE), *_workers(rounds=SMALL.rounds)])


def _config(folder: Path, case: Case) -> Config:
    return prepare(
        folder,
        case.shape,
        side=case.side,
        pictures=case.batch,
        text_rows=case.text_rows,
        lora={"rank": case.rank},
        train={"batch_size": case.batch},
    )


def _measure(case: Case, config: Config, *, rounds: int) -> list[Row]:
    trainer = Trainer(config)
    others = {"compiled": {"compile": True}, "selective": {"recompute": "selective"}, "full": {"recompute": "full"}}
    variants = {
        name: Trainer(config.model_copy(update={"train": config.train.model_copy(update=update)}))
        for name, update in others.items()
    }
    batch = trainer.data.batch(0)
    reference = Reference(config, trainer)
    steps: dict[str, Callable[[], Any]] = {
        "ours": lambda: trainer.train_step(batch)["loss"],
        "theirs": lambda: reference.step(batch),
        **{name: partial(_loss, other, batch) for name, other in variants.items()},
    }
    first = [step() for step in steps.values()]
    np.testing.assert_allclose(first, first[0], rtol=1e-5)  # the same job
    timings = alternate({name: _repeated(step, case.steps) for name, step in steps.items()}, rounds=rounds)
    row = partial(compared, timings, "step", per=case.steps)
    return [
        row(case.name, ours="ours", theirs="theirs", goal=">= 1"),
        row(f"{case.name}, compiled; theirs: eager", ours="compiled", theirs="theirs", goal=">= 1.15"),
        row(f"{case.name}, recompute selective; theirs: none", ours="selective", theirs="ours"),
        row(f"{case.name}, recompute full; theirs: none", ours="full", theirs="ours", note="0.67 by flop"),
    ]


def _loss(trainer: Trainer, batch: Batch) -> float:
    return trainer.train_step(batch)["loss"]


def _growth(*, rounds: int) -> list[Row]:
    """Our step on twice the blocks, and on four times the image tokens."""
    base = replace(SMALL, shape=replace(WIDE, double_blocks=2, single_blocks=4), batch=1)
    grown = {
        "theirs": base,
        "blocks x 2": replace(base, shape=replace(WIDE, double_blocks=4, single_blocks=8)),
        "image tokens x 4": replace(base, side=2 * base.side),
    }
    with ExitStack() as stack:
        arms = {}
        for name, case in grown.items():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            trainer = Trainer(_config(folder, case))
            arms[name] = _repeated(partial(_loss, trainer, trainer.data.batch(0)), case.steps)
        timings = alternate(arms, rounds=rounds)
    return [
        compared(timings, "step", f"{name}; theirs: our step before", ours=name, theirs="theirs", per=base.steps)
        for name in grown
        if name != "theirs"
    ]


def _routed(case: Case) -> Row:
    """Our step with half of a larger picture's tokens skipping all blocks but the outermost, against all tokens."""
    with tempfile.TemporaryDirectory() as name:
        config = _config(Path(name), replace(case, side=2 * case.side))
        route = Route(skip=0.5, start=2, end=-2)
        routed = config.model_copy(update={"tread": Tread(routes=(route,))})
        arms = {}
        for arm, each in {"theirs": config, "ours": routed}.items():
            trainer = Trainer(each)
            arms[arm] = _repeated(partial(_loss, trainer, trainer.data.batch(0)), case.steps)
        timings = alternate(arms, rounds=case.rounds)
    told = f"{case.name}, {2 * case.side} px, half of the tokens skip blocks 2 to -2; theirs: none"
    return compared(timings, "step", told, ours="ours", theirs="theirs", per=case.steps, goal=">= 1.2")


def _workers(*, rounds: int) -> list[Row]:
    """Our step on a batch of four, dealt to one, two and four workers with the base whole or sharded."""
    case = replace(SMALL, shape=replace(WIDE, double_blocks=2, single_blocks=4), batch=4)
    arms = {f"{world} workers, {kind}": (world, kind) for kind in ("ddp", "fsdp") for world in (1, 2, 4)}
    timings = Timings({name: [] for name in arms})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = _config(folder, case)
        for _ in range(rounds):
            for name, (world, kind) in arms.items():
                cluster = config.cluster.model_copy(update={"strategy": kind, "workers": world})
                tree = config.model_copy(update={"cluster": cluster}).model_dump(mode="json", by_alias=True)
                in_ranks(world, _worker, tree, str(folder), case.steps, folder=folder)
                spent = [float((folder / f"cpu-{rank}").read_text()) for rank in range(world)]
                timings.seconds[name].append(sum(spent))
    return [
        compared(timings, "step", f"{name}; theirs: 1", ours=name, theirs=f"1 workers, {kind}", per=case.steps)
        for name, (world, kind) in arms.items()
        if world > 1
    ]


def _worker(rank: int, world: int, tree: dict[str, Any], folder: str, steps: int) -> None:
    """One worker's CPU seconds of so many steps, the first of which is not counted."""
    trainer = Trainer(parse(tree), rank=rank, world=world)
    batch = trainer.data.batch(0, rank=rank, world=world)
    trainer.train_step(batch)
    began = time.process_time()
    for _ in range(steps):
        trainer.train_step(batch)
    Path(folder, f"cpu-{rank}").write_text(str(time.process_time() - began))


class Reference:
    """Model, adapter and optimizer as diffusers' script holds them."""

    def __init__(self, config: Config, ours: Trainer) -> None:
        self.guidance, self.most = config.train.guidance, config.train.max_grad_norm
        self.model: Any = Flux2Transformer2DModel.from_pretrained(config.model.path, subfolder="transformer")
        self.model.requires_grad_(False)
        targets = match(config.lora, transformer.linear_names(self.model))
        rank = config.lora.rank
        self.model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
        adapter.load(self.model, ours.weights(), device=torch.device("cpu"))
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in self.model.parameters() if parameter.requires_grad],
            lr=config.train.learning_rate,
            weight_decay=config.train.weight_decay,
        )
        self.model.train()

    def step(self, batch: Batch) -> float:
        """One optimizer step; returns the loss."""
        clean, noise = batch.latents_Bchw, batch.noise_Bchw
        sigma = batch.sigma_B.view(-1, 1, 1, 1)
        packed = Flux2Pipeline._pack_latents((1.0 - sigma) * clean + sigma * noise)
        ids = Flux2Pipeline._prepare_latent_ids(clean)
        prediction = self.model(
            hidden_states=packed,
            timestep=batch.sigma_B,
            guidance=torch.full([1], self.guidance).expand(len(clean)),
            encoder_hidden_states=batch.prompts_BLD,
            txt_ids=Flux2Pipeline._prepare_text_ids(batch.prompts_BLD),
            img_ids=ids,
            return_dict=False,
        )[0]
        prediction = Flux2Pipeline._unpack_latents_with_ids(prediction[:, : packed.size(1)], ids)
        target = noise - clean
        loss = (prediction.float() - target.float()).square().reshape(len(clean), -1).mean(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.most)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


def _repeated(step: Callable[[], Any], times: int) -> Callable[[], None]:
    def arm() -> None:
        for _ in range(times):
            step()

    return arm
