"""A FLUX.2 model on disk: where its folder is, which family it is of, and what its configuration files say.

Sizes always come from the model's own files, so a small model of the same structure works exactly as FLUX.2-dev.
Nothing here imports a model library: training uses it without any chance of touching an encoder.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from flux2_core.config.sections import Model
from flux2_core.errors import SetupError, UsageError
from flux2_core.model.families import DEV, FAMILIES, Family, Published
from flux2_core.store.hashing import digest, sampled

TRAINING_PARTS = ("transformer", "scheduler")
WEIGHTED = frozenset({"text_encoder", "transformer", "vae"})
PROJECTION = "context_embedder.weight"  # of the transformer: what `text.stored = "projected"` takes rows through
SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
NETWORK: type[Exception] = HfHubHTTPError.__mro__[1]  # of the HTTP library that this version of the hub client uses


@dataclass(frozen=True)
class ModelFolder:
    """A model folder in diffusers' layout."""

    path: Path
    family: Family
    commit: str | None = None
    """Of a hub id: which one this is."""

    def config(self, part: str) -> dict[str, Any]:
        """The JSON configuration of a part, `tokenizer` and `scheduler` among them."""
        name = f"{part}_config.json" if part in ("tokenizer", "scheduler") else "config.json"
        return read_json(self.path / part / name)

    @property
    def text_width(self) -> int:
        """Width of a raw prompt row (taps times the encoder's hidden size), as the transformer expects it."""
        return int(self.config("transformer")["joint_attention_dim"])

    @property
    def inner_width(self) -> int:
        """Width of a token inside the transformer."""
        config = self.config("transformer")
        return int(config["num_attention_heads"]) * int(config["attention_head_dim"])

    @property
    def guided(self) -> bool:
        """Whether the model has a guidance embedding."""
        return bool(self.config("transformer").get("guidance_embeds", True))

    @property
    def distilled(self) -> bool:
        """Whether it was distilled to few steps without guidance, as model_index.json of klein says."""
        return bool(read_json(self.path / "model_index.json").get("is_distilled", False))

    @property
    def published(self) -> Published | None:
        """Which published model of its family it is, by its sizes, whatever the folder is called; None: another one."""
        config = self.config("transformer")
        sizes = tuple(config.get(key) for key in ("num_attention_heads", "num_layers", "num_single_layers"))
        return next((one for one in self.family.published if one.sizes == sizes), None)

    def weight_files(self, part: str) -> list[Path]:
        """The safetensors files of a part, sorted; complete by the index file where there is one.

        Raises:
            SetupError: none there, or one that the index names is missing.
        """
        folder = self.path / part
        found = {file.name: file for file in sorted(folder.glob("*.safetensors")) if file.is_file()}  # no pipe, say
        for index in sorted(folder.glob("*.safetensors.index.json")):
            named = sorted(set(read_json(index).get("weight_map", {}).values()))
            if not named:
                raise SetupError(f"{index}: names no file; download the model again")
            if missing := [name for name in named if name not in found]:
                raise SetupError(f"{folder / missing[0]}: named by {index.name} and missing; download the model again")
            return [found[name] for name in named]
        if parts := [name for name in found if SHARD.search(name)]:
            raise SetupError(f"{folder}: {parts[0]} is one of several, and their index is missing; download it again")
        if not found:
            raise SetupError(f"{folder}: no .safetensors file on {platform.node()}; download the model again")
        return list(found.values())

    def likeness(self, part: str) -> str:
        """What a part is known again by on another machine: its configuration, and bytes out of all of its files.

        Reads 256 KB of each file, where its hash would take a minute; for what is trained on, whose rows have no key.
        """
        files = {file.name: sampled(file) for file in self.weight_files(part)}
        return digest([self.config(part), files])

    def tensor_files(self, part: str) -> dict[str, Path]:
        """Which of a part's files holds each tensor: every loader looks here, and fingerprints hash these files.

        Raises:
            SetupError: a file is not a whole safetensors file, or two of them hold a tensor of one name.
        """
        found: dict[str, Path] = {}
        for file in self.weight_files(part):
            try:
                with safe_open(file, framework="numpy") as tensors:
                    names = list(tensors.keys())
            except (SafetensorError, OSError) as error:  # of an empty file nothing can be mapped
                raise SetupError(
                    f"{file}: not a whole safetensors file ({error}) on {platform.node()}; download the model again"
                ) from None
            if twice := [name for name in names if name in found]:
                raise SetupError(
                    f"{found[twice[0]]} and {file.name} both hold {twice[0]}: which one counts cannot be known; remove "
                    "one of the two"
                )
            found |= dict.fromkeys(names, file)
        return found


