"""A card that computes nothing: torch takes it for a device, and knows of its tensors their dtype, shape and place.

Registered from Python (`PrivateUse1`), under `FakeTensorMode`. So code for a card is walked through on any machine: a
tensor that lies in the wrong place, a product that the card's kernels refuse, an attribute that only one make has.
Autograd's thread of the device runs too. Counted besides are the bytes of all tensors that are alive on the card.

What it cannot show: values, speed, and what a compiler would say. A number that is read from the card is 0, but where
it was written there just before; what is asked of a model's statistics is answered as for sound ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from flux2_core.lora import layer
from flux2_core.model import frozen_linear

NAME = "pretended"
CAPABILITY = (9, 0)  # of the H100 for which it stands
TOTAL = 80e9
AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
LOWERED = ("linear", "matmul", "mm", "bmm", "addmm", "conv2d")  # of what autocast runs in bf16 on a card
ATEN = torch.ops.aten
HANDED_ON = {ATEN.detach.default, ATEN.alias.default, ATEN.unbind.int, ATEN.select.int, ATEN.any.default}


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, dropout: float = 0.0,
    causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """One fused kernel, as a card has it; torch would take a make of Python for one that has none."""
    return ATEN._scaled_dot_product_fused_attention_overrideable(q, k, v, mask, dropout, causal, scale=scale)[0]


INSIDE: dict[Any, Callable[..., Any]] = {  # operators of ours, of which fake tensors would see the outside only
    ATEN.scaled_dot_product_attention.default: _attention,
    torch.ops.cacheloom.frozen_linear.default: frozen_linear.multiply._init_fn,
    torch.ops.cacheloom.frozen_linear_gradient.default: frozen_linear.input_gradient._init_fn,
    torch.ops.cacheloom.adapted.default: layer.adapted._init_fn,
}


class Fake(FakeTensorMode):
    """Fake tensors beside which real ones may stand, and which ask no driver for a device."""

    avoid_device_init = True

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        # Or else each fake that was made of a real tensor is looked at from here, and `Module.to` will not replace it.
        self.fake_tensor_converter.meta_converter.tensor_memo = Forgetful()


class Forgetful(dict[Any, Any]):
    """Keeps the last entry only."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.clear()
        super().__setitem__(key, value)


class Card(TorchDispatchMode):
    """Sees every operator before the fake tensors do: answers what is read, looks into operators, counts bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        if func is ATEN._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            with unset_fake_temporarily():
                return (torch.zeros((), dtype=args[0].dtype) if (value := known(args[0])) is None else value).item()
        if func is ATEN.equal.default:
            return True
        if func is ATEN._scaled_mm.default and args[1].stride(0) != 1:
            raise RuntimeError("a card multiplies in fp8 by a factor that lies column by column")
        if func in INSIDE:
            with self:
                return INSIDE[func](*args, **kwargs)
        found = func(*args, **kwargs)
        _remember(func, args, found)
        for tensor in tree_leaves(found):
            if isinstance(tensor, FakeTensor) and tensor.fake_device.type == NAME:
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: torch.UntypedStorage) -> None:
        if (key := storage._cdata) not in self.alive:
            self.alive[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.now -= self.alive.pop(key)

    def _resized(self, storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        """FSDP2 gives a gathered weight's bytes back while its tensor stays."""
        found = RESIZE(storage, size)
        if (key := storage._cdata) in self.alive:
            self.now += size - self.alive[key]
            self.peak, self.alive[key] = max(self.peak, self.now), size
        return found


def known(tensor: torch.Tensor) -> torch.Tensor | None:
    """The values of a small tensor that was written a moment ago."""
    if not isinstance(tensor, FakeTensor):
        return tensor
    return vars(tensor).get("written")


def _remember(func: Any, args: tuple[Any, ...], found: Any) -> None:
    """Let what was written with few values, and parts of it, keep them; and answer what asks for sound statistics."""
    if func is ATEN.all.default or (func is ATEN.any.default and known(args[0]) is None):
        with unset_fake_temporarily():
            found.written = torch.tensor(func is ATEN.all.default or args[0].dtype != torch.bool)
    elif func.overloadpacket in (ATEN.lift_fresh, ATEN._to_copy, ATEN.to) or func in HANDED_ON:
        value = known(args[0])
        if value is None or value.numel() > 8:
            return
        with unset_fake_temporarily():
            values = func(value, *args[1:]) if func in HANDED_ON else value
        for tensor, kept in zip(tree_leaves(found), tree_leaves(values), strict=True):
            if isinstance(tensor, FakeTensor):
                tensor.written, tensor.constant = kept, None  # of a constant fake tensors would compute, on no card


class Stream:
    """Of a card on which everything is done at once: to wait is nothing, to record gives something to wait for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def _done(self, *_: Any, **__: Any) -> Stream:
        return self

    wait_stream = wait_event = record_event = record = wait = synchronize = _done


def module() -> SimpleNamespace:
    """What torch, its FSDP2 and `flux2_core.accelerator` ask of a make: `torch.pretended`."""
    stream = Stream()
    return SimpleNamespace(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        set_device=lambda _device: None,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda _seed: None,
        get_amp_supported_dtype=lambda: [torch.bfloat16],
        get_device_capability=lambda _device=None: CAPABILITY,
        get_device_properties=lambda _device=None: SimpleNamespace(total_memory=TOTAL),
        Stream=Stream,
        Event=Stream,
        current_stream=lambda _device=None: stream,
        stream=lambda stream: stream,
    )


RESIZE = torch.UntypedStorage.resize_
KEPT: list[torch.library.Library] = []  # what is registered lives as long as its library


def register() -> torch.device:
    """Have torch know the card, once in a process."""
    if not KEPT:
        _setup_privateuseone_for_python_backend(NAME, backend_module=module())
        KEPT.extend(torch.library.Library(name, "IMPL") for name in ("aten", "_"))
        for name in LOWERED:
            KEPT[0].impl(name, _lowered(getattr(ATEN, name)), "AutocastPrivateUse1")
        KEPT[0].impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
        KEPT[1].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return torch.device(NAME, 0)


def _lowered(operator: Any) -> Callable[..., torch.Tensor]:
    def kernel(*args: Any, **kwargs: Any) -> torch.Tensor:
        low = torch.get_autocast_dtype(NAME)
        with torch._C._ExcludeDispatchKeyGuard(AUTOCAST):
            lowered = (one.to(low) if torch.is_tensor(one) and one.is_floating_point() else one for one in args)
            return operator(*lowered, **kwargs)

    return kernel


def for_real(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with real tensors: for what reckons on the host, as who is whose neighbour in a mesh."""

    def real(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return real


@contextmanager
def card() -> Iterator[Card]:
    """Have every tensor fake inside, and the card's own counted."""
    register()
    counting = Card()
    resize = mock.patch.object(torch.UntypedStorage, "resize_", lambda own, size: counting._resized(own, size))
    with resize, Fake(), counting:
        yield counting
