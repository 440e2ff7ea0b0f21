"""R18: a machine whose model is another one at the same path is refused by name before its first row."""

import json
import platform
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from flux2_core.cache import proofs
from flux2_core.cache.index import read_index
from flux2_core.config.sections import Config
from flux2_core.data.samples import wanted
from flux2_core.errors import SetupError
from flux2_core.model import folder as model_folder
from flux2_core.model.folder import ModelFolder, resolve, same_folder
from flux2_core.plan import survey
from flux2_core.store.table import Table
from stages import cluster, encode_text, train
from stages.encode_images import ImageWorker
from stages.encode_text import TextWorker
from stages.sample import SampleWorker
from tests.in_process import PARTS, fill_cache

Make = Callable[..., Config]
HERE = platform.node()


def changed(file: Path, name: str) -> None:
    """One tensor of a file has another first value."""
    tensors = load_file(file)
    (key,) = [key for key in tensors if key.endswith(name)]
    tensors[key].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def in_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def place(tiny_model: Path, tmp_path: Path) -> Path:
    """The path of a model: a link, which may lead elsewhere on another machine."""
    shutil.copytree(tiny_model, tmp_path / "one")
    (tmp_path / "model").symlink_to(tmp_path / "one")
    return tmp_path / "model"


def elsewhere(place: Path, change: Callable[[Path], None]) -> None:
    """What stands at the path from now on."""
    other = Path(shutil.copytree(place.resolve(), place.with_name("other")))
    change(other)
    place.unlink()
    place.symlink_to(other)


ENCODER, TRANSFORMER = "text_encoder/model.safetensors", "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
CASES: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "encoder": ("text", lambda at: changed(at / ENCODER, "layers.3.mlp.up_proj.weight"), "encoder_files"),
    "tokenizer": ("text", lambda at: in_json(at / "tokenizer/tokenizer_config.json", extra=1), "tokenizer_files"),
    "VAE": ("latents", lambda at: changed(at / VAE, "encoder.conv_in.weight"), "vae_files"),
    "transformer, projected": ("text", lambda at: changed(at / TRANSFORMER, "context_embedder.weight"), "projection"),
    "config": ("text", lambda at: in_json(at / "text_encoder/config.json", tie_word_embeddings=False), "encoder_files"),
}


@pytest.mark.parametrize("case", CASES)
def test_r18_another_file_at_the_same_path(make_config: Make, place: Path, case: str) -> None:
    """R18: a worker that finds another file than the driver did refuses with the field and its machine, and its table
    stays empty.
    """
    kind, change, field = CASES[case]
    config = make_config(model={"path": str(place)}, text={"stored": "projected"})
    model = resolve(config.model, parts=PARTS)
    planned = survey.survey(config, model)
    table = proofs.open_table(config, model, kind, planned.fingerprints[kind])
    tree = cluster.tree(config, model)
    elsewhere(place, change)
    worker: Any = (TextWorker if kind == "text" else ImageWorker)(tree, table.uri)
    item: list[Any] = ["a red square"] if kind == "text" else list(wanted(planned.samples).values())[:1]
    with pytest.raises(SetupError, match=rf"^{HERE}: the model at {place} is not the one .*\({field}: wanted"):
        worker.work(item)
    assert Table.open(table.uri).rows() == 0


