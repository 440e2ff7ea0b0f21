"""A command watched from outside while it runs: where it listens, whom it lets in, which words its processes carry."""

import contextlib
import ipaddress
import json
import os
import stat
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil

from tests.flows.command import Project

NODES = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
STRANGER = "https://evil.example"


@dataclass
class Watched:
    """What was seen until it ended."""

    told: dict[str, Any] = field(default_factory=dict)
    said: str = ""
    listening: dict[tuple[str, int], tuple[str, int]] = field(default_factory=dict)  # address, port -> process, its id
    words: set[str] = field(default_factory=set)  # of command lines
    processes: dict[int, tuple[str, int]] = field(default_factory=dict)  # what each was called last, times it was seen
    modes: dict[str, int] = field(default_factory=dict)  # of the token's file, and of the folder of Ray's sessions
    secrets: dict[str, str] = field(default_factory=dict)  # the run's own
    ray: dict[str, str] = field(default_factory=dict)  # who asked -> what Ray's GCS said
    prefect: dict[str, httpx.Response] = field(default_factory=dict)


def watch(project: Project, verb: str, *arguments: str) -> Watched:
    """Run `cacheloom VERB ... --json` to its end, which must be a good one."""
    seen = Watched()
    process = project.start(verb, *arguments, "--json")
    driver = psutil.Process(process.pid)
    before: list[set[str]] = [set(), set()]  # a new socket is looked for twice: its process may be newer than `ours`
    while process.poll() is None:
        ours = [driver, *driver.children(recursive=True)]
        for one in ours:
            with contextlib.suppress(psutil.Error, OSError):  # it ended meanwhile
                seen.words |= {*(line := one.cmdline())}
                name, times = seen.processes.get(one.pid, ("", 0))
                seen.processes[one.pid] = " ".join(line).strip() or name, times + 1
        if (waiting := _waiting()).keys() - before[0]:
            for one in ours:
                with contextlib.suppress(psutil.Error, OSError):
                    _look(one, waiting, seen)
        before = [before[1], {*waiting}]
        time.sleep(0.2)
    text = (project.folder / f"{verb}.log").read_text()
    assert process.returncode == 0, text
    seen.said, brace, rest = text.partition("{\n")
    seen.told = json.loads(brace + rest)
    return seen


def _waiting() -> dict[str, tuple[str, int]]:
    """Address and port of every socket of this machine that waits for others, by its inode.

    Read off the kernel's tables: psutil reads them, and every process's files, once for each process.
    """
    found = {}
    for name in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path("/proc/net", name).read_text().splitlines()[1:]:
            words = line.split()
            (host, port), (_, beyond), state = (*(word.split(":") for word in words[1:3]), words[3])
            if state == "0A" if name.startswith("tcp") else int(beyond, 16) == 0:
                parts = struct.unpack(f">{len(host) // 8}I", bytes.fromhex(host))
                packed = struct.pack(f"<{len(parts)}I", *parts)  # words as this machine holds them
                found[words[9]] = ipaddress.ip_address(packed).compressed, int(port, 16)
    return found


def _look(process: psutil.Process, waiting: dict[str, tuple[str, int]], seen: Watched) -> None:
    """Note where one process waits now, and ask servers that are new."""
    for file in Path(f"/proc/{process.pid}/fd").iterdir():
        inode = os.readlink(file).removeprefix("socket:[").removesuffix("]")
        place = waiting.get(inode)
        if place and seen.listening.get(place, ("", 0))[1] != process.pid:  # one may hand it to another
            seen.listening[place] = process.name(), process.pid
            _knock(process, place[1], seen)


def _knock(process: psutil.Process, port: int, seen: Watched) -> None:
    environment = process.environ()
    if process.name() == "gcs_server":
        file = Path(environment["RAY_AUTH_TOKEN_PATH"])
        seen.modes = {"token": stat.S_IMODE(file.stat().st_mode)}
        seen.modes["sessions"] = stat.S_IMODE(Path(environment["TMPDIR"], f"ray-{os.getuid()}").stat().st_mode)
        seen.secrets["Ray's token"] = file.read_text()
        for who, token in {"nobody": None, "a stranger": "0" * 64, "we": file.read_text()}.items():
            seen.ray[who] = _ask_ray(f"127.0.0.1:{port}", token)
    elif "prefect.server.api.server:create_app" in process.cmdline():
        seen.secrets["Prefect's password"] = environment["PREFECT_SERVER_API_AUTH_STRING"]
        known = httpx.BasicAuth(*seen.secrets["Prefect's password"].split(":"))
        url = f"http://127.0.0.1:{port}/api/flow_runs/filter"
        for who, how in {
            "nobody": {},
            "we": {"auth": known},
            "a page": {"auth": known, "headers": {"origin": STRANGER}},
        }.items():
            seen.prefect[who] = httpx.post(url, json={}, timeout=30, **how)


def _ask_ray(address: str, token: str | None) -> str:
    """Ask Ray's GCS for its nodes: `OK`, or the name of gRPC's status."""
    metadata = [] if token is None else [("authorization", f"Bearer {token}")]
    with grpc.insecure_channel(address) as channel:
        try:
            channel.unary_unary(NODES)(b"", metadata=metadata, timeout=30)
        except grpc.RpcError as error:
            return error.code().name
    return "OK"
