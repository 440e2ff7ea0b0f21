"""A Ray cluster of several machines on one: a deployment outlives machines, and strangers are refused by name."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.cluster.machines import (
    BIN,
    ROOT,
    START_S,
    Machine,
    Network,
    give_token,
    network,
    ray_head,
    ray_join,
)

pytestmark = [pytest.mark.ray, pytest.mark.prefect, pytest.mark.s3, pytest.mark.slow, pytest.mark.all_cases]
MODEL = ROOT / "flux2_core" / "embedded" / "model"
ENCODER = "text_encoder/model.safetensors"
STEPS, SAVED = 60, 10
PASSWORD = "cacheloom:of these tests"
CONFIG = f"""
run = "far"
[model]
path = "/mnt/model"
[[data]]
path = "/mnt/shared/subject"
trigger = "hoot"
resolutions = [64]
[text]
max_length = 32
[lora]
rank = 4
[train]
steps = {STEPS}
batch_size = 8
[validate]
every = 0
[cluster]
encoders = 2
workers = 2
min_workers = 1
[output]
root = "/mnt/shared/runs"
cache = "s3://BUCKET/cache"
save_every = {SAVED}
"""


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with network(tmp_path_factory.mktemp("cluster")) as made:
        shutil.copytree(ROOT / "examples" / "subject", made.shared / "subject")
        yield made


@pytest.fixture(scope="module")
def stored(net: Network) -> Iterator[dict[str, str]]:
    """What reaches an S3 server on a machine of its own, 30 ms and 20 MB/s away; its bucket is in the configuration."""
    machine = net.machine("store")
    line = machine.line(sys.executable, "-m", "tests.s3_server", machine.address)
    with subprocess.Popen(line, env=machine.environment, stdin=-1, stdout=-1, text=True) as server:
        told = dict(part.split("=", 1) for part in server.stdout.readline().removeprefix("export ").split())
        make = "import os; from tests.s3_server import new_bucket; print(new_bucket(dict(os.environ)))"
        bucket = machine.run(sys.executable, "-c", make, **told).stdout.strip()
        (net.shared / "config.toml").write_text(CONFIG.replace("BUCKET", bucket))
        yield told
        server.stdin.close()


@pytest.fixture(scope="module")
def machine(net: Network, stored: dict[str, str]) -> Callable[[str], Machine]:
    """Starts a machine with the model and the store's keys."""

    def start(name: str) -> Machine:
        made = net.machine(name, **stored)
        shutil.copytree(MODEL, made.own / "model", dirs_exist_ok=True)
        return made

    return start


@pytest.fixture(scope="module")
def token() -> str:
    return secrets.token_hex(32)


@pytest.fixture(scope="module")
def head(machine: Callable[[str], Machine], token: str) -> Machine:
    """The head, with Ray."""
    made = machine("head")
    give_token(made, token)
    ray_head(made)
    return made


@pytest.fixture(scope="module")
def joined(machine: Callable[[str], Machine], token: str, head: Machine) -> Callable[..., Machine]:
    """Starts a machine that joins the head."""

    def join(name: str, **resources: float) -> Machine:
        made = machine(name)
        give_token(made, token)
        ray_join(made, f"{head.address}:6379", cpus=1, **resources)
        return made

    return join


@pytest.fixture(scope="module")
def board(head: Machine, net: Network) -> Callable[..., subprocess.Popen]:
    """Prefect's server behind a password and a worker on the head, everything deployed; starts `prefect` there."""
    url = "http://127.0.0.1:4200/api"
    head.environment |= {
        "PREFECT_HOME": "/mnt/home/prefect",
        "PREFECT_API_URL": url,
        "PREFECT_API_AUTH_STRING": PASSWORD,
        "PREFECT_SERVER_API_AUTH_STRING": PASSWORD,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
    }
    prefect = BIN / "prefect"
    head.start(prefect, "server", "start", "--host", "127.0.0.1", log=net.folder / "server.log")
    knock = f"import urllib.request as u; u.urlopen('{url}/health', timeout=2)"
    until(lambda: head.run(sys.executable, "-c", knock, check=False).returncode == 0, within_s=2 * START_S)
    head.run(prefect, "work-pool", "create", "local", "--type", "process")
    head.run(prefect, "--no-prompt", "deploy", "--all")
    head.start(prefect, "worker", "start", "-p", "local", log=net.folder / "worker.log")
    return lambda *line, log: head.start(prefect, *line, log=log)


def until(happens: Callable[[], Any], *, within_s: float) -> None:
    deadline = time.monotonic() + within_s
    while not happens():
        assert time.monotonic() < deadline, f"not within {within_s} s"
        time.sleep(0.2)


