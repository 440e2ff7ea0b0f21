"""`cluster.encoder_resources`: encoders on the nodes that have them, training on the others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flux2_core.config.reading import dump_toml, load
from flux2_core.config.sections import Cluster, Config
from flux2_core.errors import SetupError, UsageError
from stages import cluster
from tests.stages import encoder_nodes
from tests.warm import PROCESSES

Make = Callable[..., Config]
HEAD: dict[str, float] = {}
L40S = {"CPU": 16.0, "GPU": 4.0, "encoder": 3.0, "accelerator_type:L40S": 1.0}
H100 = {"CPU": 96.0, "GPU": 8.0}


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The nodes of a cluster, which a test may change."""
    there = [{"NodeID": str(place), "Resources": has} for place, has in enumerate((HEAD, L40S, H100))]
    monkeypatch.setattr(cluster, "alive", lambda: there)
    return there


def ids(found: list[dict[str, Any]]) -> str:
    return "".join(node["NodeID"] for node in found)


@pytest.mark.parametrize(
    ("asked", "encoding", "training", "encoders"),
    [
        pytest.param(None, "012", "012", 12, id="anywhere"),
        pytest.param({"encoder": 1}, "1", "02", 3, id="as many as there is room for"),
        pytest.param({"encoder": 2}, "1", "02", 1, id="large ones"),
        pytest.param({"accelerator_type:L40S": 0.01}, "1", "02", 4, id="a kind of card"),
    ],
)
def test_which_nodes_do_what(
    nodes: list[dict[str, Any]], asked: dict[str, float] | None, encoding: str, training: str, encoders: int
) -> None:
    """Nodes with what an encoder asks for encode, as many at a time as their GPUs and that allow; the others train."""
    section = Cluster(address="auto", encoder_resources=asked)
    assert ids(cluster.encoding_nodes(section)) == encoding
    assert ids(cluster.training_nodes(section)) == training
    assert cluster.encoders(section) == encoders
    assert cluster.encoding_options(section) == {"num_gpus": 1, "num_cpus": 1, "resources": asked or {}}
    assert cluster.encoders(section.model_copy(update={"encoders": 2})) == 2


def test_encoders_without_a_gpu(nodes: list[dict[str, Any]]) -> None:
    """On marked nodes without a GPU encoders take a core each, though other nodes have GPUs."""
    nodes[1]["Resources"] = {"CPU": 4.0, "encoder": 4.0}
    section = Cluster(address="auto", encoder_resources={"encoder": 1})
    assert cluster.encoding_options(section) == {"num_cpus": 1, "resources": {"encoder": 1}}
    assert cluster.encoders(section) == 1
    assert cluster.gpus(cluster.training_nodes(section)) == 8


def test_what_no_node_has(nodes: list[dict[str, Any]]) -> None:
    """Where no node has it, and where none is left to train on, that is said with the way out."""
    odd = Cluster(address="auto", encoder_resources={"odd": 1})
    with pytest.raises(SetupError, match=r"\{'odd': 1\.0\}: no node .*`ray start --resources='\{\"odd\": 1\.0\}'`"):
        cluster.encoders(odd)
    nodes[2]["Resources"] = L40S
    with pytest.raises(SetupError, match="every node has that, and training goes to the others"):
        cluster.training_nodes(Cluster(address="auto", encoder_resources={"encoder": 1}))


def test_what_is_refused(make_config: Make) -> None:
    """It needs a running cluster, marks nodes by what not each of them has, and asks for more than nothing."""
    for section, said in (
        ({"encoder_resources": {"encoder": 1}}, "encoder_resources names nodes of a running cluster: set cluster.addr"),
        ({"address": "auto", "encoder_resources": {"GPU": 1}}, "asks for GPU, which Ray has on every node"),
        ({"address": "auto", "encoder_resources": {"encoder": 0}}, "greater than 0"),
    ):
        with pytest.raises(UsageError, match=said):
            make_config(cluster=section)


def test_it_is_kept_as_written(make_config: Make, tmp_path: Path) -> None:
    """A resource with a colon in its name comes back from the TOML that a run keeps of its configuration."""
    asked = {"accelerator_type:L40S": 0.01, "encoder": 1.0}
    config = make_config(cluster={"address": "auto", "encoder_resources": asked})
    (tmp_path / "kept.toml").write_text(dump_toml(config))
    assert load(tmp_path / "kept.toml").cluster.encoder_resources == asked


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.all_cases
def test_each_stage_on_its_own_nodes(make_config: Make, tmp_path: Path) -> None:
    """On a cluster of a head, a node marked for encoders and one without the mark, both encoders work on the first and
    both training workers on the second."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "config.toml").write_text(dump_toml(make_config()))
    process = PROCESSES.Process(target=encoder_nodes.show, args=(tmp_path / "config.toml", tmp_path / "told"))
    process.start()
    process.join()
    told = json.loads((tmp_path / "told").read_text())
    assert told == {"text": ["encoding"], "images": ["encoding"], "train": ["training"]}
