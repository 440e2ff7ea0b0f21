"""`python -m bench.pretended [dev klein-9b klein-4b]`: every placement at full size on a card that computes nothing.

For each strategy, precision, policy of recomputing and method a training worker is built (`Trainer`) and makes a step;
for some of them it draws a preview and measures the validation loss too. Then text encoder and VAE, in each of their
precisions. The code is the product's; in the place of files, caches and other workers stand tensors of the same names,
dtypes and shapes. Printed is whether it goes through or why not, and the bytes that were alive on the card at the most
against the planner's figure. `bench/pretence.py` says what this can show and what not; no block is compiled here.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from bench import full_size, pretence
from bench.full_size import SIZES
from bench.pretence import NAME
from flux2_core import accelerator
from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.data import needs
from flux2_core.errors import CacheloomError
from flux2_core.lora import adapter, targets
from flux2_core.model import frozen_linear, text_encoder, transformer, vae
from flux2_core.model.families import FAMILIES
from flux2_core.model.folder import ModelFolder
from flux2_core.model.latents import CHANNELS, PIXELS_PER_TOKEN
from flux2_core.placement import build, planner
from flux2_core.placement.tokens import kept
from flux2_core.train import trainer
from flux2_core.train.batches import Batch, left_out
from flux2_core.train.methods import table as methods
from flux2_core.train.methods.protocol import Draw
from flux2_core.train.trainer import Trainer
from flux2_core.train.validate import Watch

STRATEGIES = {  # cluster.strategy, workers, of which a node has
    "resident": ("ddp", 1, 1),
    "ddp": ("ddp", 8, 8),
    "fsdp": ("fsdp", 8, 8),
    "hsdp": ("hsdp", 16, 8),
    "stream": ("stream", 1, 1),
}
PRECISIONS = ("bf16", "fp32", "int8", "int4", "nf4", "fp8", "int8-matmul", "fp8-matmul")
RECOMPUTE = ("none", "selective", 3, "full")
QUANTIZE, STORED = ("none", "int8", "int4", "fp8"), ("raw", "projected")  # of the text encoder
CAPTION = "a photo of sks"
METHODS = {
    "flow": {},
    "dop": {"train": {"preservation": "dop"}, "data": {"trigger": "sks", "class_name": "dog"}},
    "blank": {"train": {"preservation": "blank"}},
    "pairs": {"data": {"rejected": "worse"}},
    "slider": {"slider": {"target": "a", "positive": "b", "negative": "c", "anchor": "d"}, "data": {"path": ""}},
    "moved": {
        "loss": {"contrastive_guidance": 3.0, "differential_guidance": 3.0, "masked_prior": 1.0, "kind": "wavelet"},
        "data": {"masks": "masks"},
    },
    "edit": {
        "data": {"masks": "masks", "references": ["one", "two"]},
        "validate": {"prompt": [{"text": CAPTION, "references": ["one", "two"]}]},
    },
    "routed": {
        "tread": {"routes": [{"skip": 0.5, "start": 1, "end": -2}]},
        "rollout": {"probability": 1.0, "steps": 1, "reflexflow": True},
    },
}
ADAPTERS = {  # walked like a method, with one policy
    "dora": {"kind": "dora", "dropout": 0.1},
    "lokr": {"kind": "lokr"},
    "loha": {"kind": "loha", "rank": 8},
    "oft": {"kind": "oft"},
    "t-lora": {"kind": "t-lora", "dropout": 0.1, "ranks": {"mlp": 8}},
}
ON_META = (  # what is done before any weight is there; FSDP2's guard refuses tensors of unknown kinds, fake ones too
    (transformer, "build"),
    (adapter, "inject"),
    (frozen_linear, "swap"),
    (build, "init_device_mesh"),
)
HOST, CARD_GIB = 2e12, 400  # of a node and of its cards: whatever is asked for fits


@dataclass(frozen=True)
class Walk:
    """One way through."""

    model: str
    strategy: str
    precision: str
    recompute: str | int
    method: str
    why_not: str | None = None
    counted: float = 0.0
    """Most bytes that were alive on the card, of all that a worker does."""
    planned: float = 0.0
    """The planner's figure, without what it spares for others."""
    seconds: float = 0.0

    @property
    def words(self) -> str:
        """Which way it is."""
        return f"{self.strategy} {self.precision} {self.recompute} {self.method}"


