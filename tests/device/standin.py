"""A device of torch that isn't there: its tensors lie in host memory, but mix with the host's as little as a GPU's would.

Importing it makes `standin` torch's one accelerator for the process, so it's for child processes. It has what Diffusers'
pipelines ask for, no more: `with Standin(): …`.
"""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "standin"
_setup_privateuseone_for_python_backend(NAME)
_COPIES = ("_to_copy", "copy_", "index_put_")
"""What may take tensors of both."""
_LIBRARY = torch.library.Library("aten", "IMPL")

crossed: Counter[tuple[str, tuple[int, ...]]] = Counter()
"""How often tensors crossed, by direction (`in`, `out`) and shape."""


class OnDevice(torch.Tensor):
    """A tensor of the device; `inner` is the host's that it consists of."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, inner):
        self.inner = inner

    def data_ptr(self):
        return self.inner.data_ptr()

    def tolist(self):
        crossed["out", tuple(self.shape)] += 1
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class Standin(TorchDispatchMode):
    """Where tensors are made, and moved, by the name of the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def host():
    """Return a context in which torch knows the host alone, as a module that computes there needs it."""
    return _disable_current_modes()


def inner_of(value):
    return value.inner if isinstance(value, OnDevice) else value


def run(func, args, kwargs):
    """Run an operation on what tensors consist of; refuse what no GPU would take."""
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there = any(isinstance(tensor, OnDevice) for tensor in tensors)
    if there and name not in _COPIES and any(tensor.ndim for tensor in tensors if not isinstance(tensor, OnDevice)):
        message = f"{func}: expected all tensors on one device, got {[str(tensor.device) for tensor in tensors]}"
        raise RuntimeError(message)
    stays = there
    if kwargs.get("device") is not None:
        stays = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name == "_local_scalar_dense" or (name == "_to_copy" and there != stays):
        crossed["in" if stays and not there else "out", tuple(args[0].shape)] += 1
    with _disable_current_modes():
        made = func(*tree_map(inner_of, args), **tree_map(inner_of, kwargs))
    if name.endswith("_"):
        return args[0]
    return tree_map(lambda value: OnDevice(value) if stays and isinstance(value, torch.Tensor) else value, made)


def _empty(size, stride=None, dtype=None, **_):
    return OnDevice(
        torch.empty(size, dtype=dtype) if stride is None else torch.empty_strided(size, stride, dtype=dtype)
    )


def _copy(source, target, *_):
    inner_of(target).copy_(inner_of(source))
    return target


# What torch makes of Python's numbers and lists comes by here, past the mode above.
_LIBRARY.impl("empty.memory_format", lambda size, dtype=None, **_: _empty(size, dtype=dtype), "PrivateUse1")
_LIBRARY.impl("empty_strided", _empty, "PrivateUse1")
_LIBRARY.impl("_copy_from", _copy, "PrivateUse1")
for _op in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.index.Tensor):
    _LIBRARY.impl(_op, lambda *args, op=_op, **kwargs: run(op, args, kwargs), "PrivateUse1")
