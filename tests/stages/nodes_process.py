"""What test_nodes.py runs in a process of its own, beside the tests' Ray: a cluster of nodes, one of which is lost."""

import json
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster as Nodes

from flux2_core.cache import fingerprints
from flux2_core.cache.keys import text_key
from flux2_core.config.reading import load
from flux2_core.config.sections import Config
from flux2_core.model import text_encoder
from flux2_core.model.folder import resolve
from flux2_core.store.table import Table
from stages import cluster, encode_text

PARTS = ("text_encoder", "tokenizer", "transformer")
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}


class Slow(encode_text.TextWorker):
    """Takes its time over each item, and says where it works."""

    def work(self, texts: list[str]) -> tuple[int, dict[str, str]]:
        node = ray.get_runtime_context().get_node_id()
        with Path(self.config.output.root, f"worked-{node}").open("a") as stream:
            stream.write(f"{len(texts)}\n")
        for _ in range(1200):  # until the other node works too
            if len(list(Path(self.config.output.root).glob("worked-*"))) == 2:
                break
            time.sleep(0.1)
        time.sleep(0.5)
        done = super().work(texts)
        self.writer._commit_rows = 4  # a batch of 8
        return done


def show(path: Path, out: Path) -> None:
    """Write as JSON what came of it."""
    out.write_text(json.dumps(main(load(path, []))))


def main(config: Config) -> dict[str, object]:
    """Encode 28 texts on two nodes, of which one is lost after its first item."""
    text_encoder.TOKEN_BUDGET = 4 * config.text.max_length
    encode_text.TextWorker = Slow
    nodes = Nodes(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    workers = [nodes.add_node(**NODE) for _ in range(2)]
    try:
        with cluster.connect(config.cluster.model_copy(update={"address": nodes.address})):
            return encode(config, nodes, workers)
    finally:
        nodes.shutdown()


def encode(config: Config, nodes: Nodes, workers: list) -> dict[str, object]:
    model = resolve(config.model, parts=PARTS)
    texts = [f"text number {number}" for number in range(28)]
    root = Path(config.output.root)

    def lose() -> None:
        while len(list(root.glob("worked-*"))) < 2:
            time.sleep(0.05)
        nodes.remove_node(workers[0], allow_graceful=False)

    losing = threading.Thread(target=lose, daemon=True)
    losing.start()
    filled = encode_text.encode(config, model, texts)
    losing.join(60)
    keys = list(Table.open(filled.table.uri).keys())
    wanted = {text_key(fingerprints.text_fingerprint(model, config), text) for text in texts}
    worked = {path.name: sum(map(int, path.read_text().split())) for path in root.glob("worked-*")}
    return {
        "encoded": filled.encoded,
        "once": len(keys) == len(set(keys)),
        "missing": len(wanted - set(keys)),
        "tried": sum(worked.values()),
        "nodes": len(worked),
        "alive": alive_after_loss(),
    }


def alive_after_loss() -> int:
    """Nodes that live, once Ray has noticed the loss."""
    for _ in range(600):
        if (alive := sum(node["Alive"] for node in ray.nodes())) < 3:
            break
        time.sleep(0.1)
    return alive
