"""Machines on one: namespaces of Linux behind a bridge, each with an address, a name, files and processes of its own.

A machine has its own /tmp, /dev/shm, home (/mnt/home) and model folder (/mnt/model); /mnt/shared is one folder of all
of them. The bridge lies in a namespace too, so that nothing of it is seen on the real machine. A machine ends with
whoever started it: its first process waits for the end of its standard input.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
WITHOUT = "CACHELOOM_TEST_NO_NAMESPACES"  # set where the machine cannot: these tests are then left out
START_S = 60
PRESERVED = ("PATH", "LANG", "OMP_NUM_THREADS")
FIRST = """
set -e
name=$1 own=$2 shared=$3; shift 3
mount -t tmpfs -o mode=0755 none /mnt
mkdir /mnt/home /mnt/model /mnt/shared
mount --bind "$own/model" /mnt/model
mount --bind "$shared" /mnt/shared
for kept; do  # of what lies in the real /tmp
    case $kept in /tmp/*) mkdir -p "$own$kept"; mount --bind "$kept" "$own$kept";; esac
done
mount --rbind "$own/tmp" /tmp
mount -t tmpfs -o size=256m none /dev/shm
hostname "$name"
echo ready
while read -r _; do :; done
"""


def refusal() -> str | None:
    """Why no machine can be made here; None where one can."""
    if not sys.platform.startswith("linux"):
        return "namespaces are Linux's"
    tried = ["ip", "netns", "add", name := f"cacheloom-{secrets.token_hex(3)}"]
    try:
        made = subprocess.run(tried, capture_output=True, text=True)
        if made.returncode == 0:
            entered = ["ip", "netns", "exec", name, "unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "true"]
            made = subprocess.run(entered, capture_output=True, text=True)
            subprocess.run(["ip", "netns", "delete", name], check=True)
    except FileNotFoundError as error:
        return f"{error.filename} is missing (packages iproute2 and util-linux)"
    return made.stderr.strip() if made.returncode else None


@dataclass
class Machine:
    """One machine, which runs until `die`."""

    name: str
    address: str
    own: Path
    space: str
    first: subprocess.Popen
    switch: str
    port: str
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        """The real number of its first process, which is 1 inside."""
        return psutil.Process(self.first.pid).children()[0].pid

    def line(self, *command: str | Path) -> list[str]:
        """What starts a command there."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--net", "--uts", "--ipc", "--pid"]
        return [*enter, "env", f"--chdir={ROOT}", *map(str, command)]

    def run(
        self, *command: str | Path, check: bool = True, timeout_s: float = 300, **more: str
    ) -> subprocess.CompletedProcess:
        """Run a command there to its end; `more` is added to its environment."""
        ran = subprocess.run(
            self.line(*command), env=self.environment | more, capture_output=True, text=True, timeout=timeout_s
        )
        assert not check or ran.returncode == 0, f"{self.name}: {command}\n{ran.stdout}\n{ran.stderr}"
        return ran

    def start(self, *command: str | Path, log: Path, **more: str) -> subprocess.Popen:
        """Start a command there, its output into a file."""
        with log.open("wb") as out:
            return subprocess.Popen(
                self.line(*command), env=self.environment | more, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def processes(self) -> list[psutil.Process]:
        """Its living processes."""
        space, found = os.stat(f"/proc/{self.pid}/ns/pid").st_ino, []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if os.stat(f"/proc/{process.pid}/ns/pid").st_ino == space:
                    found.append(process)
        return found

    def works(self, name: str) -> bool:
        """Whether a process of that name runs there; Linux keeps fifteen letters of it."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.name().startswith(name[:15]):
                    return True
        return False

    def networks(self) -> set[int]:
        """The networks that its processes are in."""
        found = set()
        for process in self.processes():
            with contextlib.suppress(OSError):
                found.add(os.stat(f"/proc/{process.pid}/ns/net").st_ino)
        return found

    def die(self) -> None:
        """The cable first, so that nobody hears of it; then every process at once."""
        if self.first.poll() is None:
            ip("-n", self.switch, "link", "set", self.port, "down")
            os.kill(self.pid, signal.SIGKILL)
            self.first.wait(30)
            ip("netns", "delete", self.space)
            ip("-n", self.switch, "link", "delete", self.port, check=False)  # goes with the namespace, but later


@dataclass
class Network:
    """A bridge and the machines at it."""

    folder: Path
    name: str = field(default_factory=lambda: f"cacheloom-{secrets.token_hex(3)}")
    machines: list[Machine] = field(default_factory=list)

    @property
    def shared(self) -> Path:
        """The folder of all, as the real machine sees it."""
        return self.folder / "shared"

    def machine(self, name: str, **environment: str) -> Machine:
        """Start one more machine."""
        number = len(self.machines) + 1
        space, port, address = f"{self.name}-{number}", f"port{number}", f"10.77.0.{number}"
        own = self.folder / f"{number}-{name}"
        for inner in ("model", "tmp"):
            (own / inner).mkdir(parents=True)
        ip("netns", "add", space)
        ip("-n", self.name, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("-n", self.name, "link", "set", port, "master", "bridge0", "up")
        ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
        for interface in ("lo", "eth0"):
            ip("-n", space, "link", "set", interface, "up")
        alone = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]
        script = ["bash", "-c", FIRST, "first", name, own, self.shared, ROOT, BIN.parent]
        command = ["ip", "netns", "exec", space, *alone, *script]
        first = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert first.stdout.readline() == "ready\n", f"{name}: did not start"
        kept = {key: value for key, value in os.environ.items() if key in PRESERVED}
        mine = {"HOME": "/mnt/home", "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "DO_NOT_TRACK": "1"}
        made = Machine(name, address, own, space, first, self.name, port, kept | mine | environment)
        made.environment["PATH"] = f"{BIN}:{kept.get('PATH', '')}"
        self.machines.append(made)
        return made


@contextlib.contextmanager
def network(folder: Path) -> Iterator[Network]:
    """A bridge without machines; what was added to it is gone at the end."""
    if reason := refusal():
        if os.environ.get(WITHOUT):
            pytest.skip(f"{WITHOUT} is set: {reason}")
        pytest.fail(
            f"a cluster of machines cannot be made here ({reason}); run as root where namespaces are allowed, or set "
            f"{WITHOUT}=1 to leave these tests out"
        )
    made = Network(folder)
    made.shared.mkdir()
    ip("netns", "add", made.name)
    try:
        ip("-n", made.name, "link", "add", "bridge0", "type", "bridge")
        ip("-n", made.name, "link", "set", "bridge0", "up")
        yield made
    finally:
        for machine in made.machines:
            machine.die()
        ip("netns", "delete", made.name)


def ip(*arguments: str, check: bool = True) -> str:
    ran = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert not check or ran.returncode == 0, f"ip {' '.join(arguments)}: {ran.stderr}"
    return ran.stdout


RAY = ("--object-store-memory=80000000", "--disable-usage-stats")


def give_token(machine: Machine, token: str) -> None:
    """Ray's token as a file that nobody else may read, as docs/security.md says."""
    machine.run("sh", "-c", 'umask 077; mkdir -p ~/.ray; printf %s "$TOKEN" > ~/.ray/auth_token', TOKEN=token)


def ray_head(machine: Machine) -> str:
    """Start Ray's head, which does no work; return the address at which others join."""
    machine.run(
        *(BIN / "ray", "start", "--head", f"--node-ip-address={machine.address}", "--port=6379", "--num-cpus=0"),
        *("--dashboard-host=127.0.0.1", *RAY),
    )
    return f"{machine.address}:6379"


def ray_join(machine: Machine, head: str, *, cpus: int = 2, check: bool = True, **resources: float) -> str:
    """Have a machine join; return what Ray said."""
    more = [f"--resources={json.dumps(resources)}"] if resources else []
    ran = machine.run(
        *(BIN / "ray", "start", f"--address={head}", f"--node-ip-address={machine.address}", f"--num-cpus={cpus}"),
        *(*RAY, *more),
        check=check,
    )
    assert check or ran.returncode, f"{machine.name} was taken in:\n{ran.stdout}"
    return ran.stdout + ran.stderr
