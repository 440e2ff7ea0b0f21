"""What every method does to the embedded model, through the records and the code that fill docs/methods.md's table."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench.effects import KEPT, Results, main, measure_all
from bench.effects_table import EFFECTS, NO_METHOD, NO_RECORD, Effect
from bench.lessons import LESSONS
from flux2_core.config.reading import fields
from tests.flux2_core.config.test_tables import values

CLAIMED = {effect.name: effect for effect in EFFECTS if effect.claims}
SEED = 1  # one of those of the table, which take an hour: a claim is of each seed for itself
NOT_YET = {"edit"}  # 500 steps of eight: two CPU-minutes a seed
QUICK = "range, clear"


def asked() -> set[str]:
    """Every key of what a step minimises, and `key=value` for each value that is told by name."""
    keys = {key: field for key, field in fields() if key.rpartition(".")[0] not in NO_METHOD}
    named = (
        (key, value) for key, field in keys.items() for value in values(field.annotation) if value != field.default
    )
    return keys.keys() | {f"{key}={value}" for key, value in named}


def shown(folder: Path) -> set[str]:
    """What records and their lessons set, in the same words."""
    found = set()
    for override in (one for effect in EFFECTS for one in effect.sets + effect.plain):
        key, _, value = override.partition("=")
        key = ".".join("data[]" if part == "data" else part for part in key.split(".") if not part.isdecimal())
        found |= {key, f"{key}={value}"}
    for lesson in {effect.lesson for effect in EFFECTS}:
        for name, section in LESSONS[lesson](folder / lesson).items():
            tables = [("data[]", data) for data in section] if name == "data" else [(name, section)]
            found |= {f"{name}.{key}" for name, table in tables for key in table}
    return found


def test_no_method_is_without_a_record(tmp_path: Path) -> None:
    """Every key and every named value that changes what a step minimises has a record of what it does, or the reason
    why it has none: a new method fails here until it is shown."""
    excused = {one for keys in NO_RECORD.values() for one in keys}
    assert not {one for one in asked() - shown(tmp_path) if not {one, one.partition("=")[0]} & excused}
    assert not excused - asked(), "excuses for what is no more"


def test_the_kept_figures_bear_the_claims_out() -> None:
    """The committed figures are of every record, and each claim holds at every seed that was measured."""
    kept = json.loads(KEPT.read_text(encoding="utf-8"))["effects"]
    names = {effect.name for effect in EFFECTS}
    assert len(names) == len(EFFECTS), "two records of one name"
    assert kept.keys() <= names
    assert names - kept.keys() <= NOT_YET
    for name, effect in CLAIMED.items():
        found = kept.get(name, {"plain": [], "with": []})
        for plain, with_it in zip(found["plain"], found["with"], strict=True):
            assert effect.holds(plain, with_it), (name, plain, with_it)


@pytest.mark.parametrize(
    ("claims", "good", "bad"),
    [("more", (0.2, 0.4), (0.3, 0.4)), ("less", (0.4, 0.2), (0.4, 0.3)), ("kept", (0.4, 0.3), (0.4, 0.1))],
)
def test_what_a_claim_means(claims: Any, good: tuple[float, float], bad: tuple[float, float]) -> None:
    """More, less or no less than plain training, by the margin."""
    effect = Effect("one", ("train.seed=1",), claims=claims, margin=0.19)
    assert effect.holds(*good)
    assert not effect.holds(*bad)


def test_a_cheap_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Through the bench's own command: both runs are trained and drawn, the claim holds, and what is measured already
    is not measured again."""
    out = tmp_path / "effects.jsonl"
    assert main([QUICK, "--seeds", "1", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "held 1 of 1" in told
    lines = out.read_text()
    assert main([QUICK, "--seeds", "1", "--out", str(out)]) == 0
    assert out.read_text() == lines


@pytest.fixture(scope="module")
def results() -> Results:
    """What was measured: plain runs are shared by records."""
    return Results(None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all."""
    return tmp_path_factory.mktemp("effects")


@pytest.mark.all_cases
@pytest.mark.parametrize("name", [name for name in CLAIMED if name not in {QUICK, *NOT_YET}])
def test_a_method_does_what_is_claimed(name: str, folder: Path, results: Results) -> None:
    """At one seed beside plain training the checker sees what the table claims, by the margin."""
    measure_all(folder, [CLAIMED[name]], results, seeds=[SEED])
    ((plain, with_it),) = results.pairs(CLAIMED[name], [SEED])
    assert CLAIMED[name].holds(plain, with_it), (plain, with_it)
