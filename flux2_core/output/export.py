"""The end of a run: LoRA files, report and model card from the last checkpoint, and the result that `--json` prints.

Everything is written again from what is on disk, so a run that was killed here only repeats this.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from flux2_core.cache.index import read_index, settings
from flux2_core.config.adapter import LATER
from flux2_core.config.sections import Config
from flux2_core.errors import CacheloomError
from flux2_core.lora import file, reading, targets, whole
from flux2_core.lora.kinds import KINDS
from flux2_core.lora.metadata import Paths, describe
from flux2_core.lora.names import Adapter
from flux2_core.model.folder import ModelFolder
from flux2_core.output import report
from flux2_core.run import checkpoint, metrics
from flux2_core.run.folder import RunFolder
from flux2_core.store import parquet
from flux2_core.store.hashing import digest

EMA = "-ema"  # ends the names of the files with the moving average
PLAIN = "-lora"  # of those with a plain LoRA in the place of another kind
MANY = 4  # times its rank has the plain LoRA in the place of what diffusers does not load, where nothing is said
ERROR = "cacheloom.as_lora_error"


def export(config: Config, model: ModelFolder, *, resumed_from: int) -> dict[str, Any]:
    """Write the LoRA files, `report.html` and the model card; return the result."""
    folder = RunFolder(config)
    last = checkpoint.newest(folder.checkpoints)
    if last is None or last.step != config.train.steps:
        raise CacheloomError(f"{folder.checkpoints}: no checkpoint of step {config.train.steps}; run it again")
    index = read_index(config, model)
    lineage = {
        "version": version("cacheloom"),
        "config_sha256": digest(settings(config) | _learning(config)),
        "samples": index.samples.rsplit("/", 1)[-1].removesuffix(".parquet"),
        "text_fingerprint": digest(index.text.fingerprint),
        "latents_fingerprint": digest(index.latents.fingerprint),
        **({"presets": digest(reading.preset_hashes(config.lora))} if config.lora.preset else {}),
    }
    metadata = describe(config, base=model.published, steps=last.step, lineage=lineage)
    for name, weights in ((config.run + EMA, last.ema), (config.run, last.adapter)):  # the last ones finish the run
        if weights:
            paths = _write(config, model, name, targets.finished(config.lora, weights), metadata)
    facts = summary(config)
    grids = folder.previews_drawn()
    report.write_html(
        folder.path / "report.html",
        config=config,
        metrics=metrics.read(folder.metrics),
        validation=metrics.read(folder.validation),
        grid_png=grids[-1].read_bytes() if grids else None,
        facts=facts | ({"Warnings": "; ".join(told)} if (told := warned(folder)) else {}),
        quarantine=quarantined(folder),
        lora_paths=paths,
    )
    report.write_card(
        folder.path / "README.md",
        config=config,
        family=model.family,
        base=model.published,
        facts=facts,
        lora_paths=paths,
        preview=f"previews/{grids[-1].name}" if grids else None,
        model_folder=model.path,
    )
    return result(config, resumed_from=resumed_from)


def _write(config: Config, model: ModelFolder, name: str, adapter: Adapter, metadata: dict[str, str]) -> Paths:
    """The files of an adapter, and the plain LoRA in the place of what diffusers does not load, or beside it."""

    def base(module: str) -> torch.Tensor:
        from flux2_core.model.transformer import weight  # seconds of imports, for kinds that ask

        return weight(model, module)

    lora, comfyui, native = RunFolder(config).lora, whole.for_comfyui(adapter, base), KINDS[config.lora.kind].diffusers
    if (rank := _plain_rank(config)) is None:
        return file.write(lora, name, adapter, metadata=metadata, comfyui=comfyui)
    plain, error = whole.plain(adapter, rank, base)
    said = metadata | {ERROR: repr(error)}
    if config.output.as_lora:
        file.write(lora, name + PLAIN, plain, metadata=said)
    return file.write(lora, name, adapter if native else plain, metadata=metadata if native else said, comfyui=comfyui)


def _plain_rank(config: Config) -> int | None:
    """Rank of the plain LoRA that is exported too; None: none is."""
    native = KINDS[config.lora.kind].diffusers
    return config.output.as_lora or (None if native else MANY * config.lora.rank)


def _learning(config: Config) -> dict[str, Any]:
    """What decides how is learned from what is cached."""
    own: dict[str, Any] = {"noises": [each.model_dump(mode="json") for each in config.noises]}
    own |= {"priors": [data.regularisation == "prior" for data in config.data]} if config.takes_prior else {}
    drops = [data.drop_references for data in config.data]
    own |= {"drops": drops} if any(drops) else {}
    own |= {"slider": config.slider.model_dump(mode="json")} if config.slider.texts else {}
    own |= config.model_dump(mode="json", include={"lora", "train", "loss"}, exclude={"train": {"epochs"}})
    own["lora"] = {key: value for key, value in own["lora"].items() if value or key not in LATER}
    return own  # epochs say nothing that the steps do not


def result(config: Config, *, resumed_from: int) -> dict[str, Any]:
    """What `train` and `run` print."""
    folder = RunFolder(config)
    diffusers, comfyui = folder.lora_files
    averages = folder.lora / f"{config.run}{EMA}.safetensors", folder.lora / f"{config.run}{EMA}-comfyui.safetensors"
    return {
        "steps": config.train.steps,
        "resumed_from": resumed_from,
        "lora": {"diffusers": str(diffusers), "comfyui": str(comfyui)},
        **({"as_lora": plain} if (plain := plain_lora(config)) else {}),
        **({"ema": {"diffusers": str(averages[0]), "comfyui": str(averages[1])}} if config.train.ema else {}),
        "previews": [str(path) for path in folder.previews_drawn()],
        **({"strengths": str(folder.strengths)} if folder.strengths.is_file() else {}),
        "metrics": str(folder.metrics),
        "report": str(folder.path / "report.html"),
        "run": str(folder.path),
        **({"mirror": folder.mirror} if folder.mirror else {}),
        "warnings": warned(folder),
        "facts": summary(config),
    }


def plain_lora(config: Config) -> dict[str, Any] | None:
    """The plain LoRA that was exported of another kind: its files, its rank, and the share that it leaves out."""
    folder, rank = RunFolder(config), _plain_rank(config)
    found: dict[str, Any] = {"diffusers": str(folder.lora_files[0])}
    if config.output.as_lora:
        found = {"diffusers": str(folder.lora / f"{config.run}{PLAIN}.safetensors")}
        found |= {"comfyui": str(folder.lora / f"{config.run}{PLAIN}-comfyui.safetensors")}
    if rank is None or not Path(found["diffusers"]).is_file():
        return None
    return found | {"rank": rank, "error": float(reading.said(found["diffusers"])[ERROR])}


def summary(config: Config) -> dict[str, str]:
    """The facts of a finished run that a person asks for first."""
    folder = RunFolder(config)
    steps = metrics.read(folder.metrics)
    facts = {
        "Base model": config.model.path,
        "Steps": f"{config.train.steps}, {config.train.batch_size} picture{'s' * (config.train.batch_size > 1)} each",
        "Adapter": f"{config.lora.kind}, rank {config.lora.rank}, targets {config.lora.targets}",
    }
    if plain := plain_lora(config):
        facts["As a plain LoRA"] = (
            f"rank {plain['rank']}, which leaves out {plain['error']:.1%} of the change (Frobenius)"
        )
    if config.trigger:
        facts["Trigger"] = config.trigger
    if folder.strengths.is_file():
        facts["Strengths -2 to 2"] = str(folder.strengths.relative_to(folder.path))
    if steps:
        seconds = sum(record["seconds"] for record in steps)
        tail = [record["loss"] for record in steps[-max(1, len(steps) // 10) :] if record["loss"] is not None]
        facts["Training time"] = f"{seconds:.0f} s"
        facts["Loss, last tenth"] = f"{sum(tail) / max(1, len(tail)):.4f}"
        facts["Waited for data"] = f"{sum(r['data_wait'] * r['seconds'] for r in steps) / max(1e-9, seconds):.1%}"
    looks = metrics.read(folder.validation)
    if losses := [look["loss"] for look in looks if look["loss"] is not None]:
        facts["Validation loss"] = f"{losses[0]:.4f} to {losses[-1]:.4f}"
    if spent := sum(look.get("seconds", 0) for look in looks):  # older ones were not timed
        share = spent / (spent + sum(record["seconds"] for record in steps))
        facts["Validation time"] = f"{spent:.{1 if spent < 10 else 0}f} s, {share:.1%} of training and validation"
    return facts


def warned(folder: RunFolder) -> list[str]:
    """What the steps of a run warned of, each once."""
    return list(dict.fromkeys(step["warning"] for step in metrics.read(folder.metrics) if "warning" in step))


def quarantined(folder: RunFolder) -> list[dict[str, str]]:
    """The pictures that were left out, with reasons."""
    if not folder.quarantine.is_file():
        return []
    return parquet.read_parquet(str(folder.quarantine)).select(["path", "reason"]).to_pylist()
