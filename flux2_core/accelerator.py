"""The accelerator: which device this process has, and all that depends on its make; no other module names one.

Through `torch.accelerator` where that suffices, else through torch's module of the device (`torch.get_device_module`),
which a device that is registered from Python has too. Everything else asks `is_gpu` alone: whatever is no CPU is one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

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

    def home(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor in memory from which the device copies while it computes."""
        return tensor if self.stream is None else tensor.pin_memory()

    def bring(self, tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], Any]:
        """Begin to copy; returns the tensors there, and what to `wait` for before they are used."""
        if self.stream is None:
            return [tensor.clone() for tensor in tensors], None
        with self.stream:
            there = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
            copied = self.stream.record_event()
        current = torch.accelerator.current_stream(self.device)
        for tensor in there:
            tensor.record_stream(current)
        return there, copied

    def wait(self, copied: Any) -> None:
        """Let what is computed from now on see a copy that was begun; the host goes on."""
        if copied is not None:
            torch.accelerator.current_stream(self.device).wait_event(copied)