class Weightless(ModelFolder):
    """A folder whose files hold names, dtypes and shapes."""

    def tensor_files(self, part: str) -> dict[str, Path]:
        """A file for each part."""
        return dict.fromkeys(shapes(self.path, self.family.name, part), self.path / part)


@cache
def shapes(path: Path, family: str, part: str) -> dict[str, torch.Tensor]:
    """What a part's files hold, on the meta device."""
    return full_size.tensors(ModelFolder(path, FAMILIES[family]), part)


class File:
    """In the place of safetensors' `safe_open`: tensors of the right dtype and shape."""

    def __init__(self, model: ModelFolder, file: Path, **_: Any) -> None:
        self.shapes = shapes(model.path, model.family.name, file.name)

    def __enter__(self) -> File:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is open."""

    def everything(self) -> dict[str, torch.Tensor]:
        """All tensors."""
        return {key: self.get_tensor(key) for key in self.shapes}

    def get_tensor(self, key: str) -> torch.Tensor:
        """All of a tensor."""
        return torch.empty(self.shapes[key].shape, dtype=self.shapes[key].dtype)

    def get_slice(self, key: str) -> Rows:
        """A tensor of which rows are taken."""
        return Rows(self.get_tensor(key))


@dataclass(frozen=True)
class Rows:
    """In the place of a slice of a safetensors file."""

    whole: torch.Tensor

    def get_shape(self) -> list[int]:
        """Of the whole tensor."""
        return list(self.whole.shape)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self.whole[rows].clone()


class Caches:
    """In the place of `TrainingData`: pictures and prompts of the right shapes in host memory."""

    def __init__(self, config: Config, model: ModelFolder) -> None:
        self.config, self.methods = config, methods.of(config)
        self.width = model.inner_width if config.text.stored == "projected" else model.text_width
        self.order = SimpleNamespace(epoch=lambda _step: 0)
        self.ranks = sum(
            targets.ranks(config.lora, targets.match(config.lora, [*planner.sizes(model).linears()])).values()
        )
        self.prompts = [prompt.text for prompt in config.validation.drawn]
        roles = [{"role": role, "key": role} for role in (needs.DOP, needs.CLASS_ONLY)]
        self.row = {"text_keys": [CAPTION], "latent_key": "picture", "regularisation": False, "dataset": 0}
        self.row |= {"roles": roles, "rejected": {"latent_key": "rejected"}}
        self.train = self.validation = [self.row]
        self.samples = ""

    def beside_prompt(self, place: int) -> list[torch.Tensor]:
        """Latents (1, c, h, w) of each reference of a prompt."""
        shown = self.config.validation.drawn[place].references
        return [latents_chw[None] for latents_chw in self.latent_rows(shown)]

    def due(self, every: int | str, step: int) -> bool:
        """Always."""
        return True

    def key(self, text: str) -> str:
        """Any."""
        return text

    def prompt_rows(self, keys: list[str]) -> torch.Tensor:
        """Prompts (B, L, D)."""
        return torch.empty(len(keys), self.config.text.max_length, self.width, dtype=torch.bfloat16)

    def latent_rows(self, parts: Sequence[Any]) -> list[torch.Tensor]:
        """Latents (c, h, w)."""
        side = self.config.data[0].resolutions[0] // PIXELS_PER_TOKEN
        return [torch.empty(CHANNELS, side, side) for _ in parts]

    def masks(self, samples: Sequence[Any]) -> torch.Tensor:
        """Shares of the loss (B, h, w)."""
        return torch.stack(self.latent_rows(samples))[:, 0]

    def references(self, samples: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        """Latents (B, c, h, w) of each reference picture."""
        return tuple(torch.stack(self.latent_rows(samples)) for _ in self.config.data[0].references)

    def routes(self, latents_Bchw: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Places of tokens that stay (B, k), of each route."""
        count, rng = latents_Bchw[0, 0].numel(), torch.Generator()
        white = torch.zeros(count, dtype=torch.bool)
        skips = [route.skip for route in self.config.tread.routes]
        return tuple(torch.stack([kept(skip, white, rng, most=0) for _ in latents_Bchw]) for skip in skips)

    def batch(self, pictures: int) -> Batch:
        """One worker's part of a step."""
        rows = [self.row] * pictures
        latents_Bchw = torch.stack(self.latent_rows(rows))
        noise_Bchw = torch.randn(latents_Bchw.shape)
        draws = [Draw((0, "draw", 0, 0), self.row, 0.5, 1.0, noise, CAPTION, 0, 1.0) for noise in noise_Bchw]
        carried = {name: method.carry(self, draws) for name, method in self.methods.items()}
        return Batch(
            ids=["a"] * pictures, latents_Bchw=latents_Bchw, noise_Bchw=noise_Bchw, sigma_B=torch.rand(pictures),
            prompts_BLD=self.prompt_rows([CAPTION] * pictures), total=pictures, weight_B=torch.ones(pictures),
            counts_B=torch.ones(pictures), guidance_B=torch.ones(pictures), mask_Bhw=self.masks(rows),
            references_RBchw=self.references(rows), routes_RBk=self.routes(latents_Bchw), carried=carried,
            dropped_BR=left_out(self.config, self.ranks, draws),
        )  # fmt: skip


