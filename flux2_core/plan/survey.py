"""The survey: pictures and captions scanned, every row given its key; nothing is loaded or written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from flux2_core.cache import keys, proofs
from flux2_core.config.sections import Config
from flux2_core.data import intake
from flux2_core.data.intake import SamplePlan
from flux2_core.data.samples import Keys
from flux2_core.model.folder import ModelFolder
from flux2_core.model.sampler import guidance_of
from flux2_core.store.schemas import KIND_LATENTS, KIND_TEXT


def survey(
    config: Config,
    model: ModelFolder,
    *,
    mapper: Callable[..., Iterator[Any]] = intake.threads,
    trusting: bool = True,
) -> SamplePlan:
    """Scan and inspect the data, and give every row its key; nothing is loaded or written.

    With `trusting` a picture that the cache's inventory knows is not opened.
    """
    prints, notes = proofs.settled(config, model)
    text, latents = prints[KIND_TEXT], prints[KIND_LATENTS]
    guidance_of(config.validation, model)  # refuses what a preview would not understand
    made = Keys(partial(keys.text_key, text), partial(keys.picture_key, latents), partial(keys.mask_key, latents))
    planned = intake.build(config, made, mapper=mapper, trusting=trusting)
    return replace(planned, fingerprints=prints, warnings=[*notes, *planned.warnings])


def watched(
    progress: Callable[[int, int], None], mapper: Callable[..., Iterable[Any]] = intake.threads
) -> Callable[..., Iterator[Any]]:
    """A mapper that tells how many of how many files were looked at."""

    def mapping(function: Callable[[Any], Any], items: list[Any]) -> Iterator[Any]:
        progress(0, len(items))
        for done, found in enumerate(mapper(function, items), start=1):
            progress(done, len(items))
            yield found

    return mapping
