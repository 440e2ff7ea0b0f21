"""The command, in processes of its own: exit codes, fields of `--json`, what is written and what is not.

`make test` runs it warm and has its verbs share one Ray; `make test-all` also runs the installed one, each verb with a
Ray of its own, as tests/flows/test_run.py does for `run`.
"""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Pipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from flows import cli
from flux2_core.config.sections import Latents
from flux2_core.data.pictures.load import load as load_image
from flux2_core.data.pictures.transform import Transform
from flux2_core.data.samples import TRANSFORM
from flux2_core.model.folder import TRAINING_PARTS, resolve
from flux2_core.model.latents import to_model
from flux2_core.run import recorded
from flux2_core.run.folder import RunFolder
from flux2_core.store import parquet
from flux2_core.train.batches import TrainingData
from tests.flows.command import Project
from tests.flows.real_prefect import ROOT
from tests.hostile import HOSTILE, unseen


@pytest.fixture(scope="module", params=["warm", pytest.param("installed", marks=pytest.mark.all_cases)])
def project(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, photos: Path
) -> Project:
    folder = tmp_path_factory.mktemp("project")
    return Project(folder, model=tiny_model, photos=photos, warm=request.param == "warm")


@pytest.fixture(scope="module")
def on_ray(project: Project, ray_runtime: str) -> Project:
    """The project, whose warm commands share the tests' Ray from now on."""
    if project.warm:
        project.join(ray_runtime)
    return project


@pytest.fixture(scope="module")
def cached(on_ray: Project) -> list[dict]:
    """What `cache --json` said the first and the second time."""
    return [on_ray.json("cache"), on_ray.json("cache")]


@pytest.fixture(scope="module")
def trained(project: Project, cached: list[dict]) -> list[dict]:
    """What `train --json` said the first and the second time."""
    return [project.json("train"), project.json("train")]


def test_plan_tells_and_writes_nothing(project: Project, tmp_path: Path) -> None:
    """`plan --json` has the fixed fields and leaves neither a cache nor a run behind."""
    places = (f"output.root={tmp_path / 'runs'}", f"output.cache={tmp_path / 'cache'}")
    found = project.json("plan", *places)
    assert (found["samples"]["kept"], found["samples"]["quarantined"]) == (6, [])
    assert found["samples"]["ids"] == [f"p{n}" for n in range(6)]
    assert found["rows"]["text"] == {"needed": 8, "cached": 0, "missing": 8, "why": {"new": 8}}
    assert found["rows"]["latents"] == {"needed": 6, "cached": 0, "missing": 6, "why": {"new": 6}}
    assert found["bytes"]["latents"] == (4 * 4 * 4 + 2 * 5 * 3) * 128 * 4
    assert found["bytes"]["text"] > 0
    assert list(tmp_path.iterdir()) == []


def test_plan_refuses_and_still_tells(project: Project, photos: Path, tmp_path: Path) -> None:
    """Too many broken pictures: exit 3, the reason in `refused` and on standard error, and the whole object."""
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "p0.png").write_bytes(b"not a picture")
    before = sorted(project.folder.iterdir())
    ran = project.run("plan", f"data.0.path={tmp_path / 'photos'}", "max_quarantined=0.1", "--json")
    assert ran.returncode == 3
    found = json.loads(ran.stdout)
    assert found["samples"]["kept"] == 5
    assert [Path(entry["path"]).name for entry in found["samples"]["quarantined"]] == ["p0.png"]
    assert found["samples"]["quarantined"][0]["reason"] in found["refused"]
    assert found["refused"] in ran.stderr
    assert sorted(project.folder.iterdir()) == before


