"""R16 and R17: every file under infra/ against its own project's schema, without a network, and what it exposes."""

import copy
import json
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from prefect.server.api import collections_data
from prefect.utilities.templating import apply_values
from prefect.workers.process import ProcessJobConfiguration
from ray.autoscaler._private.util import prepare_config, validate_config

from flux2_core.config.reading import parse
from tests.manifests import (
    INFRA,
    ROOT,
    documents,
    faults,
    kubernetes_faults,
    leaves,
    overrides,
    rendered,
    schema,
)

CLUSTERS = sorted((INFRA / "ray").glob("*.yaml"))
OVERLAYS = sorted((INFRA / "k8s" / "overlays").iterdir())
TASKS = sorted((INFRA / "skypilot").glob("*.yaml"))
COMPOSED = sorted((INFRA / "prefect").glob("*.yaml"))
DOCKERFILE = INFRA / "docker" / "Dockerfile"
GRACE_S = 120
MOST_CHANGES = 10
CLOUDS = [path for path in CLUSTERS if path.stem != "local"]


def named(paths: list[Path]) -> Any:
    return pytest.mark.parametrize("path", paths, ids=[path.stem for path in paths])


def misspelt(tree: Any, *places: Any) -> Any:
    """The same with a key that nobody knows, further in."""
    changed = copy.deepcopy(tree)
    inner = changed
    for place in places:
        inner = inner[place]
    inner["mispelt"] = 1
    return changed


# Docker


def test_the_dockerfile_is_clean() -> None:
    """hadolint finds nothing in the Dockerfile, and finds a planted fault."""
    linter = Path(sys.executable).with_name("hadolint")
    assert linter.exists(), "hadolint is not installed: `make install` brings it"

    def found(text: str) -> str:
        return subprocess.run([linter, "-"], input=text, capture_output=True, text=True).stdout

    text = DOCKERFILE.read_text()
    assert found(text) == ""
    assert "DL3002" in found(text.replace("USER 1000:1000", "USER root"))


def test_the_image_is_pinned_and_runs_as_nobody_of_rank() -> None:
    """The base has no default, so that none is taken that floats; both targets end as a user without rights; nothing
    in a layer is named like a secret; what is copied is listed, and all else is left out.
    """
    text = DOCKERFILE.read_text()
    assert re.findall(r"(?m)^ARG BASE.*", text) == ["ARG BASE"]
    stages = dict(re.findall(r"(?ms)^FROM \S+ AS (\S+)\n(.*?)(?=^FROM |\Z)", text))
    assert set(re.findall(r"(?m)^FROM (\S+)", text)) == {"${BASE}", "build", "runtime"}
    for target in ("cpu", "cuda"):
        assert re.findall(r"(?m)^USER (.*)", stages[target])[-1] == "1000:1000"
    code = re.sub(r"(?m)^#.*", "", text)
    assert not re.search(r"(?i)(ARG|ENV).*(secret|password|token(?!\b)|_key|HF_TOKEN|AUTH_STRING)", code)
    ignored = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied = re.findall(r"(?m)^COPY (?!--from)(.*) \S+$", text)
    assert {name for line in copied for name in line.split()} <= allowed


def locked(name: str) -> dict[str, str]:
    text = (INFRA / "docker" / name).read_text()
    entries = re.findall(r"(?m)^([A-Za-z0-9._-]+)==([^ ;]+)[^\n]*((?:\n    --hash=sha256:[0-9a-f]{64}[^\n]*)+)", text)
    assert len(entries) == len(re.findall(r"(?m)^[A-Za-z0-9]", text)), "an entry without a hash"
    return {name.lower().replace("_", "-"): version for name, version, _ in entries}