def test_r18_a_branch_that_moves_between_two_machines(
    make_config: Make, place: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """R18: the driver finds the commit of a hub's branch once; a worker that starts after the branch moved loads that
    commit, and one that loads the branch's new one all the same is refused.
    """
    commits = {"a" * 40: place.resolve(), "b" * 40: tmp_path / "moved"}
    shutil.copytree(tiny_model, commits["b" * 40])
    changed(commits["b" * 40] / ENCODER, "layers.3.mlp.up_proj.weight")
    branch, asked = ["a" * 40], []

    def snapshot(_name: str, *, revision: str, **_options: Any) -> str:
        asked.append(revision)
        at = tmp_path / "snapshots" / (revision if revision in commits else branch[0])
        if not at.exists():
            at.parent.mkdir(exist_ok=True)
            at.symlink_to(commits[at.name])
        return str(at)

    monkeypatch.setattr(model_folder, "snapshot_download", snapshot)
    config = make_config(model={"path": "owner/name", "revision": "main"})
    model = resolve(config.model, parts=PARTS)
    assert model.commit == "a" * 40
    table = proofs.open_table(config, model, "text", proofs.fingerprint(config, model, "text"))
    branch[0] = "b" * 40
    worker = TextWorker(cluster.tree(config, model), table.uri)
    assert worker.work(["a red square"]) == (1, {})
    worker.close()
    assert set(asked[1:]) == {"a" * 40}
    assert resolve(config.model, parts=("transformer",), commit=model.commit).commit == "a" * 40
    unpinned = TextWorker(config.model_dump(mode="json", by_alias=True), table.uri)
    with pytest.raises(SetupError, match=rf"^{HERE}: the model at .* \(encoder_files: wanted"):
        unpinned.work(["another text"])
    assert Table.open(table.uri).rows() == 2  # the first text and the pad row


def test_r18_there_are_six_cases() -> None:
    """R18 counts 6 cases."""
    assert len(CASES) + 1 == 6


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_what_training_and_drawing_load(make_config: Make, place: Path, part: str) -> None:
    """What has no key of its own, the transformer in training and both models in `sample`, is known again by its
    configuration and by bytes out of all of its files; the same files elsewhere are the same.
    """
    model = resolve(make_config(model={"path": str(place)}).model, parts=(part,))
    known = model.likeness(part)
    elsewhere(place, lambda at: None)
    same_folder(model, part, known)
    file = place / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: value + 1 for name, value in tensors.items()}, file, metadata={"format": "pt"})
    with pytest.raises(SetupError, match=rf"^{HERE}: {place / part} is not what the run was started with"):
        same_folder(model, part, known)
    save_file(tensors, file, metadata={"format": "pt"})
    same_folder(model, part, known)
    in_json(place / part / "config.json", another=1)
    with pytest.raises(SetupError, match="not what the run was started with"):
        same_folder(model, part, known)


def test_sample_refuses_before_it_loads(make_config: Make) -> None:
    """A machine that draws looks at its models before it builds them."""
    config = make_config()
    model = fill_cache(config)
    worker = SampleWorker(cluster.tree(config, model), read_index(config, model).text, None)
    with pytest.raises(SetupError, match=rf"^{HERE}: .*vae is not what"):
        worker.load({"transformer": model.likeness("transformer"), "vae": "another"})
    assert not hasattr(worker, "transformer")


class Elsewhere(encode_text.TextWorker):
    """A worker of a machine that has another model at the path."""

    def __init__(self, tree: dict[str, Any], uri: str) -> None:
        other = tree["model"]["path"] + "-other"
        super().__init__(tree | {"model": tree["model"] | {"path": other}}, uri)


@pytest.mark.ray
def test_the_refusal_reaches_the_driver(
    ray_runtime: None, make_config: Make, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over Ray the error is the worker's own, and no row is written."""
    config = make_config(model={"path": str(place)})
    model = resolve(config.model, parts=PARTS)
    shutil.copytree(place.resolve(), f"{place}-other")
    changed(Path(f"{place}-other") / ENCODER, "layers.3.mlp.up_proj.weight")
    monkeypatch.setattr(encode_text, "TextWorker", Elsewhere)
    of = proofs.fingerprint(config, model, "text")
    with pytest.raises(SetupError, match=rf"^{HERE}: the model at .*-other is not the one .*\(encoder_files: wanted"):
        encode_text.encode(config, model, ["a red square"], fingerprint=of)
    (uri,) = Path(config.output.cache).glob("text/*.lance")
    assert Table.open(str(uri)).rows() == 0


@pytest.mark.ray
def test_a_training_worker_with_another_transformer(
    ray_runtime: None, make_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training worker whose transformer is not the driver's ends the run with the folder and its machine."""
    config = make_config(cluster={"retries": 0})
    model = fill_cache(config)
    monkeypatch.setattr(ModelFolder, "likeness", lambda _self, _part: "that of the driver")  # here, not in the worker
    with pytest.raises(SetupError, match=rf"{HERE}: {model.path / 'transformer'} is not what the run was started with"):
        train.train(config)
