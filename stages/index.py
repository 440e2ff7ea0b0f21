"""Index: pictures and captions to the samples table, with what cannot be used in quarantine.

Reading and hashing the files is spread over the cluster; what comes back is a few numbers per file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import ray

from flux2_core.cache.index import Index, settings
from flux2_core.cache.publish import announce, withdraw, write_index, write_samples
from flux2_core.config.sections import Config
from flux2_core.data import intake, shown
from flux2_core.data.intake import SamplePlan
from flux2_core.data.sources import read
from flux2_core.errors import DataError
from flux2_core.model.folder import ModelFolder
from flux2_core.plan import rates, survey
from flux2_core.run import recorded
from flux2_core.run.folder import RunFolder
from flux2_core.store import parquet, schemas, seals, upkeep
from flux2_core.train import length
from stages import cluster
from stages.fill import Filled, Progress, silent

FILES_PER_TASK, MOST_PER_TASK = 32, 1_024  # a row group is one task's, or each worker would read it


def build(config: Config, model: ModelFolder, *, progress: Progress = silent, trusting: bool = True) -> SamplePlan:
    """Plan on the cluster and refuse data that must not be trained on; inventory and quarantine are written first.

    With `trusting` a picture that the cache's inventory knows is not opened.

    Raises:
        DataError: nothing can be used, or more is quarantined than `max_quarantined` allows.
        UsageError: the epochs come to a number of steps that is not allowed.
    """
    planned = survey.survey(config, model, mapper=survey.watched(progress, over_cluster), trusting=trusting)
    for inventory in planned.inventories:
        inventory.write()
    planned = replace(planned, inventories=())  # gives 250 bytes a picture back
    settle(config, planned)
    if not recorded.begun(RunFolder(config)):  # a run that was keeps its length, whatever its pictures are by now
        length.settled(config, planned.samples)
    announce(config, planned.samples)
    return planned


def settle(config: Config, planned: SamplePlan) -> None:
    """Write the quarantine table of the run, and refuse where too much is in it."""
    folder = RunFolder(config)
    folder.path.mkdir(parents=True, exist_ok=True)
    parquet.write_parquet(str(folder.quarantine), planned.quarantine, {})
    if reason := intake.refusal(config, planned):
        raise DataError(*reason.splitlines())


def publish(config: Config, planned: SamplePlan, *, text: Filled, latents: Filled) -> Index:
    """Tie the finished tables together; pictures that failed while encoding are quarantined first.

    Raises:
        DataError: too much is quarantined by now.
    """
    planned = intake.without(planned, latents.failed)
    settle(config, planned)
    index = Index(
        contract=schemas.CONTRACT_VERSION,
        samples=write_samples(config, planned.samples),
        rows=shown.left_out(planned.samples).num_rows,
        text=text.table,
        latents=latents.table,
        settings=settings(config),
    )
    name = write_index(config, index).rsplit("/", 1)[-1].removesuffix(".json")
    for filled in (text, latents):
        upkeep.tag(filled.table.uri, f"index-{name}", filled.table.version)
        seals.seal(filled.table.uri)
        if filled.rate is not None:
            rates.record(config.output.cache, filled.table.fingerprint, filled.rate)
    withdraw(config)
    return index


def over_cluster(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`map` over Ray tasks of some files each, in order, with a bounded number in flight."""
    parts, running = read.together(items, uri=str, least=FILES_PER_TASK, most=MOST_PER_TASK), deque[Any]()
    task = ray.remote(num_cpus=1)(_all)
    shipped = ray.put(function)
    while True:
        while len(running) < 2 * cluster.cpus() and (part := next(parts, None)):
            running.append(task.remote(shipped, part))
        if not running:
            return
        yield from ray.get(running.popleft())


def _all(function: Callable[[Any], Any], part: list[Any]) -> list[Any]:
    return [function(item) for item in part]
