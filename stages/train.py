"""Train: one worker per device, from the caches alone.

Several workers, and those of a cluster, are a group of Ray Train (`stages.group`); one on this machine is asked by the
driver itself (`stages.alone`). Each does `_worker`; where one is lost they go on from the newest checkpoint.
No import chain from here reaches a text encoder or another stage (tests/test_architecture.py).
"""

from __future__ import annotations

import logging
import platform
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flux2_core import accelerator
from flux2_core.cache import leases, publish
from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.errors import CacheloomError, SetupError
from flux2_core.model.folder import TRAINING_PARTS, ModelFolder, resolve, same_folder
from flux2_core.run import checkpoint, control, mirror, recorded
from flux2_core.run.folder import RunFolder
from flux2_core.train import preflight, schedules
from flux2_core.train.batches import TrainingData
from stages import alone, cluster, vitals
from stages.relay import Place, Progress

if TYPE_CHECKING:
    from flux2_core.train.trainer import Trainer

PROOF = ".shared-folder"
PHASE = "phase"  # of what is told: beside the steps' records
LOG = logging.getLogger(__name__)


def train(
    config: Config, *, progress: Progress = lambda _record: None, phase: Callable[[str], None] = lambda _text: None
) -> dict[str, Any]:
    """Train to `train.steps`, resuming where a checkpoint is, and write the LoRA files and the report.

    Args:
        config: of the run.
        progress: gets each step's record.
        phase: gets what is done beside the steps, in words.

    Raises:
        UsageError: the run exists with another configuration, or another process holds it.
        DataError: something is not cached; names it.
        SetupError: the workers cannot run, or the end of the run cannot be mirrored.
    """
    from flux2_core.output import export  # the workers, which import this module too, write no report

    idle = preflight.fillers(config.train.batch_size, config.cluster.workers)

    def heard(record: dict[str, Any]) -> None:
        if PHASE in record:
            return phase(record[PHASE])
        if (warning := record.get("warning")) and warning != idle:
            LOG.warning("step %d: %s", record["step"], warning)
        return progress(record)

    folder = RunFolder(config)
    with folder.lock():
        recorded.check(folder)
        mirror.pull(folder)
        folder = RunFolder(config := recorded.settled(config))
        if folder.finished():
            mirror.claim(folder)
            phase(f"run {config.run} is finished: nothing is left to train")
            result = _finished(config, folder)
        else:
            model = resolve(config.model, parts=TRAINING_PARTS)
            preflight.check(config, model, parts=TRAINING_PARTS)  # refuses what could only fail,
            data = TrainingData(config, model)  # and what is not cached, before anything is started
            preflight.writable(config)
            config, folder = data.config, RunFolder(data.config)
            if (before := recorded.lengthened(folder)) and (bend := schedules.bend(config.train, before)):
                LOG.warning("%s", bend)
            recorded.write(folder)
            publish.keep(config)
            mirror.claim(folder)
            start = found.step if (found := checkpoint.newest(folder.checkpoints)) else 0
            with leases.held(config, "train", publish.named_by(config, data.index)):
                if found is None or found.step < config.train.steps:
                    if idle:
                        LOG.warning("%s", idle)
                    _fit_and_leave(config, model, folder, heard)
                result = export.export(config, model, resumed_from=start)
        mirror.push(folder)
        return result


def _finished(config: Config, folder: RunFolder) -> dict[str, Any]:
    from flux2_core.output import export

    result = export.result(config, resumed_from=config.train.steps)
    last = checkpoint.newest(folder.checkpoints)
    if last and (edited := publish.trained_on_other_data(config, last.facts["samples"])):
        result["warnings"].append(edited)
    return result


def _fit_and_leave(config: Config, model: ModelFolder, folder: RunFolder, progress: Progress) -> None:
    """Train on the cluster; of one that ends after the last checkpoint nothing more is wanted."""
    try:
        with cluster.connect(config.cluster), vitals.asking():
            _fit(config, model, folder, progress)
    except SetupError as error:
        last = checkpoint.newest(folder.checkpoints)
        if last is None or last.step < config.train.steps:
            raise
        LOG.warning("the training is done and saved; after it: %s", error)


def _fit(config: Config, model: ModelFolder, folder: RunFolder, progress: Progress) -> None:
    fewest = config.cluster.min_workers or config.cluster.workers
    if (there := cluster.gpus(cluster.training_nodes(config.cluster))) and there < fewest:
        beside = " on nodes that do not encode" if config.cluster.encoder_resources else ""
        told = f"cluster.workers={config.cluster.workers}, and the cluster has {there} GPUs{beside}: use that many"
        raise SetupError(told)
    proof = uuid.uuid4().hex
    (folder.path / PROOF).write_text(proof)
    inputs: dict[str, Any] = {"config": config.model_dump(mode="json", by_alias=True), "proof": proof}
    inputs |= {"commit": model.commit, "transformer": model.likeness("transformer")}
    control.asked(folder.path, control.STOP)  # what was asked of a training that has ended

    def leave() -> None:
        control.ask(folder.path, control.STOP)

    if config.cluster.workers == 1 and config.cluster.address is None and cluster.is_one_machine():
        alone.fit(_worker, inputs, retries=config.cluster.retries, progress=progress, leave=leave)
    else:
        from stages import group  # Ray Train: 1.2 CPU-s of imports, in each process

        group.fit(config, _worker, inputs, progress, leave)


def _worker(inputs: dict[str, Any], place: Place) -> None:
    """What every worker does."""
    from flux2_core.train.loop import run
    from flux2_core.train.trainer import Trainer

    accelerator.let_segments_grow()
    config, told, world = parse(inputs["config"]), place.told, place.world

    def say(phase: str) -> None:
        told.put({PHASE: phase})

    if not accelerator.is_gpu(place.device):
        cluster.share_cores(place.beside)
    try:
        _see_folders(config, inputs["proof"])
        model = resolve(config.model, parts=TRAINING_PARTS, commit=inputs["commit"])
        same_folder(model, "transformer", inputs["transformer"])
        say(f"reading {model.path.name} and preparing it for training")
        trainer = Trainer(config, rank=place.rank, world=world, device=place.device.type, model=model)
        if trainer.step:
            say(f"going on from step {trainer.step}")
        done = run(trainer, told.put, on_phase=say, noticed=lambda: place.noticed() or _leaving(trainer))
    except CacheloomError as error:
        told.fail(error)
        if world > 1:  # the others may be waiting in a collective: ending this worker ends them all
            raise
        return
    if not done:  # whoever returns has finished: the work is started again after an error only
        told.go()
        raise RuntimeError(f"{platform.node()} or a peer is going: step {trainer.step} is saved")


def _leaving(trainer: Trainer) -> bool:
    """Whether the driver is about to end; one worker's hearing of it stops all."""
    return trainer.rank == 0 and control.asked(trainer.folder.path, control.STOP)


def _see_folders(config: Config, proof: str) -> None:
    path = RunFolder(config).path / PROOF
    cluster.see(str(path))
    cluster.see(config.output.cache)
    if path.read_text() != proof:
        raise SetupError(
            f"{platform.node()} has another folder at {path.parent}: output.root must be one that all share"
        )
