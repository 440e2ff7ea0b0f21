"""Train: one Ray Train worker per device, from the caches alone.

Ray Train restarts the worker group when a worker or node is lost; the workers then go on from the newest checkpoint.
With `cluster.min_workers` the new group takes the machines that there are, and a later one those that came back.
No import chain from here reaches a text encoder or another stage (tests/test_architecture.py).
"""

from __future__ import annotations

import itertools
import logging
import platform
import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import wait
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from flux2_core import accelerator
from flux2_core.cache import leases, publish
from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.errors import CacheloomError, SetupError
from flux2_core.model.folder import TRAINING_PARTS, ModelFolder, resolve, same_folder
from flux2_core.run import checkpoint, mirror, recorded
from flux2_core.run.folder import RunFolder
from flux2_core.train import preflight
from flux2_core.train.batches import TrainingData
from stages import background, cluster, notice, vitals
from stages.relay import Relay

PROOF = ".shared-folder"
RAY_STATE = ".ray"  # Ray Train's own notes; our checkpoints are in checkpoints/
REGROW_S = 60.0  # how often an elastic group that runs looks for machines that came back; growing costs a restart
LOG = logging.getLogger(__name__)

Progress = Callable[[dict[str, Any]], None]


def train(config: Config, *, progress: Progress = lambda _record: None) -> dict[str, Any]:
    """Train to `train.steps`, resuming where a checkpoint is, and write the LoRA files and the report.

    Raises:
        UsageError: the run exists with another configuration, or another process holds it.
        DataError: something is not cached; names it.
        SetupError: the workers cannot run, or the end of the run cannot be mirrored.
    """
    from flux2_core.output import export  # the workers, which import this module too, write no report

    idle = preflight.fillers(config.train.batch_size, config.cluster.workers)

    def heard(record: dict[str, Any]) -> None:
        if (warning := record.get("warning")) and warning != idle:
            LOG.warning("step %d: %s", record["step"], warning)
        progress(record)

    folder = RunFolder(config)
    with folder.lock():
        recorded.check(folder)
        mirror.pull(folder)
        if folder.finished():
            mirror.claim(folder)
            result = export.result(config, resumed_from=config.train.steps)
            last = checkpoint.newest(folder.checkpoints)
            if last and (edited := publish.trained_on_other_data(config, last.facts["samples"])):
                result["warnings"].append(edited)
        else:
            model = resolve(config.model, parts=TRAINING_PARTS)
            preflight.check(config, model, parts=TRAINING_PARTS)  # refuses what could only fail,
            data = TrainingData(config, model)  # and what is not cached, before anything is started
            preflight.writable(config)
            recorded.write(folder)
            publish.keep(config)
            mirror.claim(folder)
            found = checkpoint.newest(folder.checkpoints)
            start = found.step if found else 0
            with leases.held(config, "train", publish.named_by(config, data.index)):
                if found is None or found.step < config.train.steps:
                    if idle:
                        LOG.warning("%s", idle)
                    _fit_and_leave(config, model, folder, heard)
                result = export.export(config, model, resumed_from=start)
        mirror.push(folder)
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
    if (there := cluster.gpus()) and there < fewest:
        raise SetupError(f"cluster.workers={config.cluster.workers}, and the cluster has {there} GPUs: use that many")
    proof = uuid.uuid4().hex
    (folder.path / PROOF).write_text(proof)
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lasting = {"max_restarts": -1, "max_task_retries": -1}  # what it had not handed on is in metrics.jsonl
    relay = ray.remote(num_cpus=0, scheduling_strategy=here, **lasting)(Relay).remote()  # other nodes may go
    inputs = {"config": config.model_dump(mode="json", by_alias=True), "proof": proof, "relay": relay}
    inputs |= {"commit": model.commit, "transformer": model.likeness("transformer")}
    try:
        for attempt in itertools.count():
            if _watched(_trainer(config, folder, inputs, f"{config.run}-{proof[:8]}-{attempt}"), relay, progress):
                return
    finally:
        shutil.rmtree(folder.path / RAY_STATE, ignore_errors=True)


def _trainer(config: Config, folder: RunFolder, inputs: dict[str, Any], name: str) -> TorchTrainer:
    workers, fewest = config.cluster.workers, config.cluster.min_workers
    return TorchTrainer(
        _worker,
        train_loop_config=inputs,
        torch_config=notice.Heeding(),
        scaling_config=ScalingConfig(
            num_workers=workers if fewest is None else (fewest, workers),
            elastic_resize_monitor_interval_s=REGROW_S,
            use_gpu=cluster.gpus() > 0,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if cluster.gpus() else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder.path / RAY_STATE),
            failure_config=FailureConfig(max_failures=config.cluster.retries),
        ),
    )


def _watched(trainer: TorchTrainer, relay: Any, progress: Progress) -> bool:
    """Whether the run is done; else a machine was taken away with notice, which counts as no failure."""
    fitting = background.start(trainer.fit, name="fit")
    ended = False
    while not ended:
        ended = bool(wait([fitting], timeout=0.5).done)
        vitals.look()
        records, failed, gone = vitals.get(relay.take.remote(), of="that hears of the progress")
        for record in records:
            progress(record)
    error = fitting.exception()
    if failed:
        raise failed from error
    if isinstance(error, TrainingFailedError | RayTaskError):
        if gone:
            return False
        told = f"training ended: {error}; run the same command again to go on from the last checkpoint"
        raise SetupError(*told.splitlines()) from error
    fitting.result()
    return True


def _worker(inputs: dict[str, Any]) -> None:
    """What every worker runs."""
    from flux2_core.train.loop import run
    from flux2_core.train.trainer import Trainer

    accelerator.let_segments_grow()
    config, relay = parse(inputs["config"]), inputs["relay"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    if not accelerator.is_gpu(device):
        cluster.share_cores(context.get_local_world_size())
    try:
        _see_folders(config, inputs["proof"])
        model = resolve(config.model, parts=TRAINING_PARTS, commit=inputs["commit"])
        same_folder(model, "transformer", inputs["transformer"])
        trainer = Trainer(config, rank=rank, world=world, device=device.type, model=model)
        done = run(trainer, lambda record: relay.put.remote(record) if rank == 0 else None, noticed=notice.noticed)
    except CacheloomError as error:
        ray.get(relay.fail.remote(error))
        if world > 1:  # the others may be waiting in a collective: ending this worker ends them all
            raise
        return
    if not done:  # whoever returns has finished, for Ray: it starts the group again after an error only
        ray.get(relay.go.remote())
        raise RuntimeError(f"{platform.node()} or a peer is going: step {trainer.step} is saved")


def _see_folders(config: Config, proof: str) -> None:
    path = RunFolder(config).path / PROOF
    cluster.see(str(path))
    cluster.see(config.output.cache)
    if path.read_text() != proof:
        raise SetupError(
            f"{platform.node()} has another folder at {path.parent}: output.root must be one that all share"
        )
