"""Code for a card is walked through at full size, on one that computes nothing, in a process that has that card."""

import json
import subprocess
import sys
from itertools import product

import pytest

from bench.full_size import SIZES
from bench.pretended import PRECISIONS, STRATEGIES

pytestmark = pytest.mark.pretended


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: torch keeps the card for as long as its process lives."""
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=540, check=False)


def test_a_spread_of_ways_goes_through() -> None:
    """Every strategy, every kind of precision, every policy and every method, as wide as klein-4B, in one process: none
    mixes devices, and none takes more than the planner says; the encoders too."""
    ways = [
        "resident bf16 none flow", "resident fp8-matmul selective blank", "ddp int4 3 flow", "fsdp int8 none dop",
        "hsdp int8-matmul selective flow", "stream fp8 full flow", "encode int8 projected", "resident bf16 full pairs",
        "resident bf16 3 routed", "ddp bf16 full edit",
        "fsdp int8 selective dora", "resident bf16 selective oft", "stream fp8 full t-lora",
        "stream int8 full slider",
    ]  # fmt: skip
    done = python("bench.pretended", "klein-4b", "--only", *ways)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("klein-4b")]
    assert sorted(line.split(":")[0] for line in told) == sorted(f"klein-4b {way}" for way in ways)


def test_faults_of_place_are_found() -> None:
    """What lies on the host where the card computes ends the walk, forward, backward, in an operator's insides, in a
    preview and in a streamed block."""
    done = python("tests.pretended_mutants")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told) == 4
    assert not {name: why for name, why in told.items() if not why or "same device" not in why}


@pytest.mark.slow
@pytest.mark.all_cases
@pytest.mark.parametrize(("strategy", "precision"), product(STRATEGIES, PRECISIONS))
def test_every_way_goes_through(strategy: str, precision: str) -> None:
    """Every policy and method with this strategy and precision, as wide as FLUX.2-dev."""
    done = python("bench.pretended", "dev", "--only", f"{strategy} {precision} ")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.all_cases
@pytest.mark.parametrize("model", SIZES)
def test_all_blocks_take_what_is_planned(model: str) -> None:
    """A step of the whole model keeps within the planner's figure, and comes near it."""
    done = python("bench.pretended", model, "--deep", "--only", "resident bf16 selective flow", "encode none")
    assert done.returncode == 0, done.stdout + done.stderr
