"""The flow `cache-and-train`: index, both encoders side by side, training, previews; watched in Prefect's dashboard.

`cacheloom run` calls this very function. Coarse tasks in the flow's own process drive Ray's actors; what is cached is
known from the tables, never from Prefect's results, so a retried or repeated flow run picks up where the last one was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE

from flows import artifacts
from flows.progress import show
from flux2_core import cache, previews
from flux2_core.config import Config
from flux2_core.config_file import load
from flux2_core.model_folder import ModelFolder, resolve
from flux2_core.reaper import guard
from flux2_core.run_folder import RunFolder
from flux2_core.sampleplan import SamplePlan
from stages import cluster, encode_images, encode_text, index
from stages import train as train_stage
from stages.fill import Filled

PARTS = ("text_encoder", "tokenizer", "vae", "transformer", "scheduler")
OPTIONS: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}


@task(name="index", task_run_name="index {config.run}", **OPTIONS)
def index_task(config: Config, model: ModelFolder) -> SamplePlan:
    """Pictures and captions to the samples table."""
    planned = index.build(config, model)
    log = get_run_logger()
    log.info("%d samples, %d quarantined", planned.samples.num_rows, planned.quarantine.num_rows)
    for warning in planned.warnings:
        log.warning("%s", warning)
    if planned.quarantine.num_rows:
        artifacts.table(f"quarantine-{config.run}", planned.quarantine.to_pylist(), description="Left out, and why")
    return planned


@task(name="encode text", **OPTIONS)
def text_task(config: Config, model: ModelFolder, planned: SamplePlan) -> Filled:
    """Captions and prompts to rows of the text table."""
    report = _report(f"text-{config.run}", "Texts encoded", "text")
    return _told(encode_text.encode(config, model, cache.texts(config, planned.samples), progress=report))


@task(name="encode images", **OPTIONS)
def images_task(config: Config, model: ModelFolder, planned: SamplePlan) -> Filled:
    """Pictures to rows of the latents table."""
    report = _report(f"latents-{config.run}", "Pictures encoded", "latents")
    return _told(encode_images.encode(config, model, planned.samples, progress=report))


@task(name="train", **OPTIONS)
def train_task(config: Config) -> dict[str, Any]:
    """The LoRA, from the tables alone."""
    bar = artifacts.Progress(f"train-{config.run}", "Training steps")
    log = get_run_logger()

    def progress(record: dict[str, Any]) -> None:
        bar.update(record["step"], config.train.steps)
        show("train", record["step"], config.train.steps, f"loss {record['loss']:.4f}")
        if record["step"] % max(1, config.train.steps // 20) == 0:
            log.info("step %d of %d: loss %.4f", record["step"], config.train.steps, record["loss"])

    result = train_stage.train(config, progress=progress)
    bar.finish()
    return result


@task(name="previews", **OPTIONS)
def previews_task(config: Config, result: dict[str, Any]) -> None:
    """The last grid and the run's facts as artifacts."""
    folder = RunFolder(config)
    if grids := folder.previews_drawn():
        last = int(grids[-1].stem.removeprefix("step-"))
        shown = previews.small_png(previews.grid_path(folder.previews, last), most_bytes=artifacts.IMAGE_BYTES)
        artifacts.picture(f"previews-{config.run}", shown, alternative=f"previews of {config.run} up to step {last}")
    rows = {
        "LoRA for diffusers": result["lora"]["diffusers"],
        "LoRA for ComfyUI": result["lora"]["comfyui"],
        "Report": result["report"],
        "Steps": result["steps"],
        "Resumed from step": result["resumed_from"],
        **result["facts"],
    }
    artifacts.facts(f"summary-{config.run}", f"LoRA {config.run}", rows, description="What this run made")


@flow(name="cache-and-train", persist_result=False)
def cache_and_train(config: Config | str = "examples/demo.toml", overrides: list[str] | None = None) -> dict[str, Any]:
    """Cache texts and latents, then train a LoRA from them.

    Args:
        config: the configuration itself, or the path of a TOML file on the machine that runs the flow.
        overrides: `section.key=value` on top of a TOML file.
    """
    if isinstance(config, str):
        config = load(config, overrides or [])
    with guard():
        model = resolve(config.model, parts=PARTS)
        RunFolder(config).check()
        with cluster.connect(config.cluster):
            planned = index_task(config, model)
            encoding = text_task.submit(config, model, planned)
            latents = images_task(config, model, planned)
            text = encoding.result()
            index.publish(config, planned, text=text, latents=latents)
            tables = [_row("text", text), _row("latents", latents)]
            artifacts.table(f"cache-{config.run}", tables, description="The cache after this run")
            result = train_task(config)
        previews_task(config, result)
        return result


def run_here(config: Config) -> dict[str, Any]:
    """Run the flow in this process, against Prefect's own embedded server where none is configured."""
    try:
        return cache_and_train(config)
    finally:
        for handler in logging.getLogger("prefect.flow_runs").handlers:
            handler.flush()  # to the embedded server, before it is ended


def _row(name: str, filled: Filled) -> dict[str, Any]:
    return {
        "table": name,
        "encoded now": filled.encoded,
        "reused": filled.reused,
        "uri": filled.table.uri,
        "version": filled.table.version,
    }


def _report(key: str, description: str, name: str) -> Callable[[int, int], None]:
    bar = artifacts.Progress(key, description)

    def report(done: int, total: int) -> None:
        bar.update(done, total)
        show(name, done, total)

    return report


def _told(filled: Filled) -> Filled:
    get_run_logger().info("%s: %d encoded, %d reused", filled.table.uri, filled.encoded, filled.reused)
    return filled
