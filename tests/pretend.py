"""A device that is not there: its tensors lie in the processor's memory, and refuse to meet those that say so.

It stands in for a GPU where there is none. What a GPU refuses is refused here too: an operation on tensors of two
devices (numbers aside), and numpy on a tensor that was not copied back. Arithmetic is the processor's, so results are
the same to the last bit. How fast anything is, and which kernels run, is not shown.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import torch
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
BOTH = {"aten::copy_", "aten::_to_copy", "aten::set_"}
"""Operations that bring two devices together on purpose."""
INDEXED = {"aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put"}
"""Operations whose indices may lie on the processor."""
RESIZED = ("arange", "arange.start", "arange.start_step", "eye", "eye.m", "randperm", "linspace")
"""What torch would make by giving an empty tensor another size, which a wrapper cannot follow."""
WHOLE = ("aten::silu_backward",)
"""What the processor has a kernel for, and torch would make of other operations elsewhere, with other last bits."""
LIBRARIES: list[torch.library.Library] = []
COUNTS: Counter[str] = Counter()
"""Operations on the device, all together and by name, and bytes that were moved `to` and `from` it."""


@cache
def _register() -> torch.library.Library:
    """Makes the device known to torch; what makes tensors out of nothing arrives in the fallback."""
    _setup_privateuseone_for_python_backend(NAME)
    _device_constructors()  # torch looks them up once, and would find the one that is exchanged below
    library = torch.library.Library("_", "IMPL")
    library.fallback(lambda func, *args, **kwargs: _dispatch(func, args, kwargs), "PrivateUse1")
    for name in (*RESIZED, *(name.removeprefix("aten::") for name in WHOLE)):
        packet, _, overload = name.partition(".")
        func = getattr(getattr(torch.ops.aten, packet), overload or "default")
        made = torch.library.Library("aten", "IMPL")
        made.impl(name, partial(_made, func), "PrivateUse1")
        LIBRARIES.append(made)
    torch.ones(1).to(NAME).requires_grad_().sum().backward()  # autograd counts devices when it is used first
    return library


def _made(func: Any, *args: Any, **kwargs: Any) -> Any:
    return _dispatch(func, args, kwargs)


class There(torch.Tensor):
    """A tensor on the device; `inner` holds its numbers."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> There:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    @property
    def data(self) -> torch.Tensor:
        found: torch.Tensor = torch.Tensor.data.__get__(self)
        return found

    @data.setter
    def data(self, value: There) -> None:  # torch exchanges what it knows of the tensor, and not what is kept here
        torch.Tensor.data.__set__(self, value)
        self.inner = value.inner

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)  # a list is made a tensor where nobody sees it
        return super().__getitem__(tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts))

    def __repr__(self, **_: Any) -> str:
        return f"There({self.inner})"


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    if func.name() not in WHOLE and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key):
        found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
    name = func._schema.name
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
    there = [each for each in tensors if isinstance(each, There)]
    here = [each for each in tensors if not isinstance(each, There) and not each.is_meta]
    strange = here if name not in INDEXED else [each for each in here if each is args[0]]
    if there and name not in BOTH and any(each.dim() for each in strange):
        shapes = [tuple(each.shape) for each in there], [tuple(each.shape) for each in here]
        raise RuntimeError(f"{func} meets tensors of two devices: {shapes[0]} on {NAME}, {shapes[1]} on the CPU")
    goes_there = _is_there(kwargs["device"]) if kwargs.get("device") is not None else bool(there)
    if name == "aten::copy_":
        goes_there = isinstance(args[0], There)
    if name in BOTH:
        source = args[1] if name == "aten::copy_" else args[0]
        if isinstance(source, There) != goes_there:
            COUNTS["to" if goes_there else "from"] += source.numel() * source.element_size()
    if goes_there:
        COUNTS["operations"] += 1
        COUNTS[name] += 1
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
    bare, bare_kwargs = tree_map(lambda each: each.inner if isinstance(each, There) else each, (args, kwargs))
    found = func(*bare, **bare_kwargs)
    known = {id(each.inner): each for each in there}
    views_plain = any(not each.is_inference() for each in there)  # a view of a plain tensor counts its versions

    def wrap(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, There) or not goes_there or value.is_meta:
            return value
        known_as = known.get(id(value))
        if known_as is not None:  # what was changed in place stays the tensor that it was
            return known_as
        with torch.inference_mode(torch.is_inference_mode_enabled() and not views_plain):
            return There(value)

    return tree_map(wrap, found)


@contextlib.contextmanager
def device() -> Iterator[str]:
    """Yields the name of the device, which is there as long as the block is."""
    COUNTS.clear()
    plain = torch.tensor

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if not _is_there(device):
            return plain(data, *args, **({} if device is None else {"device": device}), **kwargs)
        return plain(data, *args, **kwargs).to(device)  # torch would make this one without asking anybody

    torch.tensor = tensor  # type: ignore[assignment]
    try:
        yield NAME
    finally:
        torch.tensor = plain


_register()  # before autograd is used, with or without the device
