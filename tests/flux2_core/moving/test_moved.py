"""Configurations as they are written for five other trainers: what they become, and that `plan` accepts it as it is."""

import csv
import json
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flows.verb import read
from flows.verbs import VERBS
from flux2_core.config.reading import load
from flux2_core.embedded.tiny_model import build_klein_model
from flux2_core.errors import UsageError
from flux2_core.moving.moved import move

PEERS = Path(__file__).parents[2] / "peer_configs"
EXAMPLES: dict[str, dict[str, Any]] = {  # some of what each must become, by our keys
    "simpletuner-style/config.json": {
        **{"run": "harbour-style", "output.root": "output", "train.batch_size": 4, "train.guidance": [1, 5]},
        **{"data.0.path": "datasets/harbour", "data.0.repeats": 10, "data.0.crop_aspect": "square"},
        **{"train.warmup_steps": 50, "lora.alpha": 16, "noise.shift": 3, "text.quantize": "int8"},
        "validate.prompts": ["a quay at dusk with fishing boats", "a fish market seen from above"],
    },
    "simpletuner-edit/config.json": {
        **{"model.path": "black-forest-labs/FLUX.2-klein-base-9B", "data.0.references": ["datasets/before"]},
        **{"data.0.masks": "datasets/masks", "data.0.resolutions": [1024], "train.ema": 0.995, "noise.shift": "tokens"},
        **{"data.0.caption": "turn image 1 into a blueprint", "train.learning_rate": 2e-4, "lora.rank": 16},
    },
    "ai-toolkit/character.yaml": {
        **{"run": "mira-v1", "data.0.trigger": "m1ra", "data.0.class_name": "woman", "train.preservation": "dop"},
        **{"train.learning_rate": 1e-4, "train.precision": "fp8", "noise.distribution": "weighted", "lora.alpha": 32},
        **{"loss.differential_guidance": 3, "train.caption_dropout": 0.05, "output.keep": 4, "validate.size": 880},
        "validate.prompts": ["[trigger] a woman in a market", "a portrait of a man"],
    },
    "ai-toolkit/edit.json": {
        **{"data.0.references": ["datasets/before"], "data.1.regularisation": "prior", "data.1.resolutions": [768]},
        **{"loss.contrastive_guidance": [2, 4], "loss.masked_prior": 0.5, "loss.kind": "wavelet"},
        **{"validate.negative": "", "cluster.strategy": "stream", "data.0.caption_edits": [["img", "image"]]},
    },
    "diffsynth/lora.sh": {
        **{"data.0.path": "datasets/tea set", "data.0.caption": "column:prompt", "lora.targets": "all"},
        **{"cluster.workers": 2, "train.batch_size": 2, "noise.shift": 2.2255, "loss.weighting": "bell"},
        **{"run": "tea-set", "output.root": "models/train", "model.path": "black-forest-labs/FLUX.2-dev"},
    },
    "diffsynth/split.sh": {
        **{"data.0.path": "datasets/mug", "model.path": "black-forest-labs/FLUX.2-klein-base-4B", "run": "mug"},
        **{"data.0.resolutions": [880], "output.save_every": 200},
    },
    "diffusers/dev.sh": {
        **{"lora.rank": 8, "lora.alpha": 4, "train.batch_size": 4, "train.warmup_steps": 100, "train.seed": 0},
        **{"data.0.caption": "a photo of sks dog", "data.1.regularisation": True, "data.1.caption": "[class]"},
        **{"train.optimizer": "adamw-8bit", "output.root": "trained", "data.1.path": "datasets/dogs"},
    },
    "diffusers/klein.sh": {
        **{"noise.distribution": "logit-normal", "noise.parameters": [-0.5, 0.8], "lora.targets": "tiny"},
        **{"data.0.path": "data/3d-icon", "data.0.caption": "column:prompt", "train.batch_size": 4},
    },
    "musubi/train.sh": {
        **{"run": "lighthouse", "data.1.resolutions": [768], "data.0.repeats": 2, "noise.shift": "tokens"},
        **{
            "validate.seed": 7,
            "validate.guidance": 3.5,
            "train.precision": "fp8",
            "data.0.references": ["datasets/sketches"],
        },
        "validate.prompts": ["a lighthouse in a storm", "a lighthouse on a postcard"],
    },
    "musubi/train.toml": {
        **{
            "train.optimizer": "prodigy",
            "train.weight_decay": 0.05,
            "noise.parameters": [0, 0.8],
            "noise.range": [0.1, 1.0],
        },
        **{"model.path": "black-forest-labs/FLUX.2-klein-base-4B", "lora.rank": 8},
    },
    "musubi/dataset.toml": {"model.path": "black-forest-labs/FLUX.2-dev", "data.1.path": "datasets/more"},
}


