"""What each test costs, told at the end of a session, and the budgets that a session fails by.

Judged is what a busy machine does not change: how many programs a tier starts, each of which imports for 3 to 8
CPU-seconds (docs/decisions/0025-test-budgets.md). Of seconds, which are told, those of the test process's own CPU are
judged once, with a wide margin: a test without the marker of a tier must not be a slow one.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import pytest

TIERS = ("all_cases", "prefect", "ray", "s3", "slow", "unit")  # the first one that a test is marked with; else the last
# programs that a tier may start; of `slow` 41 are compilers of one test, where nothing is compiled yet
STARTS = {"prefect": 25, "ray": 15, "s3": 10, "slow": 80, "unit": 100}
UNIT_CPU_S = 30.0  # of one test; `slow` is what takes over ten seconds, and no load has tripled a CPU-second yet
SHOWN = 20
KEPT = "cost"


@dataclass(frozen=True)
class Cost:
    """Of one test, its fixtures included; `cpu_s` of the process that ran it, without what it started."""

    test: str
    tier: str
    wall_s: float
    cpu_s: float
    starts: int


_started = 0


def _heard(event: str, _given: tuple[object, ...]) -> None:
    global _started
    _started += event == "subprocess.Popen"


sys.addaudithook(_heard)


def _spent() -> tuple[float, float, int]:
    return time.perf_counter(), time.process_time(), _started


def tier(marks: Sequence[str]) -> str:
    """The tier of a test that has these markers."""
    return next((name for name in TIERS if name in marks), TIERS[-1])


def passed(costs: Sequence[Cost]) -> list[str]:
    """Every budget that these tests went over, in words."""
    found = [
        f"{cost.test} took {cost.cpu_s:.0f} CPU-seconds, a test without a marker may take {UNIT_CPU_S:.0f}: "
        "make it smaller, or mark it slow"
        for cost in costs
        if cost.tier == "unit" and cost.cpu_s > UNIT_CPU_S
    ]
    for name, most in STARTS.items():
        starts = sum(cost.starts for cost in costs if cost.tier == name)
        if starts > most:
            found.append(
                f"the tests of tier {name} started {starts} programs, {most} are their budget: "
                "start warm (tests/warm.py), share a server, let one run show several things, or mark it all_cases"
            )
    return found


def told(costs: Sequence[Cost]) -> Iterator[str]:
    """The slowest tests, and the sums of each tier."""
    yield f"{'wall':>8} {'CPU':>7} {'starts':>6}"
    for cost in sorted(costs, key=lambda cost: -cost.wall_s)[:SHOWN]:
        yield f"{cost.wall_s:7.1f}s {cost.cpu_s:6.1f}s {cost.starts:6}  {cost.test}"
    sums = defaultdict(list)
    for cost in costs:
        sums[cost.tier].append(cost)
    for name in TIERS:
        if of := sums[name]:
            wall_s, cpu_s, starts = (sum(getattr(c, field) for c in of) for field in ("wall_s", "cpu_s", "starts"))
            yield f"{wall_s:7.1f}s {cpu_s:6.1f}s {starts:6}  {name}: {len(of)} tests"


class Costs:
    """Measures in the process that runs the tests; adds up and judges in the one that reports them."""

    def __init__(self) -> None:
        self.costs: list[Cost] = []

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.before = _spent()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
        report = yield
        if call.when == "teardown":
            wall_s, cpu_s, starts = (now - then for now, then in zip(_spent(), self.before, strict=True))
            name, kind = item.nodeid.split("@")[0], tier([mark.name for mark in item.iter_markers()])
            report.user_properties.append((KEPT, asdict(Cost(name, kind, wall_s, cpu_s, starts))))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.costs += [Cost(**value) for name, value in report.user_properties if name == KEPT]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if len(self.costs) > SHOWN:
            terminalreporter.section(f"the {SHOWN} slowest, and each tier")
            terminalreporter.write("\n".join(told(self.costs)) + "\n")
        for line in passed(self.costs):
            terminalreporter.write_line(f"BUDGET {line}", red=True)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.OK and passed(self.costs):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
