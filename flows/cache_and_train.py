"""The flow `cache-and-train`: index, both encoders side by side, training, previews; watched in Prefect's dashboard.

`cacheloom run` calls this very function. Coarse tasks in the flow's own process drive Ray's actors; what is cached is
known from the tables, never from Prefect's results, so a retried or repeated flow run picks up where the last one was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import httpx
from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import PrefectHTTPStatusError
from prefect.futures import wait
from pydantic import ValidationError

from flows import artifacts, server
from flows.progress import phase, say, show, step
from flows.reaper import guard
from flux2_core.config import targets
from flux2_core.config.reading import absolute, load, overridden
from flux2_core.config.sections import Config
from flux2_core.data import texts
from flux2_core.data.intake import SamplePlan
from flux2_core.errors import CacheloomError, SetupError
from flux2_core.escape import visible
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.output import export
from flux2_core.run import previews, recorded
from flux2_core.run.folder import RunFolder
from flux2_core.train import preflight
from stages import cluster, encode_images, encode_text, index
from stages import train as train_stage
from stages.fill import Filled
from stages.vitals import GO_ON

DEMO = "examples/demo.toml"
PARTS = ("text_encoder", "tokenizer", "vae", "transformer", "scheduler")
LISTED = 100  # of the quarantine in the dashboard; the rest is in the run's quarantine.parquet
OPTIONS: dict[str, Any] = {"cache_policy": NO_CACHE, "persist_result": False}


@task(name="index", task_run_name="1 index pictures and captions", **OPTIONS)
def index_task(config: Config, model: ModelFolder, *, trusting: bool) -> SamplePlan:
    """Pictures and captions to the samples table."""
    report = _report(f"index-{config.run}", "Pictures looked at", "index")
    planned = index.build(config, model, progress=report, trusting=trusting)
    log = get_run_logger()
    log.info("%d samples, %d quarantined", planned.samples.num_rows, planned.quarantine.num_rows)
    for warning in planned.warnings:
        log.warning("%s", visible(warning))
    if left_out := planned.quarantine.num_rows:
        listed = planned.quarantine.select(["path", "reason"]).slice(0, LISTED).to_pylist()
        told = f"{left_out:,} left out, and why" + (f" (the first {LISTED})" if left_out > LISTED else "")
        artifacts.table(f"quarantine-{config.run}", listed, description=told)
    return planned


@task(name="encode text", task_run_name="2 encode text", **OPTIONS)
def text_task(config: Config, model: ModelFolder, planned: SamplePlan) -> Filled:
    """Captions and prompts to rows of the text table."""
    report = _report(f"text-{config.run}", "Texts encoded", "text")
    wanted, of = texts.texts(config, planned.samples), planned.fingerprints["text"]
    return _told(encode_text.encode(config, model, wanted, fingerprint=of, progress=report))


@task(name="encode images", task_run_name="2 encode images", **OPTIONS)
def images_task(config: Config, model: ModelFolder, planned: SamplePlan) -> Filled:
    """Pictures to rows of the latents table."""
    report = _report(f"latents-{config.run}", "Pictures encoded", "latents")
    of = planned.fingerprints["latents"]
    return _told(encode_images.encode(config, model, planned.samples, fingerprint=of, progress=report))


@task(name="train", task_run_name="3 train", **OPTIONS)
def train_task(config: Config) -> dict[str, Any]:
    """The LoRA, from the tables alone."""
    bar = artifacts.Progress(f"train-{config.run}", "Training steps")
    log = get_run_logger()

    def progress(record: dict[str, Any]) -> None:
        bar.update(record["step"], record["of"])
        step(record)
        if record["step"] % max(1, record["of"] // 20) == 0:
            log.info("step %d of %d: loss %.4f", record["step"], record["of"], record["loss"])

    def passing(text: str) -> None:
        phase(text)
        log.info("%s", text)

    result = train_stage.train(config, progress=progress, phase=passing)
    bar.update(1, 1)
    return result


def _summarise(config: Config, result: dict[str, Any]) -> None:
    """The last grid and the run's facts as artifacts of the flow run itself: the first that its page shows."""
    folder = RunFolder(config)
    shown = None
    if grids := folder.previews_drawn():
        shown = previews.small_png(grids[-1], most_bytes=artifacts.IMAGE_BYTES)
        told = "Preview grid: the same noise at each step"
        artifacts.picture(f"previews-{config.run}", shown, description=told)
    resumed = {"Resumed from step": result["resumed_from"]} if 0 < result["resumed_from"] < result["steps"] else {}
    tables = {
        "Training": {**result["facts"], **resumed},
        "Files": {
            "LoRA for diffusers": result["lora"]["diffusers"],
            "LoRA for ComfyUI": result["lora"]["comfyui"],
            "Report": result["report"],
        },
    }
    title = f"LoRA {config.run}"
    artifacts.summary(f"summary-{config.run}", title, tables, png=shown, description="What this run made")


