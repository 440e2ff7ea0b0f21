"""The accelerator: which device this process has, and all that depends on its make; no other module names one.

Through `torch.accelerator` where that suffices, else through torch's module of the device (`torch.get_device_module`),
which a device that is registered from Python has too. Everything else asks `is_gpu` alone: whatever is no CPU is one.
"""

from __future__ import annotations

import mmap
import os
import weakref
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import psutil
import torch

from flux2_core.errors import SetupError

CPU = torch.device("cpu")
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is what a user may still have


def here() -> torch.device:
    """The device of this process: its accelerator, or the CPU where torch can use none."""
    return torch.accelerator.current_accelerator(check_available=True) or CPU


def count() -> int:
    """Accelerators that this process sees."""
    return torch.accelerator.device_count()


def is_gpu(device: torch.device) -> bool:
    """Whether a device is an accelerator."""
    return device.type != "cpu"


def name(device: torch.device) -> str | None:
    """What a card is called ("NVIDIA H200"); None for a CPU, and for a make that does not tell."""
    tell = getattr(torch.get_device_module(device), "get_device_name", None)
    return None if tell is None else str(tell(device))


def total_bytes(device: torch.device) -> int | None:
    """Memory of a card; None for a CPU, and for a make that does not tell."""
    tell = getattr(torch.get_device_module(device), "get_device_properties", None)
    return None if tell is None else int(tell(device).total_memory)


def free_bytes(device: torch.device) -> int | None:
    """Memory of a card that nobody holds; all of it for a make that tells no more, None where nothing is told."""
    tell = getattr(torch.get_device_module(device), "mem_get_info", None)
    return total_bytes(device) if tell is None else int(tell(device)[0])


def let_segments_grow() -> None:
    """Have torch lengthen what it holds of a card instead of adding pieces, which leave gaps that nothing fits into.

    Called before the first tensor is there; a user's own setting stays as it is.
    """
    if not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def peak_bytes(device: torch.device) -> int:
    """Most memory that this process's tensors have taken on a card so far."""
    return int(torch.get_device_module(device).max_memory_allocated(device))


def free_host_bytes(group: Path = Path("/sys/fs/cgroup")) -> int:
    """Host memory that can still be had in this node, or in this container (`group` is its control group)."""
    free, most = int(psutil.virtual_memory().available), group / "memory.max"
    if most.is_file() and (limit := most.read_text().strip()) != "max":
        held = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, int(limit) - int(held["anon"]))  # what else it counts are mostly files' pages
    return free


def capability(device: torch.device) -> tuple[int, int] | None:
    """NVIDIA's compute capability; None for a CPU and for other makes."""
    tell = getattr(torch.get_device_module(device), "get_device_capability", None)
    found = None if tell is None else tell(device)
    return found if isinstance(found, tuple) else None


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Matmuls in bf16 where that is the base's precision; everything else, and the adapter's weights, in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


class Lane:
    """Copies from host memory to a device, beside what it computes; on a CPU they are real, and done at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.Stream(device) if is_gpu(device) else None

    def home(self, size: int) -> torch.Tensor:
        """So many bytes of host memory, in pages of their own from which the device copies while it computes.

        torch's own pinned memory comes in powers of two: 98.8 GB for the 62.8 of FLUX.2-dev's blocks in bf16. So plain
        pages are registered where the make can; where it cannot, the host waits for each copy.

        Raises:
            SetupError: they cannot be pinned.
        """
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory = torch.frombuffer(pages, dtype=torch.uint8)
        if runtime := getattr(torch.get_device_module(self.device), "cudart", None):
            if failed := int(runtime().cudaHostRegister(memory.data_ptr(), size, 0)):
                raise SetupError(
                    f"{size / 1e9:.2f} GB of host memory cannot be pinned (the runtime's error {failed}): give the "
                    'machine or its container more, or let less be streamed: train.precision="int8" or "int4"'
                )
            weakref.finalize(pages, runtime().cudaHostUnregister, memory.data_ptr()).atexit = False
        return memory

    def bring(self, home: torch.Tensor, there: torch.Tensor) -> Any:
        """Begin to copy over what lies `there`, once all is done that was asked of the device so far.

        Returns:
            What to `wait` for before it is used.
        """
        there = there[: home.nbytes]
        if self.stream is None:
            there.copy_(home)
            return None
        self.stream.wait_stream(torch.accelerator.current_stream(self.device))
        with self.stream:
            there.copy_(home, non_blocking=True)
            return self.stream.record_event()

    def wait(self, copied: Any) -> None:
        """Let what is computed from now on see a copy that was begun; the host goes on."""
        if self.stream is not None:
            torch.accelerator.current_stream(self.device).wait_event(copied)