def test_plan_keeps_a_16_bit_grey_picture(project: Project, tmp_path: Path) -> None:
    """A 16-bit grey PNG, which Pillow opens as `I;16`, is kept by `plan` as every other picture is."""
    levels = np.linspace(0, 65535, 64 * 96, dtype=np.uint16).reshape(64, 96)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    (tmp_path / "grey.txt").write_text("a grey photo of sks")
    assert Image.open(tmp_path / "grey.png").mode == "I;16"
    found = project.json("plan", f"data.0.path={tmp_path}")
    assert found["samples"]["quarantined"] == []
    assert found["samples"]["ids"] == ["grey"]
    assert (found["samples"]["kept"], found["rows"]["latents"]["needed"]) == (1, 1)


def test_hostile_names_are_only_text(project: Project, photos: Path, tmp_path: Path) -> None:
    """R23: file names, captions and a trigger that hold terminal sequences, Markdown or lines of ours come out of
    `plan` as text, whether it ends well or refuses; `--json` has the names as they are."""
    shutil.copytree(photos, tmp_path / "photos")
    names = [text.replace("/", ":").replace("\ud800", "") + ".png" for text in HOSTILE.values()]
    for name, text in zip(names, HOSTILE.values(), strict=True):
        (tmp_path / "photos" / name).write_bytes(b"not a picture")
        (tmp_path / "photos" / "p0.txt").write_text(f"[trigger] {text}", errors="replace")
    place = (f"data.0.path={tmp_path / 'photos'}", f"data.0.trigger={HOSTILE['ansi']}")
    for limit, code in (("0.9", 0), ("0.1", 3)):
        ran = project.run("plan", *place, f"max_quarantined={limit}")
        assert ran.returncode == code, ran.stderr
        assert not unseen(ran.stdout + ran.stderr)
        assert "\\x1b]52;c;aGFja2Vk\\x07" in ran.stdout
        assert not [line for line in (ran.stdout + ran.stderr).splitlines() if line.startswith("cacheloom plan: all")]
    ran = project.run("plan", *place, "max_quarantined=0.9", "--json")
    assert not unseen(ran.stdout)
    assert {Path(entry["path"]).name for entry in json.loads(ran.stdout)["samples"]["quarantined"]} == set(names)
    ran = project.run("plan", f"data.0.{HOSTILE['osc52']}=1", f"model.path={HOSTILE['ansi']}", "--\x1b[2J")
    assert ran.returncode == 2
    assert not unseen(ran.stderr)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["plan", "train.stps=3"], 2, ["train.stps: unknown key", "train.steps?"]),
        (["plan", "trian.steps=3"], 2, ["trian.steps: unknown key", "train.steps?"]),
        (["plan", "data.0.resolutions=[60]"], 2, ["data.0.resolutions: ", "48 and 64"]),
        (["plan", "train.steps=many"], 2, ["train.steps: ", "'many'"]),
        (["plan", "train.steps"], 2, ["'train.steps' is not an override"]),
        (["plan", "--bogus"], 2, ["--bogus"]),
        (["plan", "data.1.path=x"], 2, ["data.1.path"]),
        (["plan", "model.path=/nowhere"], 4, ["/nowhere", "no such folder"]),
        (["plan", "data.0.path=/nowhere"], 3, ["/nowhere"]),
        (["plan", "train.steps=1000000000000"], 2, ["train.steps: ", "999999"]),
        (["plan", "train.warmup_steps=9"], 2, ["train.warmup_steps=9 and train.steps=4"]),
        (["plan", "output.cache=config.toml"], 2, ["output.cache=", "config.toml is a file, and a folder must be"]),
        (["stat", "output.cache=config.toml"], 2, ["output.cache=", "config.toml is a file, and a folder must be"]),
        (["gc", "output.root=config.toml/x"], 2, ["output.root=", "config.toml is a file, and a folder must be"]),
        (["plan", "output.root=s3://bucket/x"], 2, ["output.root=s3://bucket/x: must be a folder", "output.mirror"]),
        (["cache", "output.cache=/proc/x"], 4, ["cache: /proc/x: cannot write there", "give write permission"]),
        (["sample", "--lora", "none", "--out", "/proc/x"], 4, ["sample: /proc/x: cannot write there"]),
        (["show", "p0", "--out", "/proc/x/p0.safetensors"], 4, ["show: /proc/x: cannot write there"]),
        (["sample", "--lora", "config.toml"], 3, ["sample: config.toml: not a safetensors file"]),
        (["sample", "--lora", "none", "--prompt", "a [Name]"], 2, ["[Name]", "did you mean [name]?"]),
        (["run", "output.root=/proc/x"], 4, ["run: /proc/x/tiny: cannot write there"]),
        (["run", "cluster.address=127.0.0.1:9"], 4, ["cluster.address=127.0.0.1:9: Ray does not answer"]),
        (["run", "data.0.path=/nowhere"], 3, ["data.0.path='/nowhere': no such folder"]),
    ],
)
def test_refusals_name_the_key(project: Project, arguments: list[str], code: int, words: list[str]) -> None:
    """A wrong override, model or folder: its exit code, the key as it was given, and the way out; no traceback."""
    ran = project.run(*arguments)
    assert (ran.returncode, ran.stdout) == (code, ""), ran.stderr
    assert "Traceback" not in ran.stderr
    assert "starting" not in ran.stderr, "refused before Ray or Prefect are started"
    for word in words:
        assert word in ran.stderr
    if "resolutions" in arguments[1]:
        assert len(ran.stderr.splitlines()) == 1  # pydantic says twice that the picture set is not right