def same_folder(model: ModelFolder, part: str, driver: str) -> None:
    """See that a part of a model is on this machine what the driver of the run has (`ModelFolder.likeness`).

    Raises:
        SetupError: it is another one; names the part and this machine.
    """
    if model.likeness(part) != driver:
        raise SetupError(
            f"{platform.node()}: {model.path / part} is not what the run was started with: every node needs the same "
            "files there"
        )


def resolve(model: Model, *, parts: Sequence[str], commit: str | None = None) -> ModelFolder:
    """Find a model folder, downloading the named parts of a hub id into the hub's own cache.

    A branch of the hub may move between two machines: the driver finds its commit, and others are given that.

    Raises:
        SetupError: not there, no access, no disk, or not a FLUX.2 model; the message names this node and the way out.
        UsageError: `model.family` says another family than the model's files.
    """
    path, found = Path(model.path).expanduser(), None
    if not path.is_dir():
        path = _download(model if commit is None else model.model_copy(update={"revision": commit}), parts)
        found = path.name  # of a snapshot in the hub's cache
    index = path / "model_index.json"
    if not index.is_file():
        raise SetupError(f"{index}: missing on {platform.node()}; model.path must be a folder in diffusers' layout")
    kind = read_json(index).get("_class_name")
    family = next((family for family in FAMILIES.values() if family.pipeline == kind), None)
    if family is None:
        known = ", ".join(family.pipeline for family in FAMILIES.values())
        raise SetupError(f"{index}: _class_name is {kind!r}; cacheloom trains {known}")
    if model.family not in (None, family.name):
        raise UsageError(
            f'model.family="{model.family}", and the model at {path} is of the family "{family.name}": correct '
            "model.path, or leave model.family out"
        )
    for part in parts:
        if not (path / part).is_dir():
            raise SetupError(f"{path / part}: missing on {platform.node()}; download the whole model")
    return ModelFolder(path, family, found)


def _download(model: Model, parts: Sequence[str]) -> Path:
    name, revision = model.path, model.revision
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise SetupError(
            f"model.path={name}: no such folder on {platform.node()} (and no hub id of the form owner/name either); "
            "every node that works on the run needs it at this path"
        )
    patterns = ["model_index.json", "LICENSE*", *(f"{part}/*" for part in parts)]
    page = f"https://huggingface.co/{name}"
    no_folder = f"(and {platform.node()} has no folder of that name)"
    try:
        there = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=True))
        if _complete(there, parts):
            return there
    except LocalEntryNotFoundError:
        pass  # not all of it is here yet
    except HFValidationError as error:
        raise SetupError(f"model.path={name}: not a hub id {no_folder}: {error}") from None
    try:
        _check_disk(name, revision, parts)
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise SetupError(
            f"{name} is gated: accept its licence at {page}, then set HF_TOKEN on {platform.node()}"
        ) from None
    except RevisionNotFoundError:
        raise SetupError(f"{name}: has no model.revision={revision}; {page}/commits/main lists them") from None
    except RepositoryNotFoundError:
        raise SetupError(
            f"{name}: no such model at {page}, or it is private and HF_TOKEN is not set {no_folder}"
        ) from None
    except (NETWORK, LocalEntryNotFoundError, OSError) as error:
        raise SetupError(
            f"{name}: cannot be downloaded on {platform.node()} ({type(error).__name__}: {error}); "
            "check the network, or download it elsewhere and give its folder as model.path"
        ) from error


def _complete(path: Path, parts: Sequence[str]) -> bool:
    """Whether a snapshot holds these parts: an earlier start may have needed others, or was interrupted."""
    folder = ModelFolder(path, DEV)  # the files of all families are alike
    if not (path / "model_index.json").is_file() or not all((path / part).is_dir() for part in parts):
        return False
    try:
        return all(folder.weight_files(part) for part in parts if part in WEIGHTED)
    except SetupError:  # a file that the index names has not come yet
        return False


def _check_disk(name: str, revision: str | None, parts: Sequence[str]) -> None:
    from huggingface_hub.constants import HF_HUB_CACHE

    files = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or []
    missing = [
        file
        for file in files
        if file.rfilename.split("/")[0] in parts
        and not isinstance(try_to_load_from_cache(name, file.rfilename, revision=revision), str)
    ]
    wanted = sum(file.size or 0 for file in missing)
    place = Path(HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if wanted > free:
        raise SetupError(
            f"{name} takes {wanted / 1e9:.1f} GB and {place} on {platform.node()} has {free / 1e9:.1f} GB free; "
            "point HF_HOME at a larger disk"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a model's folder.

    Raises:
        SetupError: it is not there, or no such object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SetupError(f"{path}: missing on {platform.node()}; download the model again") from None
    except json.JSONDecodeError as error:
        raise SetupError(f"{path}: not JSON ({error}); download the model again") from None
    if not isinstance(value, dict):
        raise SetupError(f"{path}: not a JSON object; download the model again")
    return value
