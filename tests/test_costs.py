"""The budgets of the tests themselves: what is over one is named, and what a busy machine changes is not judged."""

from tests.costs import STARTS, UNIT_CPU_S, Cost, passed, tier, told


def cost(*, kind: str = "unit", wall_s: float = 1.0, cpu_s: float = 1.0, starts: int = 0) -> Cost:
    return Cost("tests/test_x.py::test_y", kind, wall_s, cpu_s, starts)


def test_a_test_has_one_tier() -> None:
    """The counted cases come first, then what starts most; without a marker of a tier a test is a unit test."""
    assert tier(["ray", "prefect", "slow"]) == "prefect"
    assert tier(["ray", "all_cases"]) == "all_cases"
    assert tier(["parametrize"]) == "unit"


def test_a_tier_that_starts_too_much_is_named() -> None:
    """One program over a tier's budget is told with the way out; at the budget, and for counted cases, nothing is."""
    for kind, most in STARTS.items():
        assert passed([cost(kind=kind)] * 3 + [cost(kind=kind, starts=most)]) == []
        (words,) = passed([cost(kind=kind, starts=most), cost(kind=kind, starts=1)])
        assert f"tier {kind} started {most + 1} programs, {most} are their budget" in words
    assert passed([cost(kind="all_cases", starts=1000)]) == []


def test_seconds_of_the_wall_are_not_judged() -> None:
    """A test may wait as long as a busy machine makes it; a unit test that computes for long is named."""
    assert passed([cost(wall_s=1e4), cost(cpu_s=UNIT_CPU_S), cost(kind="slow", cpu_s=1e4)]) == []
    (words,) = passed([cost(cpu_s=UNIT_CPU_S + 1)])
    assert "test_y took 31 CPU-seconds" in words


def test_the_slowest_and_the_sums_are_told() -> None:
    """Twenty tests, the slowest first, then a line for each tier that ran."""
    lines = list(told([cost(wall_s=number) for number in range(30)] + [cost(kind="ray", starts=5)]))
    assert len(lines) == 1 + 20 + 2
    assert lines[1].split()[0] == "29.0s"
    assert lines[-2].endswith("ray: 1 tests")
    assert lines[-1].endswith("unit: 30 tests")
