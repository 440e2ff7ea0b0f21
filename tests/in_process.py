"""The stages without Ray, for tests of what they compute: one process, the same actors' classes, called directly."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from flux2_core import cache, planning, recipes, tables
from flux2_core.config import Config
from flux2_core.model_folder import ModelFolder, resolve
from flux2_core.store import Table
from flux2_core.training import Trainer
from stages import index
from stages.encode_images import ImageWorker
from stages.encode_text import TextWorker
from stages.fill import Filled

PARTS = ("text_encoder", "tokenizer", "vae", "transformer", "scheduler")


def fill_cache(config: Config) -> ModelFolder:
    """Encode everything that a configuration needs, and publish its index."""
    model = resolve(config.model, parts=PARTS)
    planned = planning.survey(config, model)
    text, latents = recipes.text_fingerprint(model, config), recipes.latents_fingerprint(model, config)
    tree = config.model_dump(mode="json", by_alias=True)
    text_uri, latents_uri = cache.text_uri(config, text), cache.latents_uri(config, latents)
    Table.open_or_create(text_uri, kind=tables.KIND_TEXT, fingerprint=text)
    Table.open_or_create(latents_uri, kind=tables.KIND_LATENTS, fingerprint=latents)
    writer = TextWorker(tree, text_uri)
    writer.work(cache.texts(config, planned.samples))
    writer.close()
    painter = ImageWorker(tree, latents_uri)
    for row in planned.samples.to_pylist():
        painter.work([row])
    painter.close()
    filled = [
        Filled(cache.TableRef(uri, Table.open(uri).version, fingerprint), 0, 0, {})
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


def trainer(config: Config) -> Trainer:
    """A trainer of one worker; needs `process_group`."""
    return Trainer(config)