def test_libraries_of_the_image_are_those_of_the_repository() -> None:
    """Every library of the image is pinned by version and sha256, each that pyproject.toml asks for is among them, and
    what constraints.txt pins has the same version there: infra/docker/lock.sh was run since.
    """
    cuda, rest = locked("torch-cuda.txt"), locked("requirements.txt")
    assert not cuda.keys() & rest.keys()
    assert {"torch", "triton"} <= cuda.keys()
    every = cuda | rest
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.split(r"[\[<>=]", line)[0].lower() for line in asked} <= every.keys()
    pinned = dict(re.findall(r"(?m)^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text()))
    assert len(every.keys() & pinned.keys()) > 10
    assert {name: every[name] for name in every.keys() & pinned.keys()} == {
        name: pinned[name] for name in every.keys() & pinned.keys()
    }


# ray up


@named(CLUSTERS)
def test_ray_up_takes_it(path: Path) -> None:
    """Ray's own preparation and schema accept the file, and refuse a key that nobody knows."""
    (tree,) = documents(path)
    prepared = prepare_config(copy.deepcopy(tree))
    validate_config(prepared)
    with pytest.raises(Exception, match="mispelt"):
        validate_config(misspelt(prepared))


@named(CLUSTERS)
def test_ray_listens_behind_a_token(path: Path) -> None:
    """R17: every node gets the token as a file of mode 0600 and starts in token mode; the dashboard stays on loopback;
    nothing carries a secret; the object store is small; machines go when they are idle.
    """
    (tree,) = documents(path)
    assert tree["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
    assert "chmod 0700 ~/.ray && chmod 0600 ~/.ray/auth_token" in tree["setup_commands"]
    for line in tree["head_start_ray_commands"] + tree["worker_start_ray_commands"]:
        assert "ray stop" in line or ("RAY_AUTH_MODE=token" in line and "--object-store-memory=" in line)
    (head,) = [line for line in tree["head_start_ray_commands"] if "--head" in line]
    assert {"--num-cpus=0", "--num-gpus=0", "--dashboard-host=127.0.0.1"} <= set(head.split())
    assert 0 < tree["idle_timeout_minutes"] <= 60


@named(CLOUDS)
def test_what_a_cloud_is_asked_for(path: Path) -> None:
    """The head is on demand and does no work; H100s are there on demand and as spot machines; /dev/shm has a size, and
    weights go to the machine's own disks.
    """
    (tree,) = documents(path)
    kinds = tree["available_node_types"]
    assert tree["head_node_type"] == "head"
    assert kinds["head"]["resources"]["CPU"] == kinds["head"]["resources"]["GPU"] == 0
    spot = {name for name, kind in kinds.items() if "spot" in str(kind["node_config"]).lower()}
    assert spot == {"h100-spot"}
    assert all(kinds[name]["resources"]["GPU"] == 8 for name in ("h100", "h100-spot"))
    assert kinds["encoder"]["resources"]["encoder"] == 1
    options = " ".join(tree["docker"]["run_options"])
    assert "--shm-size=" in options
    assert "/mnt/scratch:/scratch" in options
    assert "privileged" not in options
    assert any("nvme" in line for line in tree["initialization_commands"])


def test_ec2_takes_the_machines() -> None:
    """Each machine of aws.yaml is what EC2's RunInstances takes, by AWS's own model; a misspelt key is refused."""
    operation = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    (tree,) = documents(INFRA / "ray" / "aws.yaml")

    def refused(machine: dict[str, Any]) -> bool:
        asked = machine | {"MinCount": 1, "MaxCount": 1}
        return ParamValidator().validate(asked, operation.input_shape).has_errors()

    for kind in tree["available_node_types"].values():
        machine = kind["node_config"]
        assert not refused(machine)
        assert refused(misspelt(machine))
        assert refused(misspelt(machine, "BlockDeviceMappings", 0, "Ebs"))
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in machine["BlockDeviceMappings"])


# Kubernetes


@named(OVERLAYS)
def test_kubernetes_takes_it(path: Path) -> None:
    """Each resource of an overlay keeps to its kind's schema, KubeRay's for a RayJob; keys that nobody knows fail, in
    the job, in its groups and in their pods.
    """
    resources = rendered(path)
    assert {one["kind"] for one in resources} >= {"RayJob", "NetworkPolicy", "ServiceAccount"}
    for one in resources:
        assert not kubernetes_faults(one), one["metadata"]
        assert kubernetes_faults(misspelt(one)), one["metadata"]
    job = ray_job(path)
    for place in (
        ["spec"],
        ["spec", "rayClusterSpec", "headGroupSpec"],
        ["spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec"],
        ["spec", "rayClusterSpec", "workerGroupSpecs", 0, "template", "spec", "containers", 0],
    ):
        assert any("mispelt" in fault for fault in kubernetes_faults(misspelt(job, *place)))


def ray_job(path: Path) -> dict[str, Any]:
    (job,) = [one for one in rendered(path) if one["kind"] == "RayJob"]
    return job


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


@named(OVERLAYS)
def test_the_cluster_is_closed(path: Path) -> None:
    """R17: a policy denies all that others do not allow, and none lets in the world; no service leaves the cluster;
    Ray asks for a token; pods are not root, may not become it, and hold no key to the cluster; no secret stands there.
    """
    resources = rendered(path)
    policies = {one["metadata"]["name"]: one["spec"] for one in resources if one["kind"] == "NetworkPolicy"}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in policies.values():
        assert all(rule.get("from") for rule in policy.get("ingress", []))
        assert all(
            rule.get("to") or {port["port"] for port in rule["ports"]} == {443} for rule in policy.get("egress", [])
        )
    assert not {one["kind"] for one in resources} & {"Secret", "Service", "Ingress"}
    job = ray_job(path)
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert not re.search(r"LoadBalancer|NodePort|hostNetwork|hostPath|privileged'", str(resources))
    for pod in pods(job):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["automountServiceAccountToken"] is False
        assert pod["serviceAccountName"] == "cacheloom"
        (container,) = pod["containers"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        shm = next(one for one in pod["volumes"] if one["name"] == mounted["/dev/shm"])
        assert shm["emptyDir"]["medium"] == "Memory"
        assert shm["emptyDir"]["sizeLimit"]


@named(OVERLAYS)
def test_pods_have_time_to_save(path: Path) -> None:
    """Every worker has 120 s at least between SIGTERM and the end; spot nodes are tolerated where they are meant."""
    (workers,) = ray_job(path)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= GRACE_S
    assert any("spot" in str(one) for one in pod["tolerations"]) == (path.name == "spot")
    gpus = int(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) * workers["maxReplicas"]
    assert f"cluster.workers={gpus}" in ray_job(path)["spec"]["entrypoint"]


@named(OVERLAYS)
def test_the_run_of_a_cluster_is_one(path: Path) -> None:
    """The configuration in the ConfigMap with the overrides of the job's command is one that cacheloom takes."""
    (config,) = [one for one in rendered(path) if one["kind"] == "ConfigMap"]
    file, given = overrides(ray_job(path)["spec"]["entrypoint"])
    assert file == "/etc/cacheloom/config.toml"
    read = takes(config["data"]["config.toml"], given)
    assert read.cluster.address == "auto"
    assert read.output.root.startswith("/shared/")


def takes(text: str, given: list[str]) -> Any:
    from flux2_core.config.reading import apply_override

    tree = tomllib.loads(text)
    for override in given:
        apply_override(tree, override)
    return parse(tree)


@pytest.mark.all_cases
@named(OVERLAYS)
def test_our_rendering_is_kustomizes(path: Path) -> None:
    """`kubectl kustomize` makes of each overlay what the other tests looked at."""
    kubectl = shutil.which("kubectl")
    assert kubectl, "kubectl is not here; deselect this test on a machine without it"
    text = subprocess.run([kubectl, "kustomize", path], capture_output=True, text=True, check=True).stdout
    theirs = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text)}
    ours = {(one["kind"], one["metadata"]["name"]): one for one in rendered(path)}
    assert ours == theirs


def test_the_secret_is_an_example() -> None:
    """The Secret's file keeps to the schema, holds no value, and is no part of what is applied."""
    path = INFRA / "k8s" / "base" / "secret.example.yaml"
    (secret,) = documents(path)
    assert not kubernetes_faults(secret)
    assert set(secret["stringData"].values()) == {""}
    assert path.name not in (INFRA / "k8s" / "base" / "kustomization.yaml").read_text().partition("resources:")[2]


# SkyPilot


@named(TASKS)
def test_skypilot_takes_it(path: Path) -> None:
    """Each task keeps to SkyPilot's schema, which refuses what it does not know; its command is one of ours."""
    (task,) = documents(path)
    of = schema("skypilot")
    assert not faults(task, of)
    assert faults(misspelt(task), of)
    assert faults(misspelt(task, "resources"), of)
    file, given = overrides(task["run"])
    read = takes('[model]\npath = "m"\n[[data]]\npath = "d"\n', given)
    assert file == "teapot.toml"
    assert read.output.mirror == "s3://bucket/place/runs"
    assert read.cluster.workers == 8
    assert task["secrets"] == {"HF_TOKEN": None}
    assert bool(task["resources"].get("use_spot")) == (path.stem == "spot") == ("job_recovery" in task["resources"])
    assert path.stem == "spot" or task["resources"]["autostop"]["down"]


# Prefect


def services() -> dict[str, dict[str, Any]]:
    """Compose's services, a later file over an earlier one as `docker compose -f` lays them."""
    found: dict[str, dict[str, Any]] = {}
    for path in COMPOSED:
        (tree,) = documents(path)
        for name, service in tree["services"].items():
            before = found.get(name, {})
            merged = {
                key: {**before[key], **value} if isinstance(value, dict) and key in before else value
                for key, value in service.items()
            }
            found[name] = before | merged
    return found


@named(COMPOSED)
def test_compose_takes_it(path: Path) -> None:
    """Each compose file keeps to the specification's schema, which refuses keys of services that it does not know."""
    (tree,) = documents(path)
    of = schema("compose")
    assert not faults(tree, of)
    assert faults(misspelt(tree, "services", "server"), of)


def test_the_server_is_behind_a_password_and_on_loopback() -> None:
    """R17: the one port that compose opens is the machine's own loopback; server and worker share a password, which no
    file holds and without which nothing starts; every image is named by digest; database and Redis reach no network.
    """
    every = services()
    assert {name for name, one in every.items() if "ports" in one} == {"server"}
    assert every["server"]["ports"] == ["127.0.0.1:4200:4200"]
    assert "${PREFECT_AUTH" in every["server"]["environment"]["PREFECT_SERVER_API_AUTH_STRING"]
    assert "${PREFECT_AUTH" in every["worker"]["environment"]["PREFECT_API_AUTH_STRING"]
    text = "".join(path.read_text() for path in COMPOSED)
    wanted = {"PREFECT_AUTH", "POSTGRES_PASSWORD", "REDIS_PASSWORD"} | {f"{name}_DIGEST" for name in IMAGES}
    assert set(re.findall(r"\$\{(\w+):\?", text)) == wanted | {"CACHELOOM_IMAGE"}
    assert not re.findall(r"\$\{\w+:?-", text), "a default would let it start without"
    for name, one in every.items():
        assert "_DIGEST" in one["image"] or one["image"].startswith("${CACHELOOM_IMAGE"), name
    assert every["postgres"]["networks"] == every["redis"]["networks"] == ["inside"]
    assert documents(INFRA / "prefect" / "compose.yaml")[0]["networks"]["inside"] == {"internal": True}


IMAGES = ("POSTGRES", "PREFECT", "REDIS")


def test_passwords_are_made() -> None:
    """passwords.sh makes each password anew, and leaves empty what only a person can know: compose stops there."""
    script = INFRA / "prefect" / "passwords.sh"
    assert script.stat().st_mode & stat.S_IXUSR
    first, second = (
        dict(line.split("=") for line in subprocess.check_output([script], text=True).splitlines()) for _ in range(2)
    )
    secret = {name for name, value in first.items() if value}
    assert secret == {"PREFECT_AUTH", "POSTGRES_PASSWORD", "REDIS_PASSWORD"}
    assert all(first[name] != second[name] and len(first[name]) >= 48 for name in secret)
    ignored = subprocess.run(["git", "check-ignore", "-q", "infra/prefect/.env"], cwd=ROOT)
    assert ignored.returncode == 0, "a copy of it could be committed"


def template(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A work pool's template of ours, and Prefect's own of that type."""
    ours = json.loads((INFRA / "prefect" / f"pool-{name}.json").read_text())
    view = Path(collections_data.__path__[0], "views", "aggregate-worker-metadata.json")
    known = json.loads(view.read_text())
    package = {"process": "prefect", "kubernetes": "prefect-kubernetes"}[name]
    return ours, known[package][name]["default_base_job_configuration"]


@pytest.mark.parametrize("name", ["process", "kubernetes"])
def test_a_work_pool_is_prefects_own(name: str) -> None:
    """A template has all that Prefect's own of its type has, and every variable that it uses is one of its own."""
    ours, theirs = template(name)
    assert ours["job_configuration"].keys() == theirs["job_configuration"].keys()
    variables = ours["variables"]["properties"]
    assert theirs["variables"]["properties"].keys() <= variables.keys()
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(ours["job_configuration"])))
    assert used == variables.keys()
    values = {key: one["default"] for key, one in variables.items() if "default" in one}
    assert not faults(values, ours["variables"])
    assert variables["env"]["default"]["PREFECT_PLUGINS_ENABLED"] == "false"


