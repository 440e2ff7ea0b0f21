"""Files under infra/, read and held against schemas of their own projects (tests/infra_schemas), without a network."""

import functools
import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
SCHEMAS = Path(__file__).parent / "infra_schemas"


def documents(path: Path) -> list[Any]:
    """The YAML documents of a file; what an alias repeats is a copy, as it is to kubectl."""
    return json.loads(json.dumps(list(yaml.safe_load_all(path.read_text(encoding="utf-8")))))


@functools.cache
def schema(name: str) -> dict[str, Any]:
    return json.loads(gzip.decompress((SCHEMAS / f"{name}.json.gz").read_bytes()))


def faults(tree: Any, of: dict[str, Any]) -> list[str]:
    """In which places a tree breaks a schema."""
    return [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(of).iter_errors(tree)]


def kubernetes_faults(resource: dict[str, Any]) -> list[str]:
    """In which places a resource breaks its kind's schema; unknown keys count."""
    if resource["kind"] == "RayJob":
        return faults(resource, schema("rayjob"))
    known = schema("kubernetes")
    return faults(
        resource, {"$ref": f"#/definitions/{known['kinds'][resource['kind']]}", "definitions": known["definitions"]}
    )


def rendered(folder: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize` makes of a folder, as far as ours go: resources, a namespace and JSON 6902 patches."""
    (tree,) = documents(folder / "kustomization.yaml")
    unknown = tree.keys() - {"apiVersion", "kind", "namespace", "resources", "patches"}
    assert not unknown, f"{folder}: {unknown} is not rendered here"
    found: list[dict[str, Any]] = []
    for name in tree["resources"]:
        place = folder / name
        found += rendered(place) if place.is_dir() else documents(place)
    for resource in found if "namespace" in tree else []:
        if resource["kind"] != "Namespace":
            resource["metadata"]["namespace"] = tree["namespace"]
    for patch in tree.get("patches", []):
        kind, name = patch["target"]["kind"], patch["target"]["name"]
        (resource,) = [one for one in found if (one["kind"], one["metadata"]["name"]) == (kind, name)]
        for operation in yaml.safe_load(patch["patch"]):
            _apply(resource, **operation)
    return found


def _apply(tree: Any, *, op: str, path: str, value: Any) -> None:
    *parents, leaf = path.strip("/").split("/")
    for name in parents:
        tree = tree[int(name) if isinstance(tree, list) else name]
    if op == "add" and isinstance(tree, list):
        tree.insert(len(tree) if leaf == "-" else int(leaf), value)
    else:
        assert op == "add" or leaf in tree, f"{path}: nothing to replace"
        tree[leaf] = value


def leaves(tree: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of a tree with its dotted place."""
    if isinstance(tree, dict | list):
        for name, inner in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(inner, f"{place}.{name}")
    else:
        yield place, tree


def overrides(command: str) -> tuple[str, list[str]]:
    """File and overrides of a `cacheloom` command line in a script, its variables filled in."""
    line = " ".join(re.sub(r"\\\n", " ", command).split())
    line = re.sub(r'"?\$\{?(CONFIG|PLACE|SKYPILOT_NUM_GPUS_PER_NODE)\}?"?', _filled, line).replace('"', "")
    found = re.search(r"cacheloom run (\S+)((?: [\w.]+=\S+)*)", line)
    assert found, command
    return found[1], found[2].split()


def _filled(match: re.Match[str]) -> str:
    return {"CONFIG": "teapot.toml", "PLACE": "s3://bucket/place", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}[match[1]]
