"""Batches from the caches alone: rows by key, prompts rebuilt, everything random keyed by (seed, step, position).

A step's samples are dealt to the workers in runs that differ by one at most; the shorter ones are filled up with a
repeat of weight 0, so that every worker makes the same passes (a sharded base needs all of them in each) and the batch
is the same whatever their number.

Legend: B samples of one worker, R references, c = 128, h and w in tokens, L text rows, D row width.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from flux2_core.cache import index, prompt_rows
from flux2_core.cache.keys import text_key
from flux2_core.config.sections import Config
from flux2_core.data import needs, texts
from flux2_core.errors import DataError
from flux2_core.lora import targets, told
from flux2_core.model import tensor_bytes
from flux2_core.model.folder import ModelFolder
from flux2_core.model.latents import CHANNELS, PIXELS_PER_TOKEN, mask_from_bytes
from flux2_core.model.seeded import generator, numpy_generator
from flux2_core.noise import Levels
from flux2_core.placement import planner
from flux2_core.placement.tokens import kept
from flux2_core.store import keyset, parquet, schemas
from flux2_core.store.keyset import Keys
from flux2_core.store.reader import Reader
from flux2_core.store.row import Row
from flux2_core.store.table import Table
from flux2_core.train import length
from flux2_core.train.losses import Weights
from flux2_core.train.methods import table as methods
from flux2_core.train.methods.protocol import Batch, Draw

PREFETCH = 4
COLUMNS = [  # of the samples table; texts are in the text table, places of pictures are of no interest any more
    schemas.ID,
    schemas.VARIANT,
    schemas.TEXT_KEYS,
    schemas.LATENT_KEY,
    schemas.ROLES,
    schemas.BUCKET_HEIGHT,
    schemas.BUCKET_WIDTH,
    schemas.MASK,
    schemas.REFERENCES,
    schemas.REJECTED,
    schemas.DATASET,
    schemas.REPEATS,
    schemas.WEIGHT,
    schemas.REGULARISATION,
    schemas.SPLIT,
]


class TrainingData:
    """The open caches of a configuration, and the samples that they serve: keys and numbers, no text but once."""

    def __init__(self, config: Config, model: ModelFolder) -> None:
        self.index = index.read_index(config, model)
        self.samples = self.index.samples.rsplit("/", 1)[-1]  # named by its content: the same wherever the cache is
        samples = parquet.read_parquet(self.index.samples, columns=COLUMNS, optional=(schemas.REJECTED,))
        self.config = config = length.settled(config, samples)
        self.methods = methods.of(config)
        self.levels = [Levels(noise) for noise in config.noises]
        self.weights = [Weights(config.loss, levels) for levels in self.levels]
        self.train, self.validation = (length.of_split(samples, name) for name in (schemas.TRAIN, schemas.VALIDATION))
        self.prompts = texts.prompts(config)
        shown = iter(length.of_split(samples, schemas.PREVIEW))
        self.shown = [list(islice(shown, len(prompt.references))) for prompt in config.validation.drawn]
        self.text = Table.open(self.index.text.uri, version=self.index.text.version)
        self.latents = Table.open(self.index.latents.uri, version=self.index.latents.version)
        self.text_reader = self._reader("text", self.text, self._text_keys(samples))
        self.latents_reader = self._reader("latent", self.latents, self._latent_keys(samples))
        self.pad_1D = prompt_rows.pad_row(self.text_reader, self.index.text.fingerprint, pad_rows=config.train.pad_rows)
        self.order = length.curriculum(config, self.train, until=config.train.steps)
        self.ranks = 0  # of all Linears together, which dropout alone asks for
        if config.lora.dropout:
            linears = [*planner.sizes(model).linears()]
            self.ranks = sum(targets.ranks(config.lora, targets.match(config.lora, linears)).values())

    def batch(self, step: int, *, rank: int = 0, world: int = 1) -> Batch:
        """The part of optimizer step `step` (from 0) that worker `rank` of `world` computes."""
        members = self.order.batch(step)
        share, extra = divmod(len(members), world)
        first = rank * share + min(rank, extra)
        own = range(first, first + share + (rank < extra))
        places = [*own, *([own[-1] if own else 0] * (share + (extra > 0) - len(own)))]
        rows = [self.train[members[place]] for place in places]
        latents_Bchw = self.pictures(rows)
        draws = [
            self._draw((self.config.train.seed, "draw", step, place), row, latents_Bchw.shape[1:])
            for row, place in zip(rows, places, strict=True)
        ]
        return Batch(
            ids=[row["id"] for row in rows[: len(own)]],
            latents_Bchw=latents_Bchw,
            noise_Bchw=torch.stack([draw.noise_chw for draw in draws]),
            sigma_B=torch.tensor([draw.sigma for draw in draws]),
            counts_B=torch.tensor([draw.counts for draw in draws]),
            guidance_B=torch.tensor([draw.guidance for draw in draws]),
            prompts_BLD=self.prompt_rows([draw.prompt for draw in draws]),
            total=len(members),
            weight_B=torch.tensor([row["weight"] for row in rows]) * (torch.arange(len(places)) < len(own)),
            mask_Bhw=self.masks(rows),
            references_RBchw=() if self._drops_references(step, rows[0]) else self.references(rows),
            dropped_BR=left_out(self.config, self.ranks, draws),
            routes_RBk=self._routes(members, draws),
            carried={name: method.carry(self, draws) for name, method in self.methods.items()},
        )

    def _draw(self, origin: tuple[int, str, int, int], row: dict[str, Any], shape: Sequence[int]) -> Draw:
        """A sample's noise and prompt; the order in which they are drawn is part of what a seed means."""
        train, rng = self.config.train, generator(*origin)
        tokens, levels = math.prod(shape[1:]), self.levels[row["dataset"]]
        sigma = levels.draw(rng, tokens=tokens, part=self._part(*origin[2:]) if levels.noise.stratified else (0, 1))
        counts = self.weights[row["dataset"]].weight(sigma, tokens=tokens)
        drawn = float(torch.rand((), generator=rng))
        caption: int | None = int(torch.randint(len(row["text_keys"]), (), generator=rng))
        noise_chw = torch.randn(shape, generator=rng)
        trigger = [part["key"] for part in row["roles"] if part["role"] == needs.TRIGGER_ONLY]
        if drawn < train.caption_dropout:
            prompt, caption = self.key(needs.NULL_TEXT), None
        elif trigger and drawn < train.caption_dropout + train.trigger_dropout:
            prompt, caption = trigger[0], None
        else:
            prompt = row["text_keys"][caption]
        guidance = train.guidance
        if isinstance(guidance, tuple):
            guidance = float(torch.empty(()).uniform_(*guidance, generator=generator(*origin, "guidance")))
        return Draw(origin, row, sigma, counts, noise_chw, prompt, caption, guidance)

    def _drops_references(self, step: int, row: dict[str, Any]) -> bool:
        """Whether a batch is trained without its references: one draw for all workers, as it must keep one shape."""
        share = self.config.data[row["dataset"]].drop_references
        if not share or not row["references"]:
            return False
        return float(torch.rand((), generator=generator(self.config.train.seed, "references", step))) < share

    def _routes(self, members: Sequence[int], draws: Sequence[Draw]) -> tuple[torch.Tensor, ...]:
        """Of each of `tread.routes` the tokens that stay; how many, the masks of all of a step's samples say."""
        if not (skips := [route.skip for route in self.config.tread.routes if route.skip]):
            return ()
        rows = [self.train[member] for member in members]
        white = torch.zeros(len(rows), math.prod(draws[0].noise_chw.shape[1:]), dtype=torch.bool)
        if (shares := self.masks(rows)) is not None:
            white = (shares.flatten(1) >= 0.5) & torch.tensor([bool(row["mask"]) for row in rows]).unsqueeze(1)
        most = int(white.sum(1).max())

        def stay(route: int, skip: float, draw: Draw) -> torch.Tensor:
            return kept(skip, white[draw.origin[3]], generator(*draw.origin, "route", route), most=most)

        return tuple(torch.stack([stay(*route, draw) for draw in draws]) for route in enumerate(skips))

    def _part(self, step: int, place: int) -> tuple[int, int]:
        """Which of as many parts of the noise levels as a batch has places is drawn from at this one."""
        size = self.config.train.batch_size
        return int(numpy_generator(self.config.train.seed, "levels", step).permutation(size)[place]), size

    def due(self, every: int | str, step: int) -> bool:
        """Whether an interval ends with the first `step` steps; each does at 0."""
        return step == 0 or self.passed(every, step) > self.passed(every, step - 1)

    def passed(self, every: int | str, step: int) -> int:
        """How many intervals have ended with the first `step` steps."""
        return length.passed(every, step, batch_size=self.config.train.batch_size, order=self.order)

    def batches(
        self, start: int, stop: int, *, rank: int, world: int, pinned: bool = False
    ) -> Iterator[tuple[Batch, float]]:
        """Batches of steps start..stop-1, read ahead by threads, each with the seconds that it was waited for.

        `pinned`: in memory from which a GPU copies while it computes.
        """

        def read(step: int) -> Batch:
            batch = self.batch(step, rank=rank, world=world)
            return batch.each(torch.Tensor.pin_memory) if pinned else batch

        with ThreadPoolExecutor(2, thread_name_prefix="cacheloom-read") as pool:
            ahead: deque[Future[Batch]] = deque()
            for step in range(start, stop):
                while len(ahead) < PREFETCH and step + len(ahead) < stop:
                    ahead.append(pool.submit(read, step + len(ahead)))
                began = time.perf_counter()
                batch = ahead.popleft().result()
                yield batch, time.perf_counter() - began

    def key(self, text: str) -> str:
        """Key of a text in this cache."""
        return text_key(self.index.text.fingerprint, text)

    def prompt_rows(self, keys: list[str]) -> torch.Tensor:
        """Full prompt embeddings (B, L, D) of cached texts, each row copied once."""
        return prompt_rows.full(self.text_reader, keys, self.index.text.fingerprint, pad_1D=self.pad_1D)

    def masks(self, samples: list[dict[str, Any]]) -> torch.Tensor | None:
        """Shares of the loss (B, h, w) of samples of one bucket, 1 where one has no mask; None: none has one."""
        masked = [sample for sample in samples if sample["mask"]]
        if not masked:
            return None
        fetched = iter(self.latents_reader.fetch([sample["mask"]["latent_key"] for sample in masked]))
        found = [self._mask(next(fetched)) if sample["mask"] else None for sample in samples]
        whole = next(mask for mask in found if mask is not None)
        return torch.stack([torch.ones_like(whole) if mask is None else mask for mask in found])

    def references(self, samples: list[dict[str, Any]]) -> tuple[torch.Tensor, ...]:
        """Latents (B, c, h, w) of each reference of samples of one bucket, in order."""
        named = zip(*(sample["references"] for sample in samples), strict=True)
        return tuple(torch.stack(self.latent_rows(one)) for one in named)

    def beside_prompt(self, place: int) -> list[torch.Tensor]:
        """Latents (1, c, h, w) of each picture that the prompt of a preview shows the model, in order."""
        return [latents_chw[None] for latents_chw in self.latent_rows(self.shown[place])]

    def pictures(self, samples: list[dict[str, Any]]) -> torch.Tensor:
        """Latents (B, c, h, w) of samples of one bucket; zeros where all methods make their own."""
        if "picture" in needs.of(self.config).latents:
            return torch.stack(self.latent_rows(samples))
        sides = (samples[0][name] // PIXELS_PER_TOKEN for name in (schemas.BUCKET_HEIGHT, schemas.BUCKET_WIDTH))
        return torch.zeros(len(samples), CHANNELS, *sides)

    def latent_rows(self, parts: Iterable[Mapping[str, Any]]) -> list[torch.Tensor]:
        """Latents (c, h, w) of samples or of parts of them, fp32."""
        dtype = tensor_bytes.DTYPES[self.config.latents.dtype]
        tensors = []
        for row in self.latents_reader.fetch([part["latent_key"] for part in parts]):
            shape = (CHANNELS, int(row.attributes[schemas.HEIGHT]), int(row.attributes[schemas.WIDTH]))
            flat = tensor_bytes.from_bytes(row.payload, dtype=self.config.latents.dtype, width=1)
            if flat.numel() != shape[0] * shape[1] * shape[2]:
                raise DataError(
                    f"{self.latents.uri}: row {row.key} has {flat.numel()} values of {dtype}, wanted {shape}"
                )
            tensors.append(flat.view(shape).float())
        return tensors

    def _text_keys(self, samples: pa.Table) -> Keys:
        common = [self.key(text) for text in texts.common_texts(self.config).values()]
        roles = texts.in_roles(samples, schemas.KEY, needs.of(self.config).roles)
        pad = [prompt_rows.PAD_KEY] if prompt_rows.ragged(self.index.text.fingerprint) else []
        return keyset.of(common, pc.list_flatten(samples.column(schemas.TEXT_KEYS)), roles.unique(), pad)

    def _latent_keys(self, samples: pa.Table) -> Keys:
        return keyset.of(*(needs.LATENTS[name].keys(samples) for name in needs.of(self.config).latents))

    def _reader(self, kind: str, table: Table, keys: Keys) -> Reader:
        """A reader of rows that are all there."""
        reader = Reader(table, keys)
        if missing := set(reader.missing):
            names = {key: name for key, name in self._named() if key in missing}
            raise DataError(index.missing_message(kind, table.uri, list(names.values()), keys.size))
        return reader

    def _named(self) -> Iterator[tuple[str, str]]:
        """What each row is that must be cached, a text or whose latents; out of the whole samples table."""
        samples = parquet.read_parquet(self.index.samples)
        yield prompt_rows.PAD_KEY, "the pad row"
        yield from ((self.key(text), text) for text in texts.texts(self.config, samples))
        used = needs.of(self.config).latents
        for kind in (kind for name, kind in needs.LATENTS.items() if name in used):
            for row in parquet.Rows(samples, np.arange(samples.num_rows)):
                yield from ((part["latent_key"], kind.whose + row["id"]) for part in kind.parts(row))

    def _mask(self, row: Row) -> torch.Tensor:
        height, width = int(row.attributes[schemas.HEIGHT]), int(row.attributes[schemas.WIDTH])
        return mask_from_bytes(row.payload, height=height, width=width)


def left_out(config: Config, ranks: int, draws: Sequence[Draw]) -> torch.Tensor | None:
    """What each of so many ranks counts in each sample, drawn from its place alone; None: without dropout."""
    if not (share := config.lora.dropout):
        return None
    return torch.stack([told.drop(share, ranks, generator(*draw.origin, "dropout")) for draw in draws])
