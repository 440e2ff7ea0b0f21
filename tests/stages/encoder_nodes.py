"""What test_encoder_nodes.py runs in a process of its own: a cluster with a node for encoders and one for training."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster as Nodes

from flows import verbs
from flux2_core.config.reading import load, overridden
from flux2_core.config.sections import Config
from stages import encode_images, encode_text, train
from stages.relay import Place

NODE = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
WORK = train._worker


def note(root: str, what: str) -> None:
    """Leave a file that says what was done on which node."""
    Path(root, f"{what}-{ray.get_runtime_context().get_node_id()}").touch()


class Text(encode_text.TextWorker):
    """Says where it works."""

    def work(self, texts: list[str]) -> tuple[int, dict[str, str]]:
        note(self.config.output.root, "text")
        return super().work(texts)


class Images(encode_images.ImageWorker):
    """Says where it works."""

    def work(self, rows: list[Any]) -> tuple[int, dict[str, str]]:
        note(self.config.output.root, "images")
        return super().work(rows)


def work(inputs: dict[str, Any], place: Place) -> None:
    """Trains, and says where."""
    note(inputs["config"]["output"]["root"], "train")
    WORK(inputs, place)


def show(path: Path, out: Path) -> None:
    """Write as JSON what came of it."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # a fresh machine has none in ~/.ray
    nodes = Nodes(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    try:
        encoding = nodes.add_node(**NODE, num_cpus=2, resources={"encoder": 2})
        training = nodes.add_node(**NODE, num_cpus=2)
        given = [f"cluster.address={nodes.address}", "cluster.encoder_resources.encoder=1", "cluster.workers=2"]
        where = main(overridden(load(path, []), given))
        names = {encoding.node_id: "encoding", training.node_id: "training"}
        out.write_text(json.dumps({what: sorted(names[node] for node in found) for what, found in where.items()}))
    finally:
        nodes.shutdown()


def main(config: Config) -> dict[str, list[str]]:
    """Cache and train; return on which nodes each kind of work was done."""
    encode_text.TextWorker, encode_images.ImageWorker, train._worker = Text, Images, work
    verbs.cache(config)
    verbs.train(config)
    found: dict[str, list[str]] = {}
    for kind in ("text", "images", "train"):
        found[kind] = [path.name.removeprefix(f"{kind}-") for path in Path(config.output.root).glob(f"{kind}-*")]
    return found
