"""Preflight: what a configuration and its files decide is refused before anything is started."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flux2_core.config.sections import Config
from flux2_core.embedded.tiny_model import build_klein_model
from flux2_core.errors import CacheloomError, DataError, SetupError, UsageError
from flux2_core.lora import file, targets
from flux2_core.model.folder import ModelFolder, resolve
from flux2_core.placement import planner
from flux2_core.run import recorded
from flux2_core.run.folder import RunFolder
from flux2_core.train import preflight
from tests.in_process import PARTS

Make = Callable[..., Config]


def check(config: Config) -> None:
    preflight.check(config, resolve(config.model, parts=PARTS), parts=PARTS)


def lora(config: Config, folder: Path) -> Path:
    """The file of an adapter with a configuration's targets and rank."""
    linears, weights = planner.sizes(resolve(config.model, parts=PARTS)).linears(), {}
    for name in targets.match(config.lora, list(linears)):
        weights[f"{name}.lora_A.weight"] = torch.ones(config.lora.rank, linears[name][0])
        weights[f"{name}.lora_B.weight"] = torch.ones(linears[name][1], config.lora.rank)
    return file.write(folder, "first", weights, metadata={}, dtype="fp32").diffusers


@pytest.mark.parametrize(
    ("batch_size", "workers", "lost"),
    [
        (5, 4, r"3 of the 8 pictures .* costs 1\.5 of 4 GPUs; train\.batch_size=8 .*, cluster\.workers=1 "),
        (6, 4, r"2 of the 8 pictures .* costs 1 of 4 GPUs; train\.batch_size=8 .*, cluster\.workers=3 "),
        (1, 8, r"7 of the 8 pictures .* costs 7 of 8 GPUs; train\.batch_size=8 .*, cluster\.workers=1 "),
    ],
)
def test_fillers_are_counted(batch_size: int, workers: int, lost: str) -> None:
    """A batch that does not divide evenly, or is smaller than the workers, is told in GPUs; one that does is not."""
    told = preflight.fillers(batch_size, workers)
    assert told is not None
    assert re.search(rf"train\.batch_size={batch_size} over {workers} workers: {lost}", told)
    assert [preflight.fillers(workers * share, workers) for share in (1, 3)] == [None, None]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"train": {"warmup_steps": 5}}, r"train\.warmup_steps=5 and train\.steps=4: .*fewer warm-up steps"),
        ({"train": {"optimizer": "prodigy"}}, r"train\.learning_rate=0\.001: prodigy .*set train\.learning_rate=1$"),
        ({"validate": {"prompts": ["a dog", "[triger]"]}}, r"validate\.prompts\.1: \[triger\] .*mean \[trigger\]\?$"),
        ({"validate": {"prompts": ["a [Class]"]}}, r"validate\.prompts\.0: \[Class\] .*mean \[class\]\?$"),
        ({"validate": {"negative": "blurred"}}, r"validate\.negative='blurred'"),
        ({"lora": {"targets": "tyni"}}, r"lora\.targets='tyni': no such preset"),
    ],
)
def test_settings_that_learn_nothing(make_config: Make, sections: dict[str, Any], words: str) -> None:
    """Settings that exclude each other or the model are refused by their keys, with what to set."""
    with pytest.raises(UsageError, match=words):
        check(make_config(**sections))


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"train": {"warmup_steps": 4}},
        {"train": {"optimizer": "prodigy", "learning_rate": 0.5}},
        {"validate": {"prompts": ["a [trigger] of [glass], [INST] [x] [a b]", "[name]"]}},
    ],
)
def test_settings_that_learn(make_config: Make, sections: dict[str, Any]) -> None:
    """A warm-up as long as the run, prodigy at a rate of its own, and brackets that are like no placeholder pass."""
    check(make_config(**sections))


def test_klein_too(make_config: Make, tmp_path: Path) -> None:
    """A model of the other family passes; guidance without a negative prompt, which means nothing to it, does not."""
    klein = {"path": str(build_klein_model(tmp_path))}
    check(make_config(model=klein))
    with pytest.raises(UsageError, match=r"validate\.guidance=4 and validate\.negative=None: klein"):
        check(make_config(model=klein, validate={"guidance": 4}))


def test_a_start_from_another_adapter(make_config: Make, tmp_path: Path) -> None:
    """`lora.init` of the same targets and rank passes; of others it is refused as the trainer does it, at once; and a
    run that was begun needs it no more."""
    made = str(lora(make_config(), tmp_path))
    check(make_config(lora={"init": made}))
    for other, words in (
        ({"rank": 8}, r"lora\.init=.*first\.safetensors: .*shape \[4, \d+\], lora\.rank asks for \[8, "),
        ({"targets": "tiny"}, r"lora\.init=.*: its modules and lora\.targets differ, for instance in "),
    ):
        with pytest.raises(UsageError, match=words):
            check(make_config(lora={"init": made, **other}))
    absent = make_config(lora={"init": str(tmp_path / "absent.safetensors")})
    with pytest.raises(DataError, match=r"absent\.safetensors: no such file"):
        check(absent)
    recorded.write(RunFolder(absent))
    check(absent)


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def cut_off(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 1)