def configuration(model: ModelFolder, walk: Walk, *, side: int = 1024, pictures: int = 1) -> Config:
    """Of one way through."""
    strategy, world, _ = STRATEGIES[walk.strategy]
    own = METHODS.get(walk.method, {})
    tree: dict[str, Any] = {
        "run": "pretended",
        "model": {"path": str(model.path)},
        "data": [{"path": str(model.path), "resolutions": [side], **own.get("data", {})}],
        "lora": {"rank": 16, **ADAPTERS.get(walk.method, {})},
        **{name: own.get(name, {}) for name in ("loss", "tread", "rollout", "slider")},
        "train": {
            "batch_size": pictures * world, "precision": walk.precision, "recompute": walk.recompute,
            **own.get("train", {}),
        },
        "validate": {"prompts": [CAPTION], "steps": 1, "every": 1, **({} if model.guided else {"guidance": 1}),
                     **own.get("validate", {})},
        "cluster": {"workers": world, "strategy": strategy, "gpu_memory": CARD_GIB},
        "output": {"root": str(model.path / "runs"), "cache": str(model.path / "cache")},
    }  # fmt: skip
    return parse(tree)


@contextmanager
def at(model: ModelFolder, world: int = 1, local: int = 1) -> Iterator[pretence.Card]:
    """One worker of a group, on a card and over files and caches that hold nothing."""
    pretence.register()
    with ExitStack() as stack:
        for module in (transformer, text_encoder):
            stack.enter_context(mock.patch.object(module, "safe_open", partial(File, model)))
        stack.enter_context(mock.patch.object(vae, "load_file", lambda file: File(model, file).everything()))
        stack.enter_context(mock.patch.object(trainer, "TrainingData", Caches))
        for module, name in ON_META:
            stack.enter_context(mock.patch.object(module, name, pretence.for_real(getattr(module, name))))
        stack.enter_context(mock.patch.object(accelerator, "free_host_bytes", return_value=HOST))
        stack.enter_context(mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str(local)}))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
        stack.callback(dist.destroy_process_group)
        yield stack.enter_context(pretence.card())