@pytest.fixture(scope="session")
def klein_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model of klein base's structure."""
    return build_klein_model(tmp_path_factory.mktemp("klein-base"))


def at(tree: Any, dotted: str) -> Any:
    """A value in a configuration."""
    for part in dotted.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree[part]
    return tree


def lay_out(tree: dict[str, Any], photos: Path) -> None:
    """The folders that a configuration names, with the pictures that every test has."""
    for data in tree["data"]:
        for folder in (data["path"], *data.get("references", ()), *filter(None, [data.get("masks")])):
            shutil.copytree(photos, folder, dirs_exist_ok=True)
            for caption in Path(folder).glob("*.txt"):
                caption.write_text(f"a picture, the one called {caption.stem}")
        for mask in Path(data.get("masks", "none")).glob("*.png"):
            Image.new("L", Image.open(mask).size, 255).save(mask)
        if data.get("caption", "").startswith("column:"):
            with (Path(data["path"]) / "metadata.csv").open("w") as file:
                rows = csv.writer(file)
                rows.writerow(["image", "prompt"])
                rows.writerows([picture.name, f"picture {n}"] for n, picture in enumerate(photos.glob("*.png")))


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_it_becomes_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, klein_model: Path, photos: Path
) -> None:
    """An example becomes what it means, nothing of it is unknown, and `plan` accepts the file that is written: only the
    model and the sizes are those of the tests."""
    shutil.copytree(PEERS / Path(name).parent, tmp_path / "theirs")
    monkeypatch.chdir(tmp_path)
    asked = read(["import-config", f"theirs/{Path(name).name}", "--out", "my.toml", "--json"], VERBS)
    result = VERBS["import-config"].run(asked)
    written = tomllib.loads(Path("my.toml").read_text())
    assert result["config"] == written
    assert {key: at(written, key) for key in EXAMPLES[name]} == EXAMPLES[name]
    assert result["unknown"] == []
    lay_out(written, photos)
    model = klein_model if "klein" in written["model"]["path"] else tiny_model
    small = [f"data.{place}.resolutions=[64]" for place in range(len(written["data"]))]
    small += ["tread.routes=[]"] if "tread" in written else []  # the model has a block of each kind
    plan = read(["plan", "my.toml", f"model.path={model}", "validate.size=64", *small], VERBS)
    planned = VERBS["plan"].run(plan)
    assert "refused" not in planned, (planned["refused"], planned["samples"]["quarantined"][:2])
    assert planned["samples"]["kept"] == 6 * len(written["data"])


def test_no_option_is_said_twice() -> None:
    """Every option of an example stands in one of three lists, as often as it was given."""
    result = move(str(PEERS / "ai-toolkit" / "character.yaml"))
    told = [e["option"] for kind in ("mapped", "dropped", "unknown") for e in result[kind] if e.get("given", True)]
    assert told.count("train.lr") == 1
    assert told.count("datasets[].resolution") == 1
    assert len(told) == 56


def test_unknown_options_are_named(tmp_path: Path) -> None:
    """AI Toolkit takes `rnak` without a word and trains rank 4; here it is unknown, and the nearest name is said."""
    job = json.loads((PEERS / "ai-toolkit" / "edit.json").read_text())
    job["config"]["process"][0]["network"]["rnak"] = 64
    (tmp_path / "job.json").write_text(json.dumps(job))
    result = move(str(tmp_path / "job.json"))
    assert result["unknown"] == [{"option": "network.rnak", "nearest": "network.rank"}]
    assert any("network.rnak" in line and "network.rank" in line for line in result["toml"])


ARGV = "--pretrained_model_name_or_path m --instance_data_dir d --instance_prompt 'a b' "


@pytest.mark.parametrize(
    ("argv", "key", "value"),
    [
        ("--rank 4 --rank=32 --lora_alpha 8", "lora.rank", 32),
        ("--max_train_s 7", "train.steps", 7),
        ("--lr_scheduler cosine_with_restarts", "train.schedule", "cosine-restarts"),
        ("--instance_prompt sks", "data.0.caption", "[trigger]"),
        (
            "--learning_rate 1e-4 --scale_lr --train_batch_size 2 --gradient_accumulation_steps 4",
            "train.learning_rate",
            8e-4,
        ),
        ("--weighting_scheme cosmap", "loss.weighting", "cosmap"),
        ("--output_dir /data/out/dog/", "output.root", "/data/out"),
        (
            "--lora_layers to_qkv_mlp_proj,nothing",
            "lora.targets",
            ["(single_)?transformer_blocks\\.(.*\\.)?(to_qkv_mlp_proj)"],
        ),
    ],
)
def test_arguments(argv: str, key: str, value: Any) -> None:
    """Beginnings of names and the last of several count as in argparse; values become ours by their rules."""
    assert at(move(ARGV + argv)["config"], key) == value


