"""Fixtures that every test file may use: a small random model, pictures, and a configuration over both."""

import os

os.environ.setdefault("RAY_AUTH_MODE", "token")  # before anything imports ray
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # at Ray's own 15 its workers starve beside the tests' other process
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_core.config.reading import parse
from flux2_core.config.sections import Cluster, Config
from flux2_core.embedded.tiny_model import build_model
from tests.costs import Costs


def pytest_configure(config: pytest.Config) -> None:
    """Have every session tell what its tests cost, and fail where a budget is passed."""
    config.pluginmanager.register(Costs())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two processes share the tests file by file. One of them gets all files that use the tests' own Ray or Prefect
    server, so that one of each serves them all, and gets them first; those that start others come next."""
    shared = {item.path for item in items if {"ray_runtime", "prefect_server"} & set(getattr(item, "fixturenames", ()))}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("servers" if item.path in shared else str(item.path)))
    items.sort(key=lambda item: (item.path not in shared, "flux2_core" in item.path.parts[-4:]))


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
    """A real Ray on this machine, with room for two actors of each kind; the address at which commands may join it."""
    import ray

    from stages import cluster

    with cluster.connect(Cluster(encoders=2, workers=2)):
        yield ray.get_runtime_context().gcs_address
