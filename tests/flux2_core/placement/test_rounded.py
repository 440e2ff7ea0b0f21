"""A few-bit base that is kept as it was rounded: the same bytes again, and none of the model's own blocks read."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from flux2_core.config.sections import Config
from flux2_core.errors import SetupError
from flux2_core.model import transformer
from flux2_core.model.folder import resolve
from flux2_core.placement import build
from flux2_core.placement.planner import Placement
from tests.flux2_core.placement.test_build import compare

Make = Callable[..., Config]
CPU = torch.device("cpu")
PARTS = ("transformer",)


def built(config: Config, strategy: str = "ddp") -> dict[str, torch.Tensor]:
    """The frozen weights as a worker has them."""
    model = resolve(config.model, parts=PARTS)
    chosen = Placement(strategy, config.train.precision, "full" if strategy == "stream" else "none")
    made = build.build(build.job(config, model, world=1, device=CPU), chosen, model, device=CPU)
    return {name: value.detach().clone() for name, value in made.named_parameters() if not value.requires_grad}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Weights of the model's own files that are read."""
    seen: list[str] = []
    rows = transformer._read_rows
    monkeypatch.setattr(transformer, "_read_rows", lambda file, key, *more: seen.append(key) or rows(file, key, *more))
    return seen


@pytest.mark.parametrize("precision", ["int8", "int4", "nf4", "fp8-matmul"])
def test_the_second_start_reads_what_was_rounded(
    make_config: Make, tmp_path: Path, precision: str, read: list[str]
) -> None:
    """Weights come back bit for bit, no block is read or rounded again, and what is read is a half or a quarter."""
    place = tmp_path / "kept"
    config = make_config(train={"precision": precision}, cluster={"rounded": str(place)})
    plain = built(make_config(train={"precision": precision}))
    first = built(config)
    read.clear()
    second = built(config, "stream")
    assert not [key for key in read if "transformer_blocks." in key and "norm" not in key]
    for weights in (first, second):
        assert weights.keys() == plain.keys()
        assert all(torch.equal(weights[name].view(torch.uint8), plain[name].view(torch.uint8)) for name in plain)
    files = list(place.rglob("*.safetensors"))
    assert len(files) == sum(name.endswith("payload") for name in plain)
    exact = sum(load_file(file)["payload"].numel() * (2 if precision in ("int4", "nf4") else 1) * 2 for file in files)
    assert sum(file.stat().st_size for file in files) < exact * (0.42 if precision in ("int4", "nf4") else 0.8)


def test_other_weights_have_another_place(make_config: Make, tmp_path: Path, tiny_model: Path) -> None:
    """Another precision, another model at the same path, a LoRA in the base: none is taken for another."""
    place = tmp_path / "kept"
    cluster = {"rounded": str(place)}
    built(make_config(train={"precision": "int8"}, cluster=cluster))
    built(make_config(train={"precision": "int4"}, cluster=cluster))
    assert len({file.parent for file in place.rglob("*.safetensors")}) == 2
    built(make_config(train={"precision": "int8-matmul"}, cluster=cluster))
    assert len({file.parent for file in place.rglob("*.safetensors")}) == 2, "the same bytes as int8's"
    other = tmp_path / "model"
    (other / "transformer").mkdir(parents=True)
    for file in tiny_model.iterdir():
        if file.name != "transformer":
            (other / file.name).symlink_to(file)
    for file in (tiny_model / "transformer").iterdir():
        if file.suffix == ".safetensors":
            save_file({key: weight * 1.5 for key, weight in load_file(file).items()}, other / "transformer" / file.name)
        else:
            (other / "transformer" / file.name).write_bytes(file.read_bytes())
    changed = make_config(train={"precision": "int8"}, cluster=cluster, model={"path": str(other)})
    weights, wanted = built(changed), built(changed.model_copy(update={"cluster": make_config().cluster}))
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
    assert len({file.parent for file in place.rglob("*.safetensors")}) == 3


def test_a_damaged_file_is_named(make_config: Make, tmp_path: Path) -> None:
    """Cut off, or of other shapes: refused with the file and the way out, which works."""
    config = make_config(train={"precision": "int8"}, cluster={"rounded": str(tmp_path / "kept")})
    wanted = built(config)
    file = next(iter(sorted((tmp_path / "kept").rglob("*.safetensors"))))
    whole = file.read_bytes()
    for damage in (lambda: file.write_bytes(whole[:-9]), lambda: save_file(cut(whole), file)):
        damage()
        with pytest.raises(SetupError, match=rf"{file.name}: .*; remove it, it is made again"):
            built(config)
    file.unlink()
    again = built(config)
    assert all(torch.equal(again[name], wanted[name]) for name in wanted)


def cut(whole: bytes) -> dict[str, Any]:
    return {name: tensor[:1].contiguous() for name, tensor in load(whole).items()}


@pytest.mark.slow
def test_each_process_keeps_its_rows(make_config: Make, tmp_path: Path) -> None:
    """Sharded over two processes each keeps and finds its own rows; replicated, one of them writes: the gradients are
    those of one process, the first time and the second."""
    place = tmp_path / "kept"
    make = partial(make_config, output={"root": str(tmp_path / "runs"), "cache": str(tmp_path / "cache")})

    def kept(**sections: Any) -> Config:
        cluster = sections.pop("cluster", {})
        return make(cluster=cluster | {"rounded": str(place)}, **sections)

    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        compare(kept, tmp_path / folder, [("fsdp", "int4"), ("ddp", "int8")], world=2, local=2)
    names = {file.name.split(".")[-2] for file in place.rglob("int4-*/*.safetensors")}
    assert any(not name.startswith("0-") for name in names), "second halves of weights"