def test_a_process_worker_takes_its_template() -> None:
    """Prefect's process worker makes a job of the template's defaults: it runs where the image has the repository."""
    ours, _ = template("process")
    variables = ours["variables"]["properties"]
    defaults = {key: one["default"] for key, one in variables.items() if "default" in one}
    job = ProcessJobConfiguration(**apply_values(ours["job_configuration"], defaults))
    assert str(job.working_dir) == "/opt/cacheloom"
    assert job.env["RAY_AUTH_MODE"] == "token"


def test_a_kubernetes_worker_makes_a_closed_job() -> None:
    """The job of the kubernetes pool keeps to Kubernetes' schema, runs as no root, and has time to save."""
    ours, _ = template("kubernetes")
    variables = ours["variables"]["properties"]
    given = {"name": "run", "command": ["prefect", "flow-run", "execute"], "labels": {"of": "a run"}}
    values = {key: one["default"] for key, one in variables.items() if "default" in one} | given
    values["env"] = [{"name": name, "value": value} for name, value in values["env"].items()]
    job = apply_values(ours["job_configuration"]["job_manifest"], values)
    assert not kubernetes_faults(job)
    pod = job["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["terminationGracePeriodSeconds"] >= GRACE_S
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"


# Everything


def everything() -> list[Path]:
    return [path for path in INFRA.rglob("*") if path.is_file()]


def test_little_is_to_be_changed() -> None:
    """A stranger sets ten things at most for each way, each marked; CHANGE stands nowhere without the mark."""
    ways: dict[str, list[Path]] = {path.name: [path] for path in (*CLUSTERS, *TASKS, *COMPOSED)}
    base = sorted((INFRA / "k8s" / "base").glob("*.yaml"))
    ways |= {path.name: [*base, path / "kustomization.yaml"] for path in OVERLAYS}
    for way, paths in ways.items():
        lines = [line for path in paths for line in path.read_text().splitlines()]
        marked = [line for line in lines if "# CHANGE:" in line]
        assert len(marked) <= MOST_CHANGES, way
        assert len(marked) >= 1 or way == "compose.scaled.yaml"


def test_no_secret_stands_in_a_file() -> None:
    """R17: no value under infra/ whose name says that it is secret is anything but a variable, a file or empty."""
    secret = re.compile(r"(?i)(password|secret|token|auth_string|_key)\b")
    found = []
    for path in everything():
        if path.suffix in (".yaml", ".json"):
            trees = documents(path) if path.suffix == ".yaml" else [json.loads(path.read_text())]
            found += [
                (path.name, place, value)
                for tree in trees
                for place, value in leaves(tree)
                if secret.search(place.rpartition(".")[2]) and isinstance(value, str)
            ]
    left = [one for one in found if one[2] and not one[2].startswith("${") and not one[2].startswith("~/")]
    assert len(found) > 5
    assert not left


def test_readme_of_infra_names_every_way() -> None:
    """The decision table of infra/README.md leads to each folder, and says what was never run."""
    text = (INFRA / "README.md").read_text()
    for folder in INFRA.iterdir():
        assert folder.is_file() or f"]({folder.name}/)" in text, folder
    assert "None of this was ever run on a cloud" in text
