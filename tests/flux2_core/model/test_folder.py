"""Model folders: families, sizes from files, and errors that say the way out."""

import importlib
import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from flux2_core.config.sections import Model
from flux2_core.embedded.tiny_model import build_klein_model
from flux2_core.errors import SetupError, UsageError
from flux2_core.model import folder as model_folder
from flux2_core.model.families import SYSTEM_MESSAGE
from flux2_core.model.folder import NETWORK, resolve

_http = importlib.import_module(NETWORK.__module__.split(".")[0])  # the hub client's HTTP library
HUB = Model(path="owner/name", revision="abc")


def test_dev(tiny_model: Path) -> None:
    """A dev folder: taps 10/20/30, the system message with its newline, guidance; sizes from its own files."""
    model = resolve(Model(path=str(tiny_model)), parts=("transformer", "vae"))
    assert (model.family.name, model.family.taps, model.family.ragged) == ("dev", (10, 20, 30), True)
    assert model.family.system_message == SYSTEM_MESSAGE
    assert SYSTEM_MESSAGE.count("\n") == 1
    assert (model.text_width, model.inner_width, model.guided) == (96, 32, True)
    assert [file.name for file in model.weight_files("vae")] == ["diffusion_pytorch_model.safetensors"]


def test_klein(tmp_path: Path) -> None:
    """A klein folder: taps 9/18/27, no system message, no guidance, pads not constant."""
    model = resolve(Model(path=str(build_klein_model(tmp_path))), parts=("transformer",))
    assert (model.family.name, model.family.taps, model.family.ragged) == ("klein", (9, 18, 27), False)
    assert model.family.system_message is None
    assert not model.guided


@pytest.mark.parametrize(
    ("sizes", "pipeline", "name"),
    [
        ((48, 8, 48), "Flux2Pipeline", "dev"),
        ((32, 8, 24), "Flux2KleinPipeline", "klein-9b"),
        ((24, 5, 20), "Flux2KleinPipeline", "klein-4b"),
        ((24, 5, 20), "Flux2Pipeline", None),
        ((2, 2, 2), "Flux2Pipeline", None),
    ],
)
def test_published_models(tmp_path: Path, sizes: tuple[int, int, int], pipeline: str, name: str | None) -> None:
    """Sizes say which published model a folder is, whatever it is called; a small one under dev's name is none."""
    config = dict(zip(("num_attention_heads", "num_layers", "num_single_layers"), sizes, strict=True))
    files = {"model_index.json": {"_class_name": pipeline}, "transformer/config.json": config}
    model = resolve(Model(path=str(folder(tmp_path / "FLUX.2-dev", files))), parts=("transformer",))
    assert (model.published and model.published.name) == name


def folder(path: Path, files: dict[str, Any]) -> Path:
    for name, value in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, "model_index.json: missing on .*diffusers' layout"),
        ({"model_index.json": {"_class_name": "FluxPipeline"}}, "_class_name is 'FluxPipeline'; .*Flux2Pipeline"),
        ({"model_index.json": {}}, "_class_name is None"),
        ({"model_index.json": "{"}, "model_index.json: not JSON"),
        ({"model_index.json": []}, "model_index.json: not a JSON object"),
        ({"model_index.json": {"_class_name": "Flux2Pipeline"}}, "transformer: missing on .*whole model"),
    ],
)
def test_folders_that_are_no_model(tmp_path: Path, files: dict[str, Any], wanted: str) -> None:
    """Each refusal names the file, and what should be there."""
    with pytest.raises(SetupError, match=wanted):
        resolve(Model(path=str(folder(tmp_path, files))), parts=("transformer",))


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"vae/config.json": {}}, "no .safetensors file"),
        ({"vae/x.safetensors.index.json": {"weight_map": {"a": "x-00001-of-00002.safetensors"}}}, "x-00001-of-00002.*"
         "named by x.safetensors.index.json and missing"),
        ({"vae/x.safetensors.index.json": {}, "vae/x.safetensors": ""}, "names no file"),
        ({"vae/x-00001-of-00002.safetensors": ""}, "one of several, and their index is missing"),
    ],
)  # fmt: skip
def test_weights_that_are_not_whole(tmp_path: Path, files: dict[str, Any], wanted: str) -> None:
    """A missing shard is named by its path before anything is loaded."""
    files |= {"model_index.json": {"_class_name": "Flux2Pipeline"}}
    with pytest.raises(SetupError, match=wanted):
        resolve(Model(path=str(folder(tmp_path, files))), parts=("vae",)).weight_files("vae")


def test_an_index_decides_which_files_count(tmp_path: Path) -> None:
    """Where an index is, only the files it names are read, each once."""
    names = ["x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"]
    files: dict[str, Any] = {f"vae/{name}": "" for name in [*names, "stray.safetensors"]}
    files["vae/x.safetensors.index.json"] = {"weight_map": {"a": names[1], "b": names[0], "c": names[1]}}
    files["model_index.json"] = {"_class_name": "Flux2Pipeline"}
    model = resolve(Model(path=str(folder(tmp_path, files))), parts=("vae",))
    assert [file.name for file in model.weight_files("vae")] == names