@pytest.mark.parametrize(
    ("argv", "option", "told"),
    [
        ("--optimizer sgd", "--optimizer", "there are adamw, prodigy"),
        ("--lora_layers q,k", "--lora_layers", "no Linear of FLUX.2"),
        ("--remote_text_encoder", "--remote_text_encoder", "the encoder is never loaded"),
        ("--seed $SEED", "--seed", "the script does not say"),
        ("--rank many", "--rank", "lora.rank: Input should be a valid integer"),
        ("--max_train_steps 5 --num_train_epochs 3", "--num_train_epochs", "its number of steps holds"),
        ("--class_prompt dog", "--class_prompt", "means nothing there without with_prior_preservation"),
        ("--hub_token hf_secret", "--hub_token", "a secret is never in a configuration"),
    ],
)
def test_answers(argv: str, option: str, told: str) -> None:
    """What is not carried over has its reason; what our schema would refuse is not written."""
    (entry,) = [entry for entry in move(ARGV + argv)["dropped"] if entry["option"] == option]
    assert told in entry["reason"]


def test_files_of_another_folder_are_found_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and pictures that are named from the trainer's own folder are looked for beside the configuration."""
    shutil.copytree(PEERS / "simpletuner-style", tmp_path / "trainer" / "config")
    (tmp_path / "trainer" / "datasets" / "harbour").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    found = move("trainer/config/config.json")["config"]["data"][0]["path"]
    assert Path(found).samefile(tmp_path / "trainer" / "datasets" / "harbour")
    (tmp_path / "trainer" / "config" / "multidatabackend.json").unlink()
    with pytest.raises(UsageError, match=r"data_backend_config: config/multidatabackend.json is neither here nor in"):
        move("trainer/config/config.json")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.json", '{"lora": 3}', "of no trainer that is known here"),
        ("a.json", "[1, 2]", "of no trainer that is known here"),
        ("a.yaml", "just words", "of no trainer that is known here"),
        ("a.toml", '[model]\npath = "x"\n[[data]]\npath = "y"\n', "a configuration of cacheloom already"),
        ("a.sh", "ls -l\n", "no command of a known trainer"),
        ("a.sh", "pip install simpletuner\ncd simpletuner\n", "no command of a known trainer"),
        ("a.sh", "simpletuner train", "config/config.json is neither here nor in"),
        ("a.sh", "python run.py missing.yaml", "missing.yaml is neither here nor in"),
        ("a.yaml", "job: extension\nconfig: {name: x}\n", "config.process"),
        ("a.sh", "train_dreambooth_lora_flux2.py --rank 3", "it says no model or no folder of pictures"),
    ],
)
def test_what_is_none_of_them(name: str, text: str, told: str, tmp_path: Path) -> None:
    """A file that is no configuration of any of them is refused with what would be one."""
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=told):
        move(str(tmp_path / name))
    with pytest.raises(UsageError, match="no such file"):
        move(str(tmp_path / "not-there.json"))


def test_scripts_that_name_a_file(tmp_path: Path) -> None:
    """A script that starts AI Toolkit or SimpleTuner with a file of theirs stands for that file."""
    shutil.copytree(PEERS / "ai-toolkit", tmp_path / "config")
    (tmp_path / "go.sh").write_text("cd ai-toolkit && python3 run.py config/character.yaml\n")
    assert move(str(tmp_path / "go.sh"))["config"]["run"] == "mira-v1"
    shutil.copytree(PEERS / "simpletuner-style", tmp_path / "other" / "config")
    (tmp_path / "other" / "go.sh").write_text("simpletuner train\n")
    assert move(str(tmp_path / "other" / "go.sh"))["config"]["run"] == "harbour-style"


def test_nothing_secret_is_written() -> None:
    """A token of theirs is nowhere in the result: neither in the file that is written nor in what is told of it."""
    assert "hf_secret" not in json.dumps(move(f"{ARGV} --hub_token hf_secret"))


def test_what_is_refused_together_is_dropped_alone(tmp_path: Path) -> None:
    """Where two options of theirs do not go together here, one is kept, the other told, and the file can be read."""
    job = json.loads((PEERS / "ai-toolkit" / "edit.json").read_text())
    job["config"]["process"][0]["train"] |= {"unload_text_encoder": True, "ema_config": {"use_ema": True}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    result = move(str(tmp_path / "job.json"))
    (entry,) = [entry for entry in result["dropped"] if entry["option"] == "train.unload_text_encoder"]
    assert "train.trigger_dropout needs a trigger" in entry["reason"]
    (tmp_path / "my.toml").write_text("\n".join(result["toml"]))
    assert load(tmp_path / "my.toml").train.ema == 0.999
