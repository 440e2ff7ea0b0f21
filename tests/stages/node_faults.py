"""A run on a Ray cluster of several nodes of this machine, some of which go and come: `node_faults.py CASE CONFIG OUT`.

A process of its own, because a test process has its one Ray already.
"""

import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from flows.reaper import guard
from flux2_core.config.reading import load
from stages import group, train
from tests.stages.faults import faulty

PAUSE_S = {"node killed": 0.1, "node drained": 1.0, "elastic": 1.0}
NOTICE_S = 120.0


def main(case: str, config: str, folder: Path) -> None:
    """Train; at step 4 the node of one worker dies or is drained, and for `elastic` another one comes at step 9."""
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # a fresh machine has none in ~/.ray
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100 * 2**20})
    others = [nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20) for _ in range(2)]
    ray.init(address=nodes.address, log_to_driver=False, logging_level="error")
    train._worker = faulty("nothing", at=-1, folder=folder, pause_s=PAUSE_S[case])
    group.REGROW_S = 2.0
    done: set[str] = set()

    def progress(record: dict[str, Any]) -> None:
        if record["step"] >= 4 and "killed" not in done:
            done.add("killed")
            if case == "node drained":
                drain(busy(others).node_id)
            else:
                nodes.remove_node(busy(others), allow_graceful=False)
        if record["step"] >= 9 and case == "elastic" and "added" not in done:
            done.add("added")
            nodes.add_node(num_cpus=1, object_store_memory=100 * 2**20)

    try:
        train.train(load(config), progress=progress)
    finally:
        ray.shutdown()
        nodes.shutdown()


def drain(node_id: str) -> None:
    """Tell Ray, as a cloud's autoscaler does, that a node will be taken away."""
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, refusal = client.drain_node(node_id, reason, "a fault of the test", int(1e3 * (time.time() + NOTICE_S)))
    assert accepted, refusal


def busy(nodes: list[Any]) -> Any:
    """A node on which a training worker runs."""
    free = ray._private.state.available_resources_per_node()
    return next(node for node in nodes if free.get(node.node_id, {}).get("CPU", 0) < 1)


if __name__ == "__main__":
    with guard():  # the nodes go with this process, however it ends
        main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
