"""The stages without Ray, for tests of what they compute: one process, the same actors' classes, called directly."""

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flux2_core.cache import proofs
from flux2_core.cache.index import TableRef
from flux2_core.config.sections import Config
from flux2_core.data import samples
from flux2_core.data import texts as data_texts
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.model.text_encoder import passes
from flux2_core.model.tokenizer import PromptTokenizer
from flux2_core.plan import survey
from flux2_core.store.schemas import KIND_LATENTS, KIND_TEXT
from flux2_core.store.table import Table
from flux2_core.train.trainer import Trainer
from stages import index
from stages.encode_images import ImageWorker
from stages.encode_text import TextWorker
from stages.fill import Filled
from tests.warm import PROCESSES

KINDS = (KIND_TEXT, KIND_LATENTS)
PARTS = ("text_encoder", "tokenizer", "vae", "transformer", "scheduler")


def fill_cache(config: Config) -> ModelFolder:
    """Encode everything that a configuration needs, and publish its index."""
    model = resolve(config.model, parts=PARTS)
    planned = survey.survey(config, model)
    text, latents = (planned.fingerprints[kind] for kind in KINDS)
    tree = config.model_dump(mode="json", by_alias=True)
    text_uri, latents_uri = (proofs.open_table(config, model, kind, planned.fingerprints[kind]).uri for kind in KINDS)
    writer = TextWorker(tree, text_uri)
    tokenizer = PromptTokenizer(model, max_length=config.text.max_length, tokens=config.text.tokens)
    for texts in passes(data_texts.texts(config, planned.samples), tokenizer, config.text):
        writer.work(texts)
    writer.close()
    painter = ImageWorker(tree, latents_uri)
    for row in samples.wanted(planned.samples).values():
        painter.work([row])
    painter.close()
    filled = [
        Filled(TableRef(uri, Table.open(uri).version, fingerprint), 0, 0, {})
        for uri, fingerprint in ((text_uri, text), (latents_uri, latents))
    ]
    index.publish(config, planned, text=filled[0], latents=filled[1])
    return model


@contextmanager
def process_group(folder: Path) -> Iterator[None]:
    """A gloo group of this process alone, as one Ray Train worker has it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def in_ranks(world: int, function: Callable[..., None], *given: Any, folder: Path) -> None:
    """Run `function(rank, world, *given)` in each of `world` warm processes of one gloo group; all must end well."""
    file = folder / f"group-{uuid.uuid4().hex}"
    ranks = [PROCESSES.Process(target=_rank, args=(function, rank, world, str(file), given)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * world


def _rank(function: Callable[..., None], rank: int, world: int, file: str, given: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    function(rank, world, *given)
    dist.destroy_process_group()


def trainer(config: Config) -> Trainer:
    """A trainer of one worker; needs `process_group`."""
    return Trainer(config)
