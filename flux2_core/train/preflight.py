"""Preflight: what a configuration and its files decide by themselves is refused here, before anything is started.

`plan` and whatever encodes or trains ask the same functions, so that nothing that `plan` lets pass is refused an hour
later. Of weights the headers are read, of a LoRA all; no model is loaded, and only `writable` writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from flux2_core.config.places import COLUMN
from flux2_core.config.sections import Config
from flux2_core.data import texts
from flux2_core.errors import DataError, SetupError, UsageError
from flux2_core.lora import reading, targets
from flux2_core.model.folder import WEIGHTED, ModelFolder, read_json
from flux2_core.model.sampler import guidance_of
from flux2_core.placement import planner
from flux2_core.run import recorded
from flux2_core.run.folder import RunFolder
from flux2_core.store import objects
from flux2_core.train import optimizers


def before_caching(config: Config, model: ModelFolder, *, parts: Sequence[str]) -> None:
    """Refuse what could only fail after Ray and Prefect have started; what is in the pictures the index finds out.

    Raises:
        UsageError: as `check`.
        DataError: as `check`, or a folder of a data set is not there; names its key.
        SetupError: as `check`, or a folder takes no files.
    """
    check(config, model, parts=parts)
    for place, data in enumerate(config.data):
        beside = {f"references.{number}": each for number, each in enumerate(data.references)}
        for key, path in {"path": data.path, "masks": data.masks, "rejected": data.rejected, **beside}.items():
            if path and not objects.is_remote(path) and not path.startswith(COLUMN) and not os.path.exists(path):
                told = f"data.{place}.{key}={path!r}: no such folder"
                raise DataError(f"{told}; a local folder or s3://bucket/prefix is needed")
    for number, prompt in enumerate(config.validation.prompt):
        for which, path in enumerate(prompt.references):
            if not objects.is_remote(path) and not os.path.isfile(path):
                raise DataError(f"validate.prompt.{number}.references.{which}={path!r}: no such file")
    writable(config)


def check(config: Config, model: ModelFolder, *, parts: Sequence[str]) -> None:
    """Refuse settings that exclude each other or do not fit the files that they name, and weights that are not whole.

    Args:
        config: all of it; `lora.init` counts for a run that was not begun yet, `lora.preset` always.
        model: its folder.
        parts: of the model, those that will be loaded.

    Raises:
        UsageError: settings do not fit each other, the model or the file `lora.init`.
        DataError: `lora.init` is not there, or is no LoRA.
        SetupError: weights of the model are cut off or incomplete.
    """
    optimizers.pace(config.train)
    texts.prompts(config)
    guidance_of(config.validation, model)
    weights(model, parts)
    sizes = planner.sizes(model)
    config.tread.spans(sizes.double + sizes.single)
    linears = sizes.linears()
    targets.ranks(config.lora, targets.match(config.lora, list(linears)))
    held = {name.removesuffix("._data") for name in model.tensor_files("transformer")}  # so quanto names a payload
    if lacking := [name for name in linears if f"{name}.weight" not in held]:
        raise SetupError(f"{model.path / 'transformer'}: the files lack {lacking[0]}.weight; download the model again")
    for path in config.lora.preset:
        adapter(Path(path), model)
    reading.presets(config.lora)
    if config.lora.init and not recorded.begun(RunFolder(config)):
        reading.initial(config.lora, targets.shapes(config.lora, linears))


def weights(model: ModelFolder, parts: Iterable[str]) -> None:
    """See that the weights of some parts are all there: names and sizes by the files' headers, no weight is read.

    Raises:
        SetupError: a file is cut off, or a tensor that the index names is in none; names it.
    """
    for part in WEIGHTED.intersection(parts):
        found = model.tensor_files(part)
        for index in sorted((model.path / part).glob("*.safetensors.index.json")):
            if lacking := sorted(read_json(index).get("weight_map", {}).keys() - found.keys()):
                raise SetupError(
                    f"{model.path / part}: no file has {lacking[0]}, which {index.name} names; download it again"
                )


def adapter(path: Path, model: ModelFolder) -> None:
    """See that a finished LoRA is for this model.

    Raises:
        DataError: it is not the file of a FLUX.2 LoRA.
        UsageError: it is for another model.
    """
    try:
        reading.fits(reading.from_file(path), planner.sizes(model).linears())
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def writable(config: Config) -> None:
    """See that a run's folder and its cache take files, before something works for hours to fill them.

    Raises:
        SetupError: one does not; or an object store is not one that exactly-once commits can rest on.
    """
    for place in (str(RunFolder(config).path), config.output.cache):
        objects.probe(place)


def fillers(batch_size: int, workers: int) -> str | None:
    """What a batch costs that does not divide evenly: every worker computes as many pictures as the one with most."""
    computed = -(-batch_size // workers) * workers
    if computed == batch_size:
        return None
    lost, fewer = computed - batch_size, max(n for n in range(1, workers) if batch_size % n == 0)
    return (
        f"train.batch_size={batch_size} over {workers} workers: {lost} of the {computed} pictures that they compute in "
        f"each step are fillers and thrown away, which costs {lost / computed * workers:.3g} of {workers} GPUs; "
        f"train.batch_size={computed} takes no longer, cluster.workers={fewer} wastes nothing"
    )
