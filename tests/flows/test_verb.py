"""The records of the verbs: what argparse reads is what their functions take."""

import inspect
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from flows.verb import COMMON, read
from flows.verbs import VERBS
from flux2_core.cache import garbage
from flux2_core.config.reading import dump_toml
from flux2_core.config.sections import Config
from flux2_core.errors import UsageError
from flux2_core.plan import survey
from stages import cluster

REPOSITORY = Path(__file__).parents[2]
NEEDED = {"show": ["p0", "--out", "p0.safetensors"], "import-config": ["--rank 3"]}
CONFIGURED = [name for name, verb in VERBS.items() if verb.configured]


@pytest.mark.parametrize("verb", CONFIGURED)
def test_arguments_are_the_functions_own(verb: str) -> None:
    """The arguments of a verb's record are the keywords of its function; overrides may stand before and after them."""
    options = read([verb, "my.toml", *NEEDED.get(verb, []), "run=a", "--json", "train.steps=3"], VERBS)
    config, *keywords = inspect.signature(VERBS[verb].function).parameters
    assert config == "config"
    assert vars(options).keys() == {*COMMON, *keywords}
    assert (options.config, options.overrides, options.json) == ("my.toml", ["run=a", "train.steps=3"], True)


@pytest.mark.parametrize("verb", [name for name in VERBS if name not in CONFIGURED])
def test_what_makes_a_configuration_takes_none(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Verbs without a configuration have the keywords of their function and no overrides."""
    options = read([verb, *NEEDED.get(verb, []), "--json"], VERBS)
    assert vars(options).keys() == {*COMMON, *inspect.signature(VERBS[verb].function).parameters}
    with pytest.raises(SystemExit):
        read([verb, *NEEDED.get(verb, []), "train.steps=3"], VERBS)
    assert "unrecognized arguments: train.steps=3" in capsys.readouterr().err


@pytest.mark.parametrize("odd", ["--bogus", "steps"])
def test_what_is_neither_option_nor_override_is_refused(odd: str, capsys: pytest.CaptureFixture[str]) -> None:
    """After an option only overrides may stand; anything else ends with code 2 and is named."""
    with pytest.raises(SystemExit) as ended:
        read(["stat", "my.toml", "--json", odd], VERBS)
    assert ended.value.code == 2
    assert f"unrecognized arguments: {odd}" in capsys.readouterr().err


def test_what_is_asked_reaches_the_work(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gc --keep-days 0.5 --dry-run` collects with half a day and without dropping anything; 7 days where not said."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(garbage, "collect", lambda config, **given: asked.append({"run": config.run, **given}) or {})
    file = tmp_path / "config.toml"
    file.write_text(dump_toml(make_config()))
    for more in (["--keep-days", "0.5", "--dry-run"], []):
        VERBS["gc"].run(read(["gc", str(file), *more, "run=other"], VERBS))
    assert asked == [
        {"run": "other", "keep": timedelta(hours=12), "dry_run": True},
        {"run": "other", "keep": timedelta(days=7), "dry_run": False},
    ]


def test_trust_reaches_the_survey(
    make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`plan` and `cache` trust what is known of pictures, and with `--trust-nothing` they do not."""
    asked: list[bool] = []

    def surveyed(*_: object, trusting: bool, **__: object) -> None:
        asked.append(trusting)
        raise UsageError("seen")

    monkeypatch.setattr(survey, "survey", surveyed)
    monkeypatch.setattr(cluster, "connect", lambda _: nullcontext())
    file = tmp_path / "config.toml"
    file.write_text(dump_toml(make_config()))
    for verb in ("plan", "cache"):
        for more in ([], ["--trust-nothing"]):
            options = read([verb, str(file), *more], VERBS)
            with pytest.raises(UsageError, match="seen"):
                VERBS[verb].function(make_config(), trust_nothing=options.trust_nothing)
    assert asked == [True, False, True, False]


@pytest.mark.parametrize("days", ["-1", "nan", "inf", "1e300"])
def test_an_age_is_a_number_of_days(make_config: Callable[..., Config], tmp_path: Path, days: str) -> None:
    """`gc` takes no age below nothing, beyond a century, or that is no number, and drops nothing then."""
    file = tmp_path / "config.toml"
    file.write_text(dump_toml(make_config()))
    with pytest.raises(UsageError, match=r"--keep-days .*an age in days"):
        VERBS["gc"].run(read(["gc", str(file), f"--keep-days={days}"], VERBS))


HEAVY = ("transformers", "diffusers", "peft", "accelerate", "torch._dynamo", "ray.train", "ray.data", "prefect.server")


def test_the_driver_imports_no_model_library() -> None:
    """What drives a run imports torch, Ray, Prefect and Lance, and nothing that only its workers or its server need:
    each of these costs 0.5 to 3 CPU-s, before anything happens."""
    probe = "import sys, flows.cache_and_train; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    there = set(done.stdout.split())
    assert {"torch", "ray", "prefect", "lance", "stages.train"} <= there
    assert not there & {*HEAVY}
