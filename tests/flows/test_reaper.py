"""The reaper, with real processes: whatever ends the driver, nothing that it started is left."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from flows.reaper import MARKER, guard

PROMISE_S = 10.0
# A grandchild as stubborn as they come: a session of its own, and no signal but SIGKILL ends it.
STUBBORN = """
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
open(sys.argv[1], "a").write(f"{os.getpid()}\\n")
time.sleep(600)
"""
DRIVER = """
import os, signal, subprocess, sys, time
from flows.reaper import guard
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background hands down that it is ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)
stubborn, pids, how = sys.argv[1:4]
child = (
    "import os, subprocess, sys, time; open(sys.argv[2], 'a').write(f'{os.getpid()}\\\\n');"
    "subprocess.Popen([sys.executable, '-c', sys.argv[1], sys.argv[2]], start_new_session=True); time.sleep(600)"
)
def wait():
    while not os.path.exists(pids) or open(pids).read().count("\\n") < 2:
        time.sleep(0.02)
with guard():
    subprocess.Popen([sys.executable, "-c", child, stubborn, pids])
    wait()
    if how == "fork":
        pid = os.fork()
        if pid == 0:
            open(pids, "a").write(f"{os.getpid()}\\n")
            time.sleep(600)
    print("ready", flush=True)
    if how == "raise":
        raise SystemExit(7)
    if how != "return":
        time.sleep(600)
print("after", flush=True)
"""


ENDS = {  # how a driver ends: by what in itself, else by a signal to it or to its whole process group
    "SIGKILL": ("wait", lambda driver: driver.send_signal(signal.SIGKILL)),
    "SIGTERM": ("wait", lambda driver: driver.send_signal(signal.SIGTERM)),
    "SIGINT": ("wait", lambda driver: driver.send_signal(signal.SIGINT)),
    "SIGHUP": ("wait", lambda driver: driver.send_signal(signal.SIGHUP)),
    "SIGKILL to its group": ("wait", lambda driver: os.killpg(driver.pid, signal.SIGKILL)),
    "SIGKILL after a fork": ("fork", lambda driver: driver.send_signal(signal.SIGKILL)),
    "return": ("return", lambda driver: None),
    "raise": ("raise", lambda driver: None),
}


@dataclass(frozen=True)
class Ended:
    """What became of a driver and of what it had started: children, grandchildren, and in one case its own fork."""

    code: int
    output: str
    before: int
    left: list[int]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All the drivers at once, each one's end followed by the promised time."""
    folder = tmp_path_factory.mktemp("drivers")
    environment = {key: value for key, value in os.environ.items() if key != MARKER}
    drivers = {}
    for name, (how, _) in ENDS.items():
        command = [sys.executable, "-c", DRIVER, STUBBORN, str(folder / name), how]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        drivers[name] = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    before = {}
    for name, driver in drivers.items():
        assert driver.stdout.readline() == "ready\n"
        wanted = 3 if ENDS[name][0] == "fork" else 2
        while _started(folder / name) < wanted:
            time.sleep(0.02)
        before[name] = len(_living(folder / name))
    for name, driver in drivers.items():
        ENDS[name][1](driver)
    left, deadline = {}, time.monotonic() + PROMISE_S
    while len(left) < len(drivers):
        for name in drivers.keys() - left.keys():
            ended_itself = ENDS[name][0] in ("return", "raise") and drivers[name].poll() is not None
            living = _living(folder / name)
            if ended_itself or not living or time.monotonic() > deadline:
                left[name] = living
        time.sleep(0.05)
    outputs = {name: driver.communicate(timeout=PROMISE_S)[0] for name, driver in drivers.items()}
    return {name: Ended(driver.returncode, outputs[name], before[name], left[name]) for name, driver in drivers.items()}


def _started(pids: Path) -> int:
    return len(pids.read_text().split())


def _living(pids: Path) -> list[int]:
    numbers = [int(line) for line in pids.read_text().split()]
    return [n for n in numbers if psutil.pid_exists(n) and psutil.Process(n).status() != psutil.STATUS_ZOMBIE]