def work(model: ModelFolder, config: Config, *, local: int = 1, looks: bool = True) -> tuple[Trainer, float]:
    """All that a worker does: a step, a preview, the validation loss, a checkpoint; the most bytes on its card too."""
    world = config.cluster.workers
    with at(model, world, local) as card:
        worker = Trainer(config, rank=0, world=world, device=NAME, model=model)
        for weight in worker.adapter.values():
            weight.grad = torch.zeros_like(weight)
        worker.optimizer.step()  # its moments are there from the second step on, which is the larger one
        worker.optimizer.zero_grad(set_to_none=True)
        watch = Watch(worker)
        watch.vae = torch.empty(int(planner.VAE), dtype=torch.uint8, device=NAME)  # its bytes; `encode` has it work
        worker.train_step(worker.data.batch(config.train.batch_size // world))
        if looks:
            watch.look(0, None)
            worker._snapshot()
        return worker, card.peak


def encode(model: ModelFolder, quantize: str, stored: str) -> float:
    """Captions and a picture through both encoders and a picture back; the most bytes on the card."""
    text = {"quantize": quantize, "stored": stored}
    config = parse({"model": {"path": str(model.path)}, "data": [{"path": str(model.path)}], "text": text})
    with at(model) as card:
        encoder = text_encoder.TextEncoder(model, config.text, device=NAME)
        encoder.pad_row()
        encoder.encode([CAPTION, f"{CAPTION} in the rain"])
        del encoder
        for precision in ("bf16", "fp32"):
            pictures = vae.Vae(model, device=NAME, precision=precision)
            pictures.decode(pictures.encode(torch.zeros(1, 1024, 1024, 3, dtype=torch.uint8)))
            del pictures
        return card.peak


def walked(model: ModelFolder, walk: Walk, *, looks: bool = True) -> Walk:
    """A way with what came of it: a refusal or a fault is its `why_not`."""
    began = time.perf_counter()
    try:
        worker, counted = work(model, configuration(model, walk), local=STRATEGIES[walk.strategy][2], looks=looks)
    except (RuntimeError, TypeError, AttributeError, ValueError, CacheloomError) as error:
        return replace(walk, why_not=f"{type(error).__name__}: {str(error).splitlines()[0][:160]}")
    planned = worker.placement.total - planner.SPARE
    return replace(walk, counted=counted, planned=planned, seconds=time.perf_counter() - began)


def ways(model: str, *, deep: bool) -> Iterator[Walk]:
    """All of them; `deep` ones are a spread, in which each value of each dimension stands beside the plain ones."""
    every = [
        Walk(model, strategy, precision, recompute, method)
        for strategy, precision, recompute, method in itertools.product(
            STRATEGIES, PRECISIONS, RECOMPUTE, (*METHODS, *ADAPTERS)
        )
        if (recompute == "full" or strategy != "stream")  # which computes all again by itself
        if method in METHODS or recompute == ("full" if strategy == "stream" else "selective")
    ]
    plain = {"strategy": "resident", "precision": "bf16", "recompute": "selective", "method": "flow"}
    for walk in every:
        stream = walk.strategy == "stream"
        others = sum(getattr(walk, name) != value for name, value in plain.items())
        if not deep or others <= 1 + stream:
            yield walk


def folder(path: Path, name: str, *, deep: bool) -> Weightless:
    """A published model's folder without weights; else than `deep` it has two blocks of each kind, as wide as all."""
    size = SIZES[name]
    if not deep:
        size = replace(size, transformer={**size.transformer, "num_layers": 2, "num_single_layers": 2})
    described = full_size.describe(path, size)
    return Weightless(described.path, described.family)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 1 where a way is closed, or more was alive on a card than the planner says."""
    parser = argparse.ArgumentParser(prog="python -m bench.pretended", description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"which: {', '.join(SIZES)}; default: all")
    parser.add_argument("--deep", action="store_true", help="all blocks, and of the ways a spread")
    parser.add_argument("--only", nargs="+", default=[""], help='ways whose words begin so: "fsdp int8 full flow"')
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    found = []
    for name in options.models or SIZES:
        with tempfile.TemporaryDirectory() as path:
            model = folder(Path(path), name, deep=options.deep)
            for walk in ways(name, deep=options.deep):
                if walk.words.startswith(tuple(options.only)):
                    looks = walk.method in ("flow", "edit") and walk.recompute in ("selective", "full")
                    found.append(walked(model, walk, looks=looks))
                    print(line(found[-1]), file=sys.stderr, flush=True)
            for quantize, stored in itertools.product(QUANTIZE, STORED):
                if (words := f"encode {quantize} {stored}").startswith(tuple(options.only)):
                    print(f"{name} {words}: {encode(model, quantize, stored) / 1e9:.1f} GB", flush=True)
    print(table(found))
    return int(any(walk.why_not or walk.counted > walk.planned for walk in found))


def line(walk: Walk) -> str:
    """What came of a way."""
    told = walk.why_not or f"{walk.counted / 1e9:.1f} of {walk.planned / 1e9:.1f} GB"
    return (
        f"{walk.model} {walk.strategy} {walk.precision} {walk.recompute} {walk.method}: {told} ({walk.seconds:.0f} s)"
    )


def table(found: Sequence[Walk]) -> str:
    """A row for each strategy and precision, a column for each policy: counted / planned GB of every method."""
    rows = ["| model | strategy | precision | " + " | ".join(map(str, RECOMPUTE)) + " |", "| --- " * 7 + "|"]
    for (name, strategy, precision), group in itertools.groupby(found, lambda w: (w.model, w.strategy, w.precision)):
        cells = {policy: [] for policy in RECOMPUTE}
        for walk in group:
            cells[walk.recompute].append(walk.why_not or f"{walk.counted / 1e9:.1f} / {walk.planned / 1e9:.1f}")
        shown = ("; ".join(dict.fromkeys(cells[policy])) for policy in RECOMPUTE)
        rows.append(f"| {name} | {strategy} | {precision} | " + " | ".join(shown) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    raise SystemExit(main())
