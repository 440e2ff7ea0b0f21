"""Training on a real Ray Train: workers agree, restarts resume, nothing of the encoder is there."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from flux2_core.config.reading import dump_toml
from flux2_core.config.sections import Config
from flux2_core.errors import DataError, UsageError
from flux2_core.model.folder import ModelFolder
from flux2_core.run import checkpoint
from flux2_core.run.folder import RunFolder
from flux2_core.train import preflight
from flux2_core.train.loop import run
from flux2_core.train.trainer import Trainer
from stages import group, train
from stages.relay import Relay
from tests.in_process import fill_cache, process_group

Make = Callable[..., Config]
REPOSITORY = Path(__file__).parents[2]


def losses(config: Config) -> list[float]:
    lines = RunFolder(config).metrics.read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.ray
def test_two_workers_equal_one(ray_runtime: str, make_config: Make, tmp_path: Path) -> None:
    """20 steps on 2 FSDP workers equal 20 steps on 1 at the same batch: loss within 1e-5, adapter within 1e-4."""
    steps = {"steps": 20, "batch_size": 4}
    validate = {"every": 10, "prompts": ["a [trigger]", "b", "c"], "steps": 2}
    one = make_config(run="one", train=steps, validate=validate)
    two = make_config(run="two", train=steps, validate=validate, cluster={"workers": 2})
    fill_cache(one)
    with process_group(tmp_path):
        trainer = Trainer(one)
        run(trainer, lambda record: None)
    result = train.train(two)
    assert result["resumed_from"] == 0
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    last = checkpoint.newest(RunFolder(two).checkpoints)
    assert last is not None
    assert last.step == 20
    for name, weight in trainer.weights().items():
        assert (weight - last.adapter[name]).abs().max() <= 1e-4, name
        if name.endswith("lora_B.weight"):
            assert weight.abs().max() > 0, "nothing was learned: the comparison would show nothing"
    assert [Path(path).name for path in result["previews"]] == [f"step-{n:06d}.png" for n in (0, 10, 20)]
    tiles = [sorted(p.name for p in (RunFolder(c).previews / "tiles" / "step-000020").iterdir()) for c in (one, two)]
    assert tiles[0] == tiles[1] == ["000.png", "001.png", "002.png"]


def test_finished_run_does_nothing(make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` on a run whose steps are done starts no worker, and returns the same files each time; another
    configuration is refused, and so is a run that another process holds."""
    monkeypatch.setattr(train, "_fit", lambda *_: pytest.fail("a finished run was trained again"))
    config = make_config(train={"steps": 2})
    fill_cache(config)
    with process_group(tmp_path):
        run(Trainer(config), lambda record: None)
    first, again = train.train(config), train.train(config)
    assert again["lora"] == first["lora"]
    assert again["resumed_from"] == 2
    with pytest.raises(UsageError, match=r"lora\.rank was 4, is 8"):
        train.train(make_config(train={"steps": 2}, lora={"rank": 8}))
    with RunFolder(config).lock(), pytest.raises(UsageError, match="another process is working"):
        train.train(config)


def test_fillers_are_told_before_anything_starts(
    make_config: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What fillers cost is a warning before a worker is asked for; the first step, which records it, tells it no second
    time. A group that has shrunk has a warning of its own."""
    config = make_config(train={"steps": 2, "batch_size": 3}, cluster={"workers": 2})
    fill_cache(config)

    def fit(_config: Config, _model: ModelFolder, _folder: RunFolder, progress: train.Progress) -> None:
        assert len(caplog.messages) == 1
        for step, workers in ((1, 2), (2, 4)):
            progress({"step": step, "warning": preflight.fillers(3, workers)})
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_fit_and_leave", fit)
    with pytest.raises(KeyboardInterrupt):
        train.train(config)
    first, shrunk = caplog.messages
    assert first.startswith("train.batch_size=3 over 2 workers: 1 of the 4 pictures")
    assert shrunk.startswith("step 2: train.batch_size=3 over 4 workers: 1 of the 4 pictures")


def test_uncached_is_refused_before_anything_starts(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a cache, training is refused with the command that makes it, and leaves no run behind."""
    monkeypatch.setattr(train.cluster, "connect", lambda *_: pytest.fail("Ray was started"))
    config = make_config()
    with pytest.raises(DataError, match="run `cacheloom cache` first"):
        train.train(config)
    assert not (RunFolder(config).path / "config.toml").exists()


def test_memory_is_set_up_before_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """How a card's memory grows is said before a worker reads what it shall do, and so before it asks for any."""
    monkeypatch.setattr(train.accelerator, "let_segments_grow", lambda: pytest.exit("asked"))
    with pytest.raises(pytest.exit.Exception, match="asked"):
        train._worker({}, None)


def test_our_error_in_a_worker_is_raised_here(ray_runtime: None) -> None:
    """What a worker refuses reaches the driver as it was, after the records that were put before it."""
    relay = ray.remote(num_cpus=0)(Relay).remote()
    ray.get([relay.put.remote({"step": 1}), relay.fail.remote(DataError("p0.png: not cached"))])
    seen: list[dict] = []
    with pytest.raises(DataError, match=r"^p0\.png: not cached$"):
        group.watched(SimpleNamespace(fit=lambda: None), relay, seen.append)
    assert seen == [{"step": 1}]


PROBE = """
import json, sys
WATCHED = ["transformers.models.", "flux2_core.", "diffusers.", "ray.", "prefect"]
from flux2_core.config.reading import load
from flux2_core.train.loop import run
from flux2_core.train.trainer import Trainer
import stages.alone, stages.train
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
seen = []
for path in sys.argv[1:]:
    opened.clear()
    run(Trainer(load(path)), lambda record: None)
    modules = [name for name in sys.modules if name.startswith(tuple(WATCHED))]
    seen.append({"modules": modules, "opened": list(opened)})
print(json.dumps(seen))
"""


def test_training_process_holds_no_encoder(make_config: Make, tmp_path: Path) -> None:
    """A training process imports no Mistral or Qwen module, and nothing of Ray Train, Prefect or diffusers' pipelines,
    and opens no file under text_encoder/ or tokenizer/; the VAE is there only where previews are decoded."""
    looks = {"plain": {"every": 0}, "previews": {"prompts": ["a [trigger]"], "every": 2, "steps": 1}}
    files = []
    for name, validate in looks.items():
        config = make_config(run=name, train={"steps": 2}, validate=validate)
        fill_cache(config)
        files.append(tmp_path / f"{name}.toml")
        files[-1].write_text(dump_toml(config))
    done = subprocess.run([sys.executable, "-c", PROBE, *files], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    encoders = (
        "flux2_core.model.text_encoder",
        "transformers.models.mistral",
        "transformers.models.qwen",
        "transformers.models.pixtral",
    )
    idle = (
        "ray.train",
        "ray.data",
        "ray.dashboard",
        "prefect",
        "diffusers.pipelines",
        *encoders,
    )  # 0.7 to 3 CPU-s each
    for name, seen in zip(looks, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert not [module for module in seen["modules"] if module.startswith(idle)]
        assert not [path for path in seen["opened"] if "/text_encoder/" in path or "/tokenizer/" in path]
        assert any("/transformer/" in path for path in seen["opened"]), "the probe saw nothing"
        assert any(path.endswith("vae/config.json") for path in seen["opened"]) == (name == "previews")