def _seconds_until_gone(living, limit_s: float) -> float:
    started = time.monotonic()
    while living() and time.monotonic() - started < limit_s:
        time.sleep(0.05)
    assert not living(), f"still alive after {limit_s} s: {living()}"
    return time.monotonic() - started


@pytest.mark.parametrize("name", [name for name, (how, _) in ENDS.items() if how == "wait"])
def test_a_killed_driver_leaves_nothing(ended, name):
    """A grandchild that ignores SIGTERM and left the session is gone in 10 s, whichever signal ends the driver, or its
    whole process group, which the watchdog is not in."""
    assert ended[name].before == 2
    assert ended[name].left == []


def test_a_forked_child_is_ended_too(ended):
    """A child of `os.fork`, whose environment block shows no marker, is ended as well."""
    assert ended["SIGKILL after a fork"].before == 3
    assert ended["SIGKILL after a fork"].left == []


@pytest.mark.parametrize(("name", "code"), [("return", 0), ("raise", 7)])
def test_leaving_the_block_ends_what_is_left(ended, name, code):
    """After the block, by return or by exception, nothing is left, and the exit code is the driver's own."""
    assert ended[name].code == code
    assert ("after" in ended[name].output) == (name == "return")
    assert ended[name].left == []


def test_an_empty_guard_costs_little():
    """With nothing to end, the block adds less than two seconds, leaves no child and no trace in the environment."""
    before = set(psutil.Process().children())
    environment = dict(os.environ)
    started = time.monotonic()
    with guard():
        assert MARKER in os.environ
    assert time.monotonic() - started < 2
    assert dict(os.environ) == environment
    assert set(psutil.Process().children()) <= before


def test_a_nested_guard_does_nothing():
    """Inside a guard, in the same process or a child, another guard starts nothing and ends nothing."""
    nested = (
        "import subprocess as s, sys; from flows.reaper import guard\nwith guard():\n"
        "  p = s.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], stdout=s.DEVNULL, stderr=s.DEVNULL)\n"
        "print(p.pid)"
    )
    with guard():
        token = os.environ[MARKER]
        children = len(psutil.Process().children())
        with guard():
            assert os.environ[MARKER] == token
            assert len(psutil.Process().children()) == children
        assert os.environ[MARKER] == token
        left = int(subprocess.run([sys.executable, "-c", nested], capture_output=True, check=True, text=True).stdout)
        assert psutil.pid_exists(left)
    _seconds_until_gone(lambda: psutil.pid_exists(left) and psutil.Process(left).status() != "zombie", PROMISE_S)


def test_processes_of_others_are_left_alone():
    """A process that was there before, and another guard's, survive this guard's end."""
    other = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], env={**os.environ, MARKER: "other"}
    )
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        with guard():
            pass
        assert (other.poll(), bystander.poll()) == (None, None)
    finally:
        for process in (other, bystander):
            process.kill()
            process.wait()


RAY_DRIVER = """
import os, time, ray
from flows.reaper import guard
with guard():
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    @ray.remote
    class Stubborn:
        def pid(self):
            return os.getpid()
        def busy(self):
            while True:
                pass
    actor = Stubborn.remote()
    print(ray.get(actor.pid.remote()), os.environ["CACHELOOM_SESSION"], flush=True)
    actor.busy.remote()
    time.sleep(600)
"""


@pytest.mark.ray
def test_a_killed_ray_driver_leaves_nothing():
    """After SIGKILL of a driver with a local Ray and a busy actor, no process of that Ray is left within 10 s."""
    environment = {key: value for key, value in os.environ.items() if key != MARKER}
    folder = tempfile.TemporaryDirectory(dir="/tmp", prefix="reaper-")  # pytest's is too long for Ray's sockets
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder.name}
    driver = subprocess.Popen(
        [sys.executable, "-c", RAY_DRIVER],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    actor, token = driver.stdout.readline().split()
    started = psutil.Process(driver.pid).children(recursive=True)
    assert psutil.Process(int(actor)) in started
    assert len(started) >= 3
    driver.kill()
    running = lambda: [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]  # noqa: E731
    seconds = _seconds_until_gone(running, PROMISE_S)
    driver.wait(timeout=10)
    assert _carriers(token) == [], f"after {seconds} s"
    folder.cleanup()


def _carriers(token: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == token:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found