@pytest.mark.parametrize("path", ["/no/such", "./no/such", "nosuch", "a/b/c", "~/no-such-folder"])
def test_paths_that_are_not_there(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be a hub id never reaches the network; the message names the node."""
    monkeypatch.setattr(model_folder, "snapshot_download", lambda *a, **k: pytest.fail("went to the hub"))
    with pytest.raises(SetupError, match=r"no such folder on .*every node"):
        resolve(Model(path=path), parts=("vae",))


class Hub:
    """The hub's client: what is here already, and what a download does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, here: Path | None, download: Path | Exception) -> None:
        self.here, self.download, self.calls = here, download, []
        monkeypatch.setattr(model_folder, "snapshot_download", self.snapshot)
        monkeypatch.setattr(model_folder, "HfApi", lambda: self)
        self.sizes = {"vae/w.safetensors": 10, "text_encoder/w.safetensors": 10**18}

    def snapshot(self, name: str, *, revision: str, allow_patterns: list[str], local_files_only: bool = False) -> str:
        self.calls.append((name, revision, tuple(allow_patterns), local_files_only))
        if local_files_only:
            if self.here is None:
                raise LocalEntryNotFoundError("not here")
            return str(self.here)
        if isinstance(self.download, Exception):
            raise self.download
        return str(self.download)

    def model_info(self, name: str, *, revision: str, files_metadata: bool) -> Any:
        file = namedtuple("file", "rfilename size")
        if isinstance(self.download, Exception):
            raise self.download
        return namedtuple("info", "siblings")([file(*item) for item in self.sizes.items()])


def refused(kind: Any, status: int) -> Exception:
    return kind("refused", response=_http.Response(status, request=_http.Request("GET", "https://hub")))


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (refused(GatedRepoError, 403), "gated: accept its licence at https://huggingface.co/owner/name, .*HF_TOKEN on"),
        (refused(RepositoryNotFoundError, 401), "no such model at .*or it is private .*no folder of that name"),
        (refused(RevisionNotFoundError, 404), "has no model.revision=abc"),
        (_http.ConnectError("Name or service not known"), "cannot be downloaded on .*check the network"),
        (OSError(28, "No space left on device"), "cannot be downloaded on .*No space left"),
    ],
)
def test_hub_refusals(monkeypatch: pytest.MonkeyPatch, error: Exception, wanted: str) -> None:
    """Gated, missing, no revision, no network, no disk: one clear error each, with the page or the fix."""
    Hub(monkeypatch, here=None, download=error)
    with pytest.raises(SetupError, match=wanted):
        resolve(HUB, parts=("vae",))


def test_disk_is_checked_before_the_download(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    """The disk that the wanted parts take is compared with what is free; other parts do not count."""
    hub = Hub(monkeypatch, here=None, download=tiny_model)
    assert resolve(HUB, parts=("vae",)).path == tiny_model
    with pytest.raises(SetupError, match=r"takes 1000000000\.0 GB .*HF_HOME"):
        resolve(HUB, parts=("text_encoder",))
    assert [call[-1] for call in hub.calls] == [True, False, True]
    assert hub.calls[1][:3] == ("owner/name", "abc", ("model_index.json", "LICENSE*", "vae/*"))


def test_what_is_here_is_not_downloaded(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    """A whole snapshot in the hub's cache is used without asking the hub."""
    hub = Hub(monkeypatch, here=tiny_model, download=RuntimeError("went to the hub"))
    assert resolve(HUB, parts=("vae", "transformer", "tokenizer")).path == tiny_model
    assert len(hub.calls) == 1


@pytest.mark.parametrize("lacks", ["transformer", "transformer/diffusion_pytorch_model.safetensors"])
def test_a_snapshot_that_lacks_a_part_is_completed(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path, lacks: str
) -> None:
    """A snapshot of other parts (made for an encoder), or an interrupted one, is downloaded to the end."""
    here = Path(shutil.copytree(tiny_model, tmp_path / "here"))
    shutil.rmtree(here / lacks) if (here / lacks).is_dir() else (here / lacks).unlink()
    hub = Hub(monkeypatch, here=here, download=tiny_model)
    assert resolve(HUB, parts=("vae", "transformer")).path == tiny_model
    assert len(hub.calls) == 2


def test_an_id_that_the_hub_refuses() -> None:
    """A path with a space looks like a hub id and is none: the message says so."""
    with pytest.raises(SetupError, match="not a hub id"):
        resolve(Model(path="my models/flux two"), parts=("vae",))


@pytest.mark.parametrize(("family", "kind"), [("klein", "Flux2Pipeline"), ("dev", "Flux2KleinPipeline")])
def test_another_family_than_was_said(tmp_path: Path, family: str, kind: str) -> None:
    """`model.family` is checked against the model's own files; both are named where they differ."""
    place = folder(tmp_path, {"model_index.json": {"_class_name": kind}})
    detected = {"Flux2Pipeline": "dev", "Flux2KleinPipeline": "klein"}[kind]
    with pytest.raises(UsageError, match=rf'model.family="{family}", and .* is of the family "{detected}": correct'):
        resolve(Model(path=str(place), family=family), parts=())  # type: ignore[arg-type]
    assert resolve(Model(path=str(place), family=detected), parts=()).family.name == detected  # type: ignore[arg-type]
