"""On an autoscaled cluster's head: have GPUs there while a command runs: `machines.py 16 -- cacheloom run my.toml ...`.

A run counts the GPUs that the cluster has when it begins. This asks Ray's autoscaler for so many, waits until they are
there, runs the command, and asks for none again, whatever came of it: the machines go after the idle time of `ray up`.
`machines.py 16` alone keeps them, `machines.py 0` lets them go.
"""

import argparse
import subprocess
import sys
import time

import ray
from ray.autoscaler.sdk import request_resources

LOOK_S = 5.0


def main() -> int:
    """Ask, wait, run, let go; the command's exit code, or 4 where the machines did not come."""
    parser = argparse.ArgumentParser(usage="machines.py NUMBER [options] [-- COMMAND ...]", description=__doc__)
    parser.add_argument("number", type=int)
    parser.add_argument("--resource", default="GPU", help="another resource of node types, such as `encoder`")
    parser.add_argument("--patience", type=float, default=1800, help="seconds to wait for machines")
    line = sys.argv[1:]
    end = line.index("--") if "--" in line else len(line)
    given, command = parser.parse_args(line[:end]), line[end + 1 :]
    ray.init(address="auto", log_to_driver=False, logging_level="error")
    request_resources(bundles=[{given.resource: 1}] * given.number)
    keep = False
    try:
        if not wait_for(given.resource, given.number, patience_s=given.patience):
            sys.stderr.write(f"not {given.number} {given.resource} after {given.patience:g} s: see `ray status`\n")
            return 4
        keep = not command
        return subprocess.call(command) if command else 0
    finally:
        if not keep:
            request_resources(bundles=[])


def wait_for(resource: str, number: int, *, patience_s: float) -> bool:
    """Whether the cluster has so many in time."""
    deadline = time.monotonic() + patience_s
    while ray.cluster_resources().get(resource, 0) < number:
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_S)
    return True


if __name__ == "__main__":
    sys.exit(main())
