"""The accelerator's home: what it says of this machine's CPU, and of a make that only its own module knows."""

import gc
import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from flux2_core import accelerator
from flux2_core.accelerator import CPU, Lane
from flux2_core.config.sections import Config
from flux2_core.errors import SetupError, UsageError
from flux2_core.model import frozen_linear
from flux2_core.placement import build

CARD = torch.device("xpu")  # any that is neither a CPU nor NVIDIA's; nothing is computed on it


class Make:
    """What torch knows of a make: its memory, and numbers of its own."""

    def __init__(self, **told: object) -> None:
        self.told = told

    def get_device_properties(self, _device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(total_memory=24e9)

    def max_memory_allocated(self, _device: torch.device) -> int:
        return 7

    def get_device_capability(self, _device: torch.device) -> object:
        return self.told.get("capability")


class Busy(Make):
    """A make that tells what is free: another process holds some of it."""

    def mem_get_info(self, _device: torch.device) -> tuple[int, int]:
        return 20_000_000_000, 24_000_000_000


def test_a_cpu() -> None:
    """Without an accelerator the device is the CPU, which has no card's memory and no capability."""
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    assert (accelerator.here(), accelerator.count()) == (CPU, 0)
    assert not accelerator.is_gpu(accelerator.here())
    assert (accelerator.total_bytes(CPU), accelerator.free_bytes(CPU), accelerator.capability(CPU)) == (None,) * 3


def test_any_make_is_asked_through_torch(make_config: type[Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is no CPU is a GPU: its own module tells memory and peak; the planner and the precisions go by that."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: CARD)
    monkeypatch.setattr(torch, "get_device_module", lambda _device: Make(capability=(8, 0)))
    assert accelerator.here() == CARD
    assert accelerator.is_gpu(CARD)
    assert (accelerator.total_bytes(CARD), accelerator.peak_bytes(CARD)) == (24_000_000_000, 7)
    assert accelerator.free_bytes(CARD) == 24_000_000_000, "this make tells no more"
    assert build.compute_dtype(make_config().train, CARD) == torch.bfloat16
    with pytest.raises(UsageError, match=r"fp8-matmul: needs compute capability 8\.9, this card has 8\.0; use fp8,"):
        frozen_linear.swap(None, "fp8-matmul", dtype=torch.bfloat16, device=CARD)
    monkeypatch.setattr(torch, "get_device_module", lambda _device: Make(capability=(7, 4)))
    with pytest.raises(UsageError, match=r"int8-matmul: needs compute capability 7\.5, this card has 7\.4; use int8,"):
        frozen_linear.swap(None, "int8-matmul", dtype=torch.bfloat16, device=CARD)
    monkeypatch.setattr(torch, "get_device_module", lambda _device: Make(capability={"name": "another make's"}))
    assert accelerator.capability(CARD) is None
    monkeypatch.setattr(torch, "get_device_module", lambda _device: Busy())
    assert (accelerator.total_bytes(CARD), accelerator.free_bytes(CARD)) == (24_000_000_000, 20_000_000_000)
    monkeypatch.setattr(torch, "get_device_module", lambda _device: object())
    assert accelerator.free_bytes(CARD) is None
    assert accelerator.total_bytes(CARD) is None
    job = SimpleNamespace(config=make_config(), world=1)
    with pytest.raises(SetupError, match=r"this xpu does not say .* set cluster\.gpu_memory"):
        build.decide(job, CARD)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [None, *accelerator.ALLOCATOR])
def test_segments_grow_unless_a_user_says_otherwise(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    """torch's allocator lengthens its segments, as it reads when it is first used; a user's own setting stays."""
    for one in accelerator.ALLOCATOR:
        monkeypatch.delenv(one, raising=False)
    if name:
        monkeypatch.setenv(name, "max_split_size_mb:64")
    accelerator.let_segments_grow()
    found = [os.environ.pop(one, None) for one in accelerator.ALLOCATOR]
    wanted = {None: ["expandable_segments:True", None], accelerator.ALLOCATOR[0]: ["max_split_size_mb:64", None]}
    assert found == wanted.get(name, [None, "max_split_size_mb:64"])


@pytest.mark.parametrize(("limit", "free"), [(None, 50), ("max", 50), ("90", 50), ("60", 40)])
def test_free_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str | None, free: int) -> None:
    """What the machine has available, or less where a container's limit leaves less beside what its processes hold."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=50))
    if limit:
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.stat").write_text("anon 20\nfile 30\n")
    assert accelerator.free_host_bytes(tmp_path) == free


def test_autocast_follows_the_base() -> None:
    """Matmuls are in bf16 for a base in bf16, and in fp32 for any other."""
    a = torch.ones(2, 2)
    for dtype in (torch.bfloat16, torch.float32):
        with accelerator.autocast(CPU, dtype):
            assert (a @ a).dtype == dtype


def test_a_lane_brings_copies() -> None:
    """What is brought lies where it was told to, there at once on a CPU; the home is left alone."""
    lane = Lane(CPU)
    home, there = lane.home(3), torch.zeros(5, dtype=torch.uint8)
    home += torch.arange(3, dtype=torch.uint8)
    lane.wait(lane.bring(home, there))
    there += 1
    assert (home.tolist(), there.tolist()) == ([0, 1, 2], [1, 2, 3, 1, 1])


class Runtime:
    """A make's runtime that pins memory up to a limit, and knows which."""

    def __init__(self, limit: int) -> None:
        self.limit, self.pinned = limit, dict[int, int]()

    def cudaHostRegister(self, address: int, size: int, _flags: int) -> int:
        self.pinned |= {address: size} if size <= self.limit else {}
        return 0 if size <= self.limit else 2

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_memory_is_pinned_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes are pinned as are asked for, from the start of a page, and for as long as anything looks at them;
    memory that the runtime does not pin is refused with the way out."""
    runtime = Runtime(limit=100_000)
    monkeypatch.setattr(torch, "get_device_module", lambda _device: SimpleNamespace(cudart=lambda: runtime))
    memory = Lane(CPU).home(70_001)
    assert runtime.pinned == {memory.data_ptr(): 70_001}
    assert (memory.data_ptr() % mmap.PAGESIZE, memory.nbytes) == (0, 70_001)
    part = memory[5:].view(torch.uint8)
    del memory
    gc.collect()
    assert runtime.pinned
    del part
    gc.collect()
    assert not runtime.pinned
    with pytest.raises(SetupError, match=r"cannot be pinned \(the runtime's error 2\): give the machine"):
        Lane(CPU).home(100_001)