def test_missing_configuration(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration that is not there: exit 2 and its path."""
    monkeypatch.setattr(project, "file", project.folder / "absent.toml")
    ran = project.run("plan")
    assert ran.returncode == 2
    assert "absent.toml: no such file" in ran.stderr


HANGING = """
import sys, time
from flows import cli
def hangs():
    while True:
        try:
            print("ready", flush=True)
            for _ in range(600):
                time.sleep(0.1)  # a signal that comes just before the sleep does not end it
        except KeyboardInterrupt:
            print("heard", flush=True)
cli.main, cli.GRACE_S = hangs, float(sys.argv[1])
cli.command()
"""


@pytest.mark.parametrize(("grace_s", "again"), [(60.0, True), (0.5, False)])
def test_ctrl_c_ends_what_hangs(grace_s: float, again: bool) -> None:
    """A command that never ends by itself: the second Ctrl-C ends it at once, and the first one after a time."""
    line = [sys.executable, "-c", HANGING, str(grace_s)]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as hanging:
        assert hanging.stdout
        assert hanging.stdout.readline() == "ready\n"
        hanging.send_signal(signal.SIGINT)
        if again:
            assert hanging.stdout.readline() == "heard\n"
            hanging.send_signal(signal.SIGINT)
        assert hanging.wait(30) == 130
        assert hanging.stderr
        assert hanging.stderr.read() == cli.INTERRUPTED


INTERRUPTED_ANYWHERE = """
import os, signal, sys
from flows import cli

def ends(instant, heard=True):
    "Exit code of a command that Ctrl-C reaches at its n-th call or return; with 0 at none: how many there are."
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler if heard else signal.SIG_IGN)
        calls = 0
        def count(frame, event, function):
            nonlocal calls
            calls += 1
            if calls == instant:
                os.kill(os.getpid(), signal.SIGINT)
            if event == "c_call" and function is os._exit and not instant:
                os.write(writing, b"%d" % calls)
        sys.argv = ["cacheloom", "check", "examples/demo.toml"]
        from flows import verbs
        verbs.VERBS["check"] = verbs.VERBS["check"]._replace(function=lambda config: {"checks": []})
        sys.setprofile(count)
        cli.command()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code if instant else int(os.read(reading, 20))

def everywhere(instants):
    last = ends(0)
    return [ends(2 + round(number * (last - 2) / (instants - 1))) for number in range(instants)]