def _name() -> str:
    """The flow run carries the name of the run; a configuration that cannot be read is named by its file."""
    given = runtime.flow_run.parameters
    config, overrides = given["config"], given.get("overrides")
    try:
        named = _read(config if isinstance(config, str) else Config.model_validate(config), overrides)
    except (CacheloomError, ValidationError):
        return visible(f"unreadable configuration {config if isinstance(config, str) else ''}")[:100].rstrip()
    return named.run


def _read(config: Config | str, overrides: list[str] | None) -> Config:
    read = load(config, overrides or []) if isinstance(config, str) else overridden(config, overrides or [])
    return absolute(read)


@flow(name="cache-and-train", flow_run_name=_name, persist_result=False)
def cache_and_train(
    config: Config | str = DEMO, overrides: list[str] | None = None, trust_nothing: bool = False
) -> dict[str, Any]:
    """Cache texts and latents, then train a LoRA from them.

    Args:
        config: the configuration itself, or the path of a TOML file on the machine that runs the flow.
        overrides: `section.key=value` on top of it.
        trust_nothing: read every picture again, those too that the cache knows by size and time.
    """
    config = recorded.settled(_read(config, overrides))
    with guard():
        targets.outputs(config.output)
        recorded.check(RunFolder(config))
        model = _model(config)
        with cluster.connect(config.cluster):
            encoding, told = _cached(config, model, trusting=not trust_nothing)
            if not RunFolder(config).finished():
                say("starting to train")
            result = train_task(config, wait_for=encoding)
        _summarise(config, result)
        return result | {"samples": told["samples"], "warnings": [*told["warnings"], *result["warnings"]]}


@flow(name="cache", flow_run_name=_name, persist_result=False)
def cache(config: Config | str = DEMO, overrides: list[str] | None = None, trust_nothing: bool = False) -> None:
    """The first half, for machines that need not be those which train: they share `output.cache`.

    Args:
        config: the configuration itself, or the path of a TOML file on the machine that runs the flow.
        overrides: `section.key=value` on top of it.
        trust_nothing: read every picture again, those too that the cache knows by size and time.
    """
    config = recorded.settled(_read(config, overrides))
    with guard():
        targets.outputs(config.output)
        model = _model(config)
        with cluster.connect(config.cluster):
            _cached(config, model, trusting=not trust_nothing)


@flow(name="train", flow_run_name=_name, persist_result=False)
def train(config: Config | str = DEMO, overrides: list[str] | None = None) -> dict[str, Any]:
    """The second half, from the cache alone: what is not there is refused.

    Args:
        config: the configuration itself, or the path of a TOML file on the machine that runs the flow.
        overrides: `section.key=value` on top of it.
    """
    config = _read(config, overrides)
    with guard():
        targets.outputs(config.output)
        result = train_task(config)
        _summarise(config, result)
        return result


def _model(config: Config) -> ModelFolder:
    model = resolve(config.model, parts=PARTS)
    preflight.before_caching(config, model, parts=PARTS)
    return model


def _cached(config: Config, model: ModelFolder, *, trusting: bool) -> tuple[list[Any], dict[str, Any]]:
    """The tasks that have encoded all, and what is told of the pictures."""
    planned = index_task(config, model, trusting=trusting)
    encoding = [text_task.submit(config, model, planned), images_task.submit(config, model, planned)]
    wait(encoding)  # where one of them fails, the other one's rows are kept
    text, latents = (future.result() for future in encoding)
    published = index.publish(config, planned, text=text, latents=latents)
    tables = [_row("text", text), _row("latents", latents)]
    artifacts.table(f"cache-{config.run}", tables, description="The cache after this run")
    samples = {"rows": published.rows, "quarantined": export.quarantined(RunFolder(config))}
    return encoding, {"samples": samples, "warnings": planned.warnings}


def run_here(config: Config, *, trust_nothing: bool = False) -> dict[str, Any]:
    """Run the flow in this process, against Prefect's own embedded server where none is configured.

    Raises:
        SetupError: Prefect's server has ended, and that before the LoRA was there.
    """
    server.embed()
    say("starting Ray" if config.cluster.address is None else f"connecting to Ray at {config.cluster.address}")
    try:
        with cluster.connect(config.cluster):
            server.ready()
            return cache_and_train(config, trust_nothing=trust_nothing)
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        if not RunFolder(config := recorded.settled(config)).finished():
            told = f"Prefect's server does not answer any more ({visible(str(error) or type(error).__name__)})"
            raise SetupError(f"{told}; {GO_ON}") from error
        unseen = "Prefect's server ended before the run did: the dashboard does not show its end"
        result = export.result(config, resumed_from=config.train.steps)
        return result | {"warnings": [*result["warnings"], unseen]}
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
