"""The stages without Ray, for tests of what they compute: one process, the same actors' classes, called directly."""

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flux2_core.cache import keys, proofs
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
    """Encode what a configuration needs and its cache has not yet, and publish its index."""
    model = resolve(config.model, parts=PARTS)
    planned = survey.survey(config, model)
    tables = [proofs.open_table(config, model, kind, planned.fingerprints[kind]) for kind in KINDS]
    tree, (text, latents) = config.model_dump(mode="json", by_alias=True), tables
    prompts = {keys.text_key(text.fingerprint, each): each for each in data_texts.texts(config, planned.samples)}
    tokenizer = PromptTokenizer(model, max_length=config.text.max_length, tokens=config.text.tokens)
    rows = _missing(latents, samples.wanted(planned.samples))
    _encode(TextWorker(tree, text.uri), [*passes(_missing(text, prompts), tokenizer, config.text)])
    _encode(ImageWorker(tree, latents.uri), [[row] for row in rows])
    filled = []
    for table in tables:
        table.checkout_latest()
        filled.append(Filled(TableRef(table.uri, table.version, table.fingerprint), 0, 0, {}))
    index.publish(config, planned, text=filled[0], latents=filled[1])
    return model


def _missing(table: Table, wanted: Mapping[str, Any]) -> list[Any]:
    there = table.present(wanted)
    return [each for key, each in wanted.items() if key not in there]


def _encode(worker: TextWorker | ImageWorker, items: list[list[Any]]) -> None:
    for item in items:
        worker.work(item)
    if items:  # closing one that did nothing would load a model
        worker.close()


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