codes = everywhere(3)  # nearly all of it is imports
import flows.reaper, flux2_core.config.reading
codes += everywhere(24)
assert set(codes) == {130}, codes
assert ends(ends(0) // 2, heard=False) == 0, "a background job was ended"
"""


def test_ctrl_c_leaves_no_traceback_at_any_instant() -> None:
    """Wherever Ctrl-C meets the command, from its handler's setting through imports to its exit: code 130, one line;
    but a background job of a script, which is started deaf to it, stays so."""
    ran = subprocess.run([sys.executable, "-c", INTERRUPTED_ANYWHERE], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == cli.INTERRUPTED * (3 + 24)


def test_training_is_refused_before_caching(project: Project) -> None:
    """`train` without a cache: exit 3, with the command that makes it."""
    ran = project.run("train", "output.cache=empty", "run=never", "--json")
    assert (ran.returncode, ran.stdout) == (3, "")
    assert "run `cacheloom cache` first" in ran.stderr


@pytest.mark.ray
def test_another_token_is_refused(project: Project, ray_runtime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that is joined with another token than its own ends the command in seconds; Ray would try 20 times."""
    monkeypatch.setitem(project.environment, "RAY_AUTH_TOKEN", "0" * 64)
    began = time.monotonic()
    ran = project.run("cache", f"cluster.address={ray_runtime}")
    assert (ran.returncode, ran.stdout) == (4, ""), ran.stderr
    assert f"cluster.address={ray_runtime}: Ray does not answer" in ran.stderr
    assert "RAY_AUTH_TOKEN_PATH" in ran.stderr.splitlines()[-1]
    assert "Traceback" not in ran.stderr
    assert time.monotonic() - began < 45  # 5 s where nothing else runs


@pytest.mark.ray
def test_cache_encodes_once(project: Project, cached: list[dict]) -> None:
    """The first `cache` encodes every row, the second reuses every row; `stat` and `plan` agree."""
    first, second = cached
    for name, rows in (("text", 8), ("latents", 6)):
        assert (first[name]["encoded"], first[name]["reused"]) == (rows, 0)
        assert (second[name]["encoded"], second[name]["reused"]) == (0, rows)
    assert first["samples"]["quarantined"] == []
    held = project.json("stat")
    assert held["samples"] == 6
    assert (held["text"]["rows"], held["latents"]["rows"]) == (9, 6)  # the pad row is one more
    for name in ("text", "latents"):
        assert held[name]["uri"] == first[name]["uri"]
        assert held[name]["version"] > 0
        assert held[name]["bytes"] > 0
        assert len(held[name]["fingerprint"]) == 64
    assert project.json("plan")["rows"]["text"] == {"needed": 8, "cached": 8, "missing": 0, "why": {}}


@pytest.mark.ray
def test_show_writes_what_training_sees(project: Project, cached: list[dict]) -> None:
    """`show` writes exactly TrainingData's tensors, and they are the pipeline's; unknown samples exit 3."""
    out = project.folder / "p0.safetensors"
    told = project.json("show", "p0", "--out", str(out))
    found = load_file(out)
    assert {name: list(tensor.shape) for name, tensor in found.items()} == {
        name: entry["shape"] for name, entry in told["tensors"].items()
    }
    config = project.config()
    model = resolve(config.model, parts=TRAINING_PARTS)
    data = TrainingData(config, model)
    row = next(row for row in data.train if row["id"] == "p0")
    assert torch.equal(found["latents"], data.latent_rows([row])[0])
    assert torch.equal(found["prompt_embeds"], data.prompt_rows(row["text_keys"][:1])[0])
    assert torch.equal(found["prompt_embeds.null"], data.prompt_rows([data.key("")])[0])
    width = 3 * model.config("text_encoder")["text_config"]["hidden_size"]
    assert found["latents"].shape == (128, row["bucket_height"] // 16, row["bucket_width"] // 16)
    assert found["prompt_embeds"].shape == (64, width)
    assert found["txt_ids"].shape == (64, 4)
    assert found["img_ids"].shape == (found["latents"].shape[1] * found["latents"].shape[2], 4)
    assert "prompt_embeds.preview0" in found
    planned = parquet.read_parquet(data.index.samples).to_pylist()
    _equals_the_pipeline(model.path, next(row for row in planned if row["id"] == "p0"), found)
    ran = project.run("show", "absent", "--out", str(out))
    assert ran.returncode == 3
    assert "p0, p1" in ran.stderr


def _equals_the_pipeline(folder: Path, row: dict, found: dict[str, torch.Tensor]) -> None:
    pipe = Flux2Pipeline.from_pretrained(folder, tokenizer=None, vae=None, torch_dtype=torch.float32)
    pipe.register_modules(
        tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"),
        vae=AutoencoderKLFlux2.from_pretrained(folder / "vae"),
    )
    transform = Transform(**{name: row[name] for name in TRANSFORM})
    stored = load_image(row["uri"], transform, latents=Latents(), sha256=row["sha256"])
    pixels = to_model(torch.from_numpy(stored)[None])
    with torch.no_grad():
        prompt_BLD, txt_ids = pipe.encode_prompt(["a photo of sks number 0"], max_sequence_length=64)
        latents = pipe._encode_vae_image(pixels, generator=torch.Generator())
    assert (found["prompt_embeds"] - prompt_BLD[0]).abs().max() <= 1e-5 * max(1.0, float(prompt_BLD.abs().max()))
    assert torch.equal(found["txt_ids"].float(), txt_ids.float().view(64, 4))
    assert (found["latents"] - latents[0]).abs().max() <= 2e-6 * max(1.0, float(latents.abs().max()))


@pytest.mark.ray
def test_verify_finds_a_flipped_byte(project: Project, cached: list[dict], tmp_path: Path) -> None:
    """`verify` passes on a whole cache, and exits 3 naming the sample once one byte of its latents is flipped."""
    whole = project.json("verify")
    assert (whole["rows"], whole["corrupt"], whole["missing"]) == (15, [], [])
    assert whole["compared"] >= 4 + 4, "some rows of both tables are encoded again"
    copy = tmp_path / "cache"
    shutil.copytree(project.folder / "cache", copy)
    moved = project.json("verify", "--rows", "0", f"output.cache={copy}")
    assert moved == whole | {"compared": 0}, "a cache must stay whole where it is moved to"
    held = load_file(_shown(project, "p3"))["latents"].numpy().tobytes()
    for file in copy.rglob("*"):
        if file.is_file() and (place := (content := bytearray(file.read_bytes())).find(held[:64])) >= 0:
            content[place + 7] ^= 1
            file.write_bytes(content)
            break
    else:
        pytest.fail("the row's bytes are in no file of the cache: the test would plant nothing")
    broken = project.json("verify", f"output.cache={copy}", code=3)
    assert "p3" in [entry["of"] for entry in broken["corrupt"]]
    assert broken["missing"] == []


def _shown(project: Project, sample: str) -> Path:
    out = project.folder / f"{sample}.safetensors"
    project.json("show", sample, "--out", str(out))
    return out


@pytest.mark.ray
def test_train_tells_where_everything_is(project: Project, trained: list[dict]) -> None:
    """`train --json` has the fixed fields, and every file of the run is there; again, it does nothing."""
    first, second = trained
    assert (first["steps"], first["resumed_from"]) == (4, 0)
    assert {name: second[name] for name in ("lora", "previews", "metrics", "steps")} == {
        name: first[name] for name in ("lora", "previews", "metrics", "steps")
    }
    assert second["resumed_from"] == 4
    run = project.folder / "runs" / "tiny"
    assert Path(first["lora"]["diffusers"]) == run / "lora" / "tiny.safetensors"
    assert Path(first["lora"]["comfyui"]) == run / "lora" / "tiny-comfyui.safetensors"
    assert [Path(path).name for path in first["previews"]] == ["step-000000.png", "step-000004.png"]
    steps = [json.loads(line) for line in Path(first["metrics"]).read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert {"step", "loss", "learning_rate", "grad_norm", "seconds"} <= steps[0].keys()
    for name in ("checkpoints", "config.toml", "quarantine.parquet", "report.html", "README.md"):
        assert (run / name).exists(), name
    assert list(run.rglob("events.out.tfevents*"))
    assert parquet.read_parquet(str(run / "quarantine.parquet")).num_rows == 0
    for path in (*first["lora"].values(), *first["previews"]):
        assert Path(path).is_file()


@pytest.mark.ray
def test_sample_draws_with_and_without_the_lora(project: Project, trained: list[dict]) -> None:
    """`sample --prompt` draws with the run's LoRA; `--lora none` draws another picture: the base model's."""
    drawn = {}
    for lora in ([], ["--lora", "none"]):
        out = project.folder / f"samples{len(lora)}"
        told = project.json("sample", "--prompt", "a photo of [trigger]", "--out", str(out), *lora)
        assert [Path(path).parent for path in told["pictures"]] == [out]
        assert Path(told["grid"]).is_file()
        with Image.open(told["pictures"][0]) as picture:
            assert picture.size == (64, 64)
            drawn[len(lora)] = hashlib.sha256(picture.tobytes()).hexdigest()
    assert drawn[0] != drawn[2]
    absent = project.run("sample", "--prompt", "x", "--lora", "absent.safetensors")
    assert absent.returncode == 3
    assert "absent.safetensors: no such LoRA" in absent.stderr


def test_check_sees_weights_that_are_cut_off(project: Project, tmp_path: Path) -> None:
    """`check` and `plan` name a file of the model that ends too early; `check` goes on to the rest."""
    model = Path(shutil.copytree(project.config().model.path, tmp_path / "model"))
    file = next((model / "vae").glob("*.safetensors"))
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    cut = ("run=cut", f"model.path={model}")
    told = project.json("check", *cut, "cluster.address=127.0.0.1:9", code=4)
    named = {entry["name"]: entry for entry in told["checks"]}
    assert f"{file}: not a whole safetensors file" in named["model"]["detail"]
    assert named["cache"]["ok"]
    ran = project.run("plan", *cut)
    assert (ran.returncode, ran.stdout) == (4, "")
    assert ran.stderr.startswith(f"cacheloom plan: {file}: not a whole safetensors file")


def test_plan_sees_that_a_name_is_taken(project: Project) -> None:
    """A run name that another configuration has used is refused with what differs; the same configuration passes."""
    taken = ("run=taken", "train.steps=6")
    recorded.write(RunFolder(project.config(*taken)))
    assert project.run("plan", *taken).returncode == 0
    ran = project.run("plan", *taken, "lora.rank=3")
    assert (ran.returncode, ran.stdout) == (2, "")
    assert "holds a run with another configuration (lora.rank was 2, is 3)" in ran.stderr


@pytest.mark.ray
def test_check_names_each_failure(on_ray: Project) -> None:
    """`check` exits 0 on a sound environment; else 4, naming what lacks, with its fix, and going on to the rest."""
    sound = on_ray.json("check")
    assert sound["ok"]
    told = {entry["name"]: entry["detail"] for entry in sound["checks"]}
    assert {"model", "cache", "output", "memory", "ray"} <= told.keys()
    assert "GB of host memory free; of each card: " in told["memory"]
    lacking = on_ray.json("check", "model.path=/nowhere", "cluster.address=127.0.0.1:9", code=4)
    named = {entry["name"]: entry for entry in lacking["checks"]}
    assert not named["model"]["ok"]
    assert "/nowhere" in named["model"]["detail"]
    assert not named["ray"]["ok"]
    assert "ray start --head" in named["ray"]["detail"]
    assert named["cache"]["ok"]


def test_help_needs_no_model() -> None:
    """The installed command is the environment's own and tells its verbs."""
    ran = subprocess.run([Path(sys.executable).with_name("cacheloom"), "--help"], capture_output=True, text=True)
    assert ran.returncode == 0
    for verb in ("plan", "cache", "train", "run", "sample", "show", "verify", "stat", "check"):
        assert verb in ran.stdout