def lacks_a_linear(path: Path) -> None:
    tensors = load_file(path)
    del tensors["single_transformer_blocks.0.attn.to_out.weight"]
    save_file(tensors, path)


def lacks_what_its_index_names(path: Path) -> None:
    index = {"weight_map": {"absent.weight": path.name, **dict.fromkeys(load_file(path), path.name)}}
    path.with_name("model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("part", "damage", "words"),
    [
        *((part, cut_off, r"not a whole safetensors file") for part in ("text_encoder", "vae", "transformer")),
        ("transformer", lambda path: path.write_bytes(b""), "not a whole safetensors file"),
        ("transformer", lacks_a_linear, r"transformer: the files lack single_transformer_blocks\.0\.attn\.to_out\.w"),
        ("text_encoder", lacks_what_its_index_names, r"no file has absent\.weight, which model\.safetensors\.index"),
    ],
)
def test_weights_that_are_not_whole(
    make_config: Make, model: Path, part: str, damage: Callable[[Path], None], words: str
) -> None:
    """Weights cut off by one byte, an empty file, a Linear that no file holds, a tensor that only the index knows: each
    is named with the way out; a training does not mind the parts that it never loads."""
    config = make_config(model={"path": str(model)})
    check(config)
    damage(next((model / part).glob("*.safetensors")))
    with pytest.raises(SetupError, match=words) as refused:
        check(config)
    assert "download" in str(refused.value)
    if part != "transformer":
        preflight.check(config, resolve(config.model, parts=PARTS), parts=("transformer", "scheduler"))


def before(config: Config) -> None:
    preflight.before_caching(config, resolve(config.model, parts=PARTS), parts=PARTS)


def test_places(make_config: Make, tmp_path: Path) -> None:
    """What is not there, or takes no file, is refused by name before Ray is started; what can be made passes."""
    before(make_config())
    (mine,), absent = make_config().model_dump(mode="json")["data"], str(tmp_path / "absent")
    for other, key in (
        ({"path": absent}, "path"),
        (mine | {"masks": absent}, "masks"),
        (mine | {"references": [mine["path"], absent]}, r"references\.1"),
    ):
        with pytest.raises(DataError, match=rf"data\.1\.{key}='.*absent': no such folder"):
            before(make_config(data=[mine, other]))
    for key in ("root", "cache"):  # /proc takes no file from anybody
        with pytest.raises(SetupError, match=r"^/proc/cacheloom.*: cannot write there .*give write permission"):
            before(make_config(output={key: "/proc/cacheloom"}))


def sound(config: Config, folder: Path) -> Path:
    return lora(config, folder)


def of_another_width(config: Config, folder: Path) -> Path:
    named = {key: torch.ones(4, 99) if "lora_A" in key else t for key, t in load_file(lora(config, folder)).items()}
    save_file(named, folder / "wide.safetensors")
    return folder / "wide.safetensors"


def of_another_depth(config: Config, folder: Path) -> Path:
    named = {"transformer_blocks.9.attn.to_q.lora_A.weight": torch.ones(2, 32)}
    save_file(named | {"transformer_blocks.9.attn.to_q.lora_B.weight": torch.ones(32, 2)}, folder / "deep.safetensors")
    return folder / "deep.safetensors"


def a_picture(config: Config, _folder: Path) -> Path:
    return next(Path(config.data[0].path).glob("*.png"))


def a_vae(config: Config, _folder: Path) -> Path:
    return next(Path(config.model.path, "vae").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("made", "error", "words"),
    [
        (sound, None, ""),
        (of_another_width, UsageError, r"wide\.safetensors: the LoRA is for another model: its .* takes 99 channels"),
        (of_another_depth, UsageError, r"deep\.safetensors: the LoRA adapts transformer_blocks\.9\.attn\.to_q, which"),
        (a_picture, DataError, r"p\d\.png: not a safetensors file .*give the file of a FLUX\.2 LoRA"),
        (a_vae, DataError, r"model\.safetensors: not the file of a FLUX\.2 LoRA: '\w.*': a LoRA has lora_A"),
    ],
)
def test_what_is_drawn_with(
    make_config: Make,
    tmp_path: Path,
    made: Callable[[Config, Path], Path],
    error: type[CacheloomError] | None,
    words: str,
) -> None:
    """A picture, a VAE and the LoRA of another model are refused by the file's name, before Ray is started."""
    config = make_config()
    model: ModelFolder = resolve(config.model, parts=PARTS)
    path = made(config, tmp_path)
    if error is None:
        preflight.adapter(path, model)
        return
    with pytest.raises(error, match=words):
        preflight.adapter(path, model)
