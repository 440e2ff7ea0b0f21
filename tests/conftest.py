"""Fixtures that every test file may use: a small random model, pictures, and a configuration over both."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "token")  # before anything imports ray
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's own 15 its workers starve beside the tests' other process
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from xdist.scheduler import LoadScopeScheduling

from flux2_core.config.reading import parse
from flux2_core.config.sections import Config
from flux2_core.embedded.tiny_model import build_model
from tests.costs import Costs

ROOT = Path(__file__).parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Have every session tell what its tests cost, and fail where a budget is passed."""
    config.pluginmanager.register(Costs())
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job: what it starts would be deaf too
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _shares(path: Path) -> bool:
    """Whether a file's tests use the tests' own Ray or Prefect server."""
    text = path.read_text(encoding="utf-8")
    return "ray_runtime" in text or "prefect_server" in text


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that use the tests' own servers first, those that start others next."""
    shared = {path: _shares(path) for path in {item.path for item in items}}
    items.sort(key=lambda item: (not shared[item.path], "flux2_core" in item.path.parts[-4:]))


class ByFile(LoadScopeScheduling):
    """Processes share the tests file by file, and of each folder one gets all files that use the tests' own servers.

    Of xdist 3.8 `--dist loadgroup` would say that, but under pytest 9 it deals out single tests, whatever their group.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return str(Path(file).parent) if _shares(ROOT / file) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> ByFile:
    """The scheduler of `make test`."""
    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums come out in one order, so that bits can be compared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small random model of FLUX.2's structure."""
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six noise pictures of two shapes with captions."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for place in range(6):
        shape = (64, 64, 3) if place % 3 else (96, 64, 3)
        Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(folder / f"p{place}.png")
        (folder / f"p{place}.txt").write_text(f"a photo of [trigger] number {place}")
    return folder


@pytest.fixture
def make_config(tiny_model: Path, photos: Path, tmp_path: Path) -> Callable[..., Config]:
    """Build a configuration over the tiny model: `make_config(train={"steps": 3})`."""

    def make(**sections: Any) -> Config:
        tree: dict[str, Any] = {
            "run": "test",
            "model": {"path": str(tiny_model)},
            "data": [{"path": str(photos), "trigger": "sks", "resolutions": [64]}],
            "text": {"dtype": "fp32", "max_length": 96},
            "latents": {"dtype": "fp32"},
            "lora": {"rank": 4},
            "train": {"steps": 4, "batch_size": 2, "learning_rate": 1e-3},
            "validate": {"every": 0, "steps": 2},
            "output": {"root": str(tmp_path / "runs"), "cache": str(tmp_path / "cache"), "save_every": 100},
        }
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values} if isinstance(values, dict) else values
        return parse(tree)

    return make


@pytest.fixture(scope="session")
def ray_runtime() -> Iterator[str]:
    """A real Ray on this machine, with room for two actors of each kind; the address at which commands may join it.

    Started as `ray start` does it, at the machine's own address: one of `stages.embedded` takes nobody in.
    """
    import ray

    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(address="local", num_cpus=4, object_store_memory=100 * 2**20, **quiet)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
