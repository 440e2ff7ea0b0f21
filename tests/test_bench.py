"""The benchmarks run and print what they claim; no test here asserts a time."""

import json

import pytest

from bench.__main__ import main
from bench.captions import lengths
from bench.measure import alternate


def test_arms_take_turns_and_medians_are_compared() -> None:
    """A B A B after one unmeasured turn each; the ratio is of medians, so one slow round does not move it."""
    turns: list[str] = []
    costs = {"ours": iter([9.0, 2.0, 2.0, 50.0]), "theirs": iter([9.0, 6.0, 6.0, 6.0])}
    now = 0.0

    def arm(name: str) -> None:
        nonlocal now
        turns.append(name)
        now += next(costs[name])

    timings = alternate({"ours": lambda: arm("ours"), "theirs": lambda: arm("theirs")}, rounds=3, clock=lambda: now)
    assert turns == ["ours", "theirs"] * 4
    assert timings.median("ours") == 2.0
    assert timings.ratio("theirs", "ours") == 3.0
    assert timings.spread("theirs", "ours") == (6.0 / 50.0, 3.0)


def test_captions_have_the_stated_mean() -> None:
    """Lengths average the stated mean within 5 %, and differ."""
    drawn = lengths(200, mean=163)
    assert abs(sum(drawn) / len(drawn) - 163) < 8
    assert len(set(drawn)) > 50


def test_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt name exits 2 and lists what there is."""
    with pytest.raises(SystemExit) as stopped:
        main(["read_cach"])
    assert stopped.value.code == 2
    assert "read_cache" in capsys.readouterr().err


@pytest.mark.slow
def test_quick_benchmarks_print_their_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    """The two cheapest benchmarks, on toy sizes: a table line per case, and JSON whose ratio is theirs over ours."""
    assert main(["bytes", "read_cache", "--quick", "--json"]) == 0
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [row["benchmark"] for row in rows] == ["bytes"] * 2 + ["read_cache"] * 4
    assert "| theirs / ours" in printed.err
    for row in rows:
        assert row["ratio"] == pytest.approx(row["theirs"] / row["ours"])
        assert f"| {row['case']} " in printed.err