def steps(net: Network, run: str = "far") -> list[int]:
    metrics = net.shared / "runs" / run / "metrics.jsonl"
    lines = metrics.read_text().rpartition("\n")[0].splitlines() if metrics.is_file() else []
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.timeout(1500)
def test_a_deployment_outlives_two_of_its_machines(
    net: Network, head: Machine, joined: Callable[..., Machine], board: Callable[..., subprocess.Popen]
) -> None:
    """`prefect deployment run cache-and-train-cluster` on the head: a machine is lost while it encodes, and another
    one comes for it; a second one is lost while it trains. The run completes by itself, every step there once, the LoRA
    in the folder that all share; no process of it is in another network than its machine's.
    """
    one, two = joined("one"), joined("two")
    log = net.folder / "run.log"
    line = ("deployment", "run", "cache-and-train-cluster", "--watch", "--param", "config=/mnt/shared/config.toml")
    running = board(*line, log=log)
    until(lambda: one.works("ray::TextWorker") or one.works("ray::ImageWorker"), within_s=180)
    one.die()
    three = joined("three")
    until(lambda: running.poll() is not None or len(steps(net)) > SAVED, within_s=400)
    assert two.works("ray::RayTrainWorker"), log.read_text()[-3000:]
    for machine in (head, two, three):
        assert machine.networks() == {os.stat(f"/proc/{machine.pid}/ns/net").st_ino}
    at = len(steps(net))
    assert at < STEPS, "it was done before a machine was lost: raise STEPS"
    two.die()
    assert running.wait(600) == 0, log.read_text()[-3000:] + (net.folder / "worker.log").read_text()[-3000:]
    assert steps(net) == list(range(1, STEPS + 1))
    assert (net.shared / "runs" / "far" / "lora" / "far.safetensors").is_file()
    assert three.works("raylet")


@pytest.mark.timeout(900)
def test_a_machine_with_another_model_is_refused_by_name(
    machine: Callable[[str], Machine], token: str, head: Machine
) -> None:
    """A machine that has another text encoder at the model's path, and one that has none, end `cacheloom cache` with
    their name before a row of text is there; with the right files the same command encodes on it.
    """
    odd = machine("odd")
    right = odd.own / "model" / ENCODER
    kept = right.read_bytes()
    tensors = load_file(right)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, right, metadata={"format": "pt"})
    give_token(odd, token)
    ray_join(odd, f"{head.address}:6379", odd=2)

    def cache() -> subprocess.CompletedProcess:
        given = ("run=odd", "output.cache=/mnt/shared/odd", "cluster.encoder_resources.odd=1", "cluster.encoders=1")
        return head.run(
            *(BIN / "cacheloom", "cache", "/mnt/shared/config.toml", "cluster.address=auto", *given, "--json"),
            check=False,
        )

    other = cache()
    assert other.returncode == 4, other.stderr
    assert "odd: the model at /mnt/model is not the one that the run was planned with (encoder_files" in other.stderr
    place = odd.own / "model"
    hidden = place.with_name("hidden")
    hidden.mkdir()
    for part in list(place.iterdir()):
        part.rename(hidden / part.name)
    lacking = cache()
    assert lacking.returncode == 4, lacking.stderr
    assert "/mnt/model/model_index.json: missing on odd" in lacking.stderr
    for part in list(hidden.iterdir()):
        part.rename(place / part.name)
    right.write_bytes(kept)
    done = cache()
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["text"]["reused"] == 0 < told["text"]["encoded"]


@pytest.mark.timeout(600)
def test_a_machine_without_the_token_is_not_taken_in(machine: Callable[[str], Machine], head: Machine) -> None:
    """`ray start` ends on a machine that has no token, or another one, and says so; so does a command there."""
    stranger, there = machine("stranger"), len(nodes(head))
    address = f"{head.address}:6379"
    assert "no authentication token was found" in ray_join(stranger, address, check=False)
    give_token(stranger, secrets.token_hex(32))
    assert "oken" in ray_join(stranger, address, check=False)
    asked = stranger.run(
        *(BIN / "cacheloom", "check", "/mnt/shared/config.toml", f"cluster.address={address}"), check=False
    )
    assert asked.returncode == 4
    assert f"cluster.address={address}: Ray does not answer" in asked.stdout + asked.stderr
    assert len(nodes(head)) == there
    knock = f"import socket; socket.create_connection(({head.address!r}, 8265), timeout=3)"
    assert "refused" in stranger.run(sys.executable, "-c", knock, check=False).stderr, "the dashboard leaves loopback"


def test_machines_are_asked_for_and_let_go(head: Machine) -> None:
    """infra/ray/machines.py runs a command once so many are there and hands on its exit code; where they do not come in
    time it says so and runs nothing; afterwards none are asked for.
    """
    script = (sys.executable, ROOT / "infra" / "ray" / "machines.py", "--resource=memory")
    ran = head.run(*script, "1", "--", "sh", "-c", "hostname; exit 7", check=False)
    assert (ran.returncode, ran.stdout.strip()) == (7, "head"), ran.stderr
    ran = head.run(*script, "3", "--resource=odd", "--patience=1", "--", "hostname", check=False)
    assert (ran.returncode, ran.stdout.strip()) == (4, "")
    assert "not 3 odd after 1 s" in ran.stderr

    def asked() -> str:
        return head.run(BIN / "ray", "status").stdout.partition("From request_resources:")[2].split("\n")[1]

    until(lambda: "(none)" in asked(), within_s=START_S)  # Ray looks every 5 s


def nodes(head: Machine) -> list[str]:
    """Living nodes of the cluster."""
    ask = "import ray; ray.init('auto', log_to_driver=False); print(*(n['NodeID'] for n in ray.nodes() if n['Alive']))"
    return head.run(sys.executable, "-c", ask).stdout.split()
