"""The walls of the house, read off the source: who may import whom, how large things may be, what is banned."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("flows", "stages", "flux2_core")
STAGES = {f"stages.{name}" for name in ("index", "encode_text", "encode_images", "train", "sample")}
BUILDERS = ("flux2_core.tiny_model", "flux2_core.embedded")  # make small models of every kind
HOMES = {
    "prefect": ("flows",),
    "ray": ("stages",),
    "lance": ("flux2_core.store", "flux2_core.store_reader", "flux2_core.source_lance"),
    "boto3": ("flux2_core.objects",),
    "botocore": ("flux2_core.objects",),
    "transformers": ("flux2_core.text_encoder", *BUILDERS),
    "diffusers": ("flux2_core.vae", "flux2_core.transformer", *BUILDERS),
    "peft": ("flux2_core.lora", *BUILDERS),
    "optimum": ("flux2_core.quantize",),
    "bitsandbytes": ("flux2_core.optimizers",),
    "prodigyopt": ("flux2_core.optimizers",),
    "schedulefree": ("flux2_core.optimizers",),
    "lion_pytorch": ("flux2_core.optimizers",),
    "simplejpeg": ("flux2_core.decoding",),
    "tensorboard": ("flux2_core.metrics",),
    "torchvision": (),
}
MOST_LINES_PER_FILE = 400
MOST_LINES = 12000  # without blank ones (docs/decisions/0022); the builder, which no run imports, counts apart
MOST_LINES_OF_THE_BUILDER = 1500
MOST_LINES_FOR_A_READER = 3800  # of what the training entry point reaches
MOST_KEYS = 90


def modules() -> dict[str, Path]:
    """Every module of the three packages by dotted name."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names that a file imports anywhere in it, inside functions too; `from a import b` counts as a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def reachable(start: str) -> set[str]:
    """Our modules that a module reaches by any chain of imports."""
    known, seen, waiting = modules(), set(), [start]
    while waiting:
        name = waiting.pop()
        if name not in seen and name in known:
            seen.add(name)
            waiting += imports(known[name])
    return seen


def lines(path: Path) -> int:
    return sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines())


def test_imports_point_down() -> None:
    """flux2_core imports neither stages nor flows, stages import no flow, and stages never import each other."""
    for name, path in modules().items():
        layer = PACKAGES.index(name.split(".")[0])
        above = [other for other in imports(path) if other.split(".")[0] in PACKAGES[:layer]]
        assert not above, f"{name} imports {above} from above"
        if name in STAGES:
            assert not (imports(path) & STAGES), f"{name} imports another stage"


@pytest.mark.parametrize("library", HOMES)
def test_each_heavy_library_has_one_home(library: str) -> None:
    """A heavy library is imported in its home only (and by the builder of small models)."""
    for name, path in modules().items():
        uses = any(other.split(".")[0] == library for other in imports(path))
        at_home = any(name == home or name.startswith(home + ".") for home in HOMES[library])
        assert not uses or at_home, f"{name} imports {library}, whose home is {HOMES[library]}"


def test_training_cannot_reach_an_encoder() -> None:
    """By no chain of imports does stages.train reach the text encoder, the planner that tokenizes, or another stage."""
    reached = reachable("stages.train")
    assert "flux2_core.training" in reached, "the walk reached nothing"
    assert not reached & ({"flux2_core.text_encoder", "flux2_core.planning", *BUILDERS} | STAGES - {"stages.train"})


def test_files_and_package_stay_small() -> None:
    """No file over 400 lines; the package under 12,000; what a reader of training must carry under 3,800."""
    known = modules()
    for name, path in known.items():
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES_PER_FILE, name
    builder = {name for name in known if name.startswith(BUILDERS)}
    assert sum(lines(known[name]) for name in builder) < MOST_LINES_OF_THE_BUILDER
    assert not builder & (reachable("flows.cli") | reachable("flows.cache_and_train"))
    assert sum(lines(path) for name, path in known.items() if name not in builder) < MOST_LINES
    carried = {name for name in reachable("flux2_core.training") if name not in reachable("flux2_core.store")}
    assert sum(lines(known[name]) for name in carried) < MOST_LINES_FOR_A_READER


def test_every_file_says_its_idea() -> None:
    """Every module begins with a docstring whose first line is a sentence; no drawer like utils.py exists."""
    for name, path in modules().items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        assert text, name
        assert text.splitlines()[0].strip().endswith((".", ":", ",", ")")) or len(text.splitlines()) > 1, name
        assert not re.search(r"(utils|common|helpers)", name), name


def test_option_budget() -> None:
    """At most 90 configuration keys, each with a description for the generated reference."""
    from flux2_core.config_file import fields

    keys = dict(fields())
    assert len(keys) <= MOST_KEYS
    assert not [
        key for key, field in keys.items() if key != "run" and not field.description and key != "max_quarantined"
    ]


def test_at_most_four_exceptions() -> None:
    """There are four exception classes, all in one file."""
    classes = [
        node.name
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
        and any("Error" in ast.unparse(b) or "Exception" in ast.unparse(b) for b in node.bases)
    ]
    assert sorted(classes) == ["CacheloomError", "DataError", "SetupError", "UsageError"]


UNSAFE = {  # R15, each with a line that must be seen
    "pickle": "from pickle import loads",
    "dill": "def f():\n    import dill.source as d",
    "joblib": "import os, joblib",
    "torch.load": "torch.load(path, map_location='cpu', weights_only=quick)",
    "trust_remote_code": "AutoModel.from_pretrained(name, trust_remote_code=True)",
    "yaml.load": "yaml.load(text, Loader=yaml.SafeLoader)",
}


def unsafe(source: str) -> set[str]:
    """Which of the bans a source breaks, read off its syntax tree, so that words in strings do not count."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module.split(".")[0], *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call):
            keywords = {key.arg: ast.unparse(key.value) for key in node.keywords}
            found |= {"trust_remote_code"} if keywords.get("trust_remote_code", "False") != "False" else set()
            called = ast.unparse(node.func)
            found |= {called} if called != "torch.load" or keywords.get("weights_only") != "True" else set()
    return found & UNSAFE.keys()


@pytest.mark.parametrize("ban", UNSAFE)
def test_nothing_is_unpickled(ban: str) -> None:
    """R15: none of the six ways to run what a file holds is anywhere in the packages, the benchmarks or the tests."""
    assert unsafe(UNSAFE[ban]) == {ban}
    assert not unsafe(f"note = {UNSAFE[ban]!r}")
    files = [path for part in (*PACKAGES, "bench", "tests") for path in (ROOT / part).rglob("*.py")]
    assert len(files) > 100
    assert not [str(path) for path in files if ban in unsafe(path.read_text(encoding="utf-8"))]


def banned() -> Iterator[str]:
    """Patterns of swallowed errors, and of servers that everybody reaches."""
    yield from (r"except Exception\b", r"load\w*\(.*strict=False", r"0\.0\.0\.0")


@pytest.mark.parametrize("pattern", list(banned()))
def test_nothing_banned_is_there(pattern: str) -> None:
    """No error is swallowed, and nothing bound to every interface by us."""
    files = [*modules().values(), *(ROOT / "infra").rglob("*.y*ml"), ROOT / "prefect.yaml"]
    assert len(files) > 30
    assert not [str(path) for path in files if re.search(pattern, path.read_text(encoding="utf-8"))]
