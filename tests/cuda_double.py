"""GPUs for a machine without one: tensors that say they lie on `cuda:0`, hold real numbers on the CPU, and refuse what CUDA refuses.

    with cuda_doubles(2) as counted:
        compare(base, tuned, device="cuda")
    assert counted.waits < 200

Every function of torch that meets such a tensor is looked at before the CPU computes it. Refused are: operands on two devices, `.numpy()`,
`data_ptr()`, a generator of another device, LAPACK by address, LAPACK's solvers with a driver they lack. Counted are calls that
would start work on the GPU, and those for which the host would wait. `fail` makes a solver of `torch.linalg` raise as cuSOLVER does.

What it cannot show: speed, rounding, kernels that do not exist, streams, memory. `benchmarks/gpu.sh` is for those.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter


class CudaDouble(Tensor):
    """A tensor on a GPU that is not there; `place` says on which."""

    place: torch.device

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})

    def __deepcopy__(self, memo: Any) -> Any:
        return memo.setdefault(id(self), self.detach().clone().requires_grad_(self.requires_grad))


KINDS: list[type[CudaDouble]] = [type(f"Cuda{i}", (CudaDouble,), {"place": torch.device("cuda", i)}) for i in range(8)]


@dataclass
class Counted:
    """What happened on the doubles since they were there.

    Attributes:
        calls: by function, the calls that start work on a GPU.
        waited: by function, those for which the host waits.
        threads: by function, the names of the threads that called it, in their order.
        failing: names of functions of `torch.linalg` that fail on a GPU as one that does not converge.
    """

    calls: Counter[str] = field(default_factory=Counter)
    waited: Counter[str] = field(default_factory=Counter)
    threads: dict[str, list[str]] = field(default_factory=dict)
    failing: set[str] = field(default_factory=set)

    @property
    def launches(self) -> int:
        return self.calls.total()

    @property
    def waits(self) -> int:
        return self.waited.total()


_counted = Counted()
_lock = threading.Lock()

# No work for a GPU: what a tensor is, and other views of the same numbers.
FREE = {
    *(
        "size",
        "dim",
        "stride",
        "numel",
        "element_size",
        "nelement",
        "is_contiguous",
        "storage_offset",
        "ndimension",
        "__len__",
    ),
    *(
        "is_floating_point",
        "is_complex",
        "requires_grad_",
        "detach",
        "detach_",
        "register_hook",
        "retain_grad",
        "__hash__",
        "backward",
    ),
    *(
        "is_pinned",
        "is_inference",
        "is_signed",
        "is_same_size",
        "get_device",
        "data_ptr",
        "numpy",
        "as_subclass",
        "_is_view",
    ),
    *(
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "t",
        "transpose",
        "permute",
        "expand",
        "expand_as",
        "narrow",
    ),
    *(
        "split",
        "chunk",
        "unbind",
        "select",
        "diagonal",
        "view_as",
        "movedim",
        "swapaxes",
        "__iter__",
        "iter",
        "unfold",
        "numpy_T",
    ),
    *(
        "__repr__",
        "__format__",
        "__reduce_ex__",
        "_make_subclass",
        "untyped_storage",
        "type",
        "result_type",
        "promote_types",
    ),
    *("empty", "empty_like", "new_empty", "is_cuda", "is_same", "is_nonzero_", "broadcast_tensors", "broadcast_shapes"),
    *("grad", "requires_grad", "data", "__get__", "__set__", "ravel", "mT", "T"),
}
# The host waits for the number, or for how many numbers there are.
WAITS = {
    *(
        "item",
        "tolist",
        "__float__",
        "__int__",
        "__bool__",
        "__index__",
        "__contains__",
        "equal",
        "allclose",
        "nonzero",
        "bincount",
    ),
    *("masked_select", "unique", "unique_consecutive", "cpu", "argwhere", "is_nonzero", "repeat_interleave", "histc"),
    *("eigh", "eigvalsh", "svd", "svdvals", "cholesky", "inv", "solve", "lstsq"),
}
# Arguments that may lie on the host beside tensors of a GPU.
ACROSS = {"to", "copy_", "__set__", "__getitem__", "__setitem__", "index_put_", "as_subclass", "set_data", "grad"}
IN_PLACE = {
    f"__i{operation}__" for operation in ("add", "sub", "mul", "truediv", "and", "or", "xor", "floordiv", "pow")
}
REFUSED = {"numpy", "data_ptr", "__array__", "__dlpack__", "untyped_storage"}
FACTORIES = {
    *(
        "empty",
        "zeros",
        "ones",
        "full",
        "eye",
        "arange",
        "linspace",
        "tensor",
        "as_tensor",
        "scalar_tensor",
        "rand",
        "randn",
        "randint",
    ),
    *("randperm", "empty_strided", "tril_indices", "triu_indices", "logspace", "asarray"),
}


def _name(func: Any) -> str:
    name = getattr(func, "__name__", func)
    return str(name).removeprefix("linalg_")


def _places(args: Any, kwargs: Any) -> dict[torch.device, list[Tensor]]:
    found: dict[torch.device, list[Tensor]] = {}
    for leaf in tree_iter((args, kwargs)):
        if isinstance(leaf, Tensor):
            found.setdefault(type(leaf).place if isinstance(leaf, CudaDouble) else torch.device("cpu"), []).append(leaf)
    return found


def device_of(given: Any) -> torch.device | None:
    """The device that an argument names; None for something else."""
    if isinstance(given, int) and not isinstance(given, bool):
        return torch.device("cuda", given)
    if not isinstance(given, str | torch.device):
        return None
    try:
        device = torch.device(given)
    except RuntimeError:
        return None
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _on(found: Any, device: torch.device) -> Any:
    """`found` with its tensors on `device`."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if device.type != "cuda":
            return leaf.as_subclass(Tensor) if isinstance(leaf, CudaDouble) else leaf
        return leaf if type(leaf) is KINDS[device.index] else leaf.as_subclass(KINDS[device.index])

    if (isinstance(found, tuple) and hasattr(found, "_fields")) or type(found).__module__ == "torch.return_types":
        return type(found)([move(leaf) for leaf in found])
    if isinstance(found, tuple | list):
        return type(found)(_on(leaf, device) for leaf in found)
    return move(found)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    """What torch would do with `func`, had it the GPUs."""
    name, places = _name(func), _places(args, kwargs)
    on = next((p for p in places if p.type == "cuda"), None)
    if name == "__get__" and on is not None:
        what = getattr(func.__self__, "__name__", "")
        if what == "device":
            return on
        if what == "is_cuda":
            return True
        if what == "is_cpu":
            return False
        if what == "dtype" or what == "shape":
            return _run(func, args, kwargs)
    if name == "_has_compatible_shallow_copy_type":  # a module that is moved gets new parameters
        return len(places) == 1
    asked = kwargs.get("device")
    wanted = None if asked is None else device_of(asked)
    if name in ("to", "cuda", "cpu"):
        return _moved(func, name, args, kwargs, on)
    if name in FACTORIES and on is None:
        if wanted is None or wanted.type != "cuda":
            return _run(func, args, kwargs)
        rng = kwargs.get("generator")
        if rng is not None and device_of(rng.device) != wanted:
            raise RuntimeError(f"Expected a '{wanted}' device type for generator but found '{rng.device}'")
        return _counting(name, _on(_run(func, args, kwargs | {"device": "cpu"}), wanted))
    if name in ("get_state", "set_state", "fork_rng") or (on is None and (wanted is None or wanted.type != "cuda")):
        return _run(func, args, kwargs)
    if on is None:
        return _counting(name, _on(_run(func, args, kwargs | {"device": "cpu"}), wanted or torch.device("cpu")))
    _refuse(func, name, args, kwargs, places)
    if wanted is not None:
        kwargs = kwargs | {"device": "cpu"}
    if "driver" in kwargs:
        if kwargs["driver"] not in (None, "gesvd", "gesvdj", "gesvda"):
            raise RuntimeError(f"linalg.svd: {kwargs['driver']} is no driver")
        kwargs = {k: v for k, v in kwargs.items() if k != "driver"}
    if name in _counted.failing:
        raise torch.linalg.LinAlgError(f"linalg.{name}: the algorithm failed to converge")
    if name in ("__getitem__", "__setitem__"):
        tensors = [x for x in tree_iter(args[1]) if isinstance(x, Tensor)]
        if name == "__getitem__" and not tensors:
            name = "view"
        elif any(x.dtype == torch.bool for x in tensors):
            name = "boolean index"
    if name == "__get__" or name == "__set__":
        found = _run(func, args, kwargs)
        return _on(found, on) if name == "__get__" else found
    found = _run(func, args, kwargs)
    if name in IN_PLACE or (name.endswith("_") and not name.endswith("__")):
        return _counting(name, args[0])
    return _counting(name, _on(found, wanted or on))


def _counting(name: str, found: Any) -> Any:
    if name not in FREE:
        with _lock:
            _counted.calls[name] += 1
            _counted.threads.setdefault(name, []).append(threading.current_thread().name)
            if name in WAITS or name == "boolean index":
                _counted.waited[name] += 1
    return found


def _moved(func: Any, name: str, args: Any, kwargs: Any, on: torch.device | None) -> Any:
    """`to`, `cuda` and `cpu`: where the tensor is to lie, which the double sees to, and its type, for the CPU to make."""
    own = args[0]
    here = type(own).place if isinstance(own, CudaDouble) else torch.device("cpu")
    target, dtype, copy = here, None, bool(kwargs.get("copy"))
    if name == "cpu":
        target = torch.device("cpu")
    elif name == "cuda":
        target = device_of([*args[1:], kwargs.get("device", "cuda")][0]) or torch.device("cuda", 0)
    else:
        flags = [a for a in args[1:] if isinstance(a, bool)]
        copy = copy or (len(flags) > 1 and flags[1])
        for given in (*args[1:], *(kwargs.get(k) for k in ("device", "dtype", "other"))):
            if isinstance(given, torch.dtype):
                dtype = given
            elif isinstance(given, Tensor):
                target = type(given).place if isinstance(given, CudaDouble) else torch.device("cpu")
                dtype = given.dtype
            elif given is not None and not isinstance(given, bool):
                target = device_of(given) or target
    if target.type == "cuda" and target.index >= torch.cuda.device_count():
        raise RuntimeError(f"CUDA error: invalid device ordinal {target.index}")
    if target == here and (dtype is None or dtype == own.dtype) and not copy:
        return own
    with torch._C.DisableTorchFunctionSubclass():
        plain = own.as_subclass(Tensor) if isinstance(own, CudaDouble) else own
        found = Tensor.to(plain, dtype or plain.dtype, copy=True)
        found = _on(found, target)
    if here.type == "cuda" and target.type == "cpu":
        _counting("cpu", None)
    elif "cuda" in (here.type, target.type):
        _counting("to" if target == here else "to cuda", None)
    return found


def _refuse(func: Any, name: str, args: Any, kwargs: Any, places: dict[torch.device, list[Tensor]]) -> None:
    if name in REFUSED:
        raise TypeError(f"can't convert cuda:0 device type tensor to numpy ({name}). Use Tensor.cpu() first.")
    rng = kwargs.get("generator")
    on = next(p for p in places if p.type == "cuda")
    if isinstance(rng, torch.Generator) and device_of(rng.device) != on:
        raise RuntimeError(f"Expected a '{on}' device type for generator but found '{rng.device}'")
    if name == "multinomial" and isinstance(rng, torch.Generator):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if name in ACROSS:
        # An index may lie on the host, but not on another GPU.
        if name in ("__getitem__", "index_put_") and len([p for p in places if p.type == "cuda"]) > 1:
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor")
        if name == "__getitem__" and not isinstance(args[0], CudaDouble):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        return
    others = [t for p, tensors in places.items() if p != on for t in tensors]
    if any(t.dim() or isinstance(t, CudaDouble) for t in others) or (
        others and (name in ("cat", "stack") or "fused" in name)
    ):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {on} and "
            f"{', '.join(str(p) for p in places if p != on)}! (in {name})"
        )


class _Everywhere(TorchFunctionMode):
    """Sees the functions that make a tensor or move one, which have no double among their arguments yet."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(func, args, kwargs or {})


@contextmanager
def cuda_doubles(count: int = 1, *, memory: int = 80 << 30) -> Iterator[Counted]:
    """`count` GPUs with `memory` free bytes each, in all threads that start meanwhile, and what is counted on them."""
    global _counted
    before, _counted = _counted, Counted()
    run = threading.Thread.run

    def with_doubles(thread: threading.Thread) -> None:
        with _Everywhere():
            run(thread)

    current = mock.Mock(return_value=0)
    patches = {
        "is_available": lambda: True, "device_count": lambda: count, "synchronize": lambda *_: None, "current_device": current,
        "mem_get_info": lambda *_: (memory, memory), "get_device_name": lambda *_: "a double of a GPU", "is_initialized": lambda: True,
        "max_memory_allocated": lambda *_: 0, "reset_peak_memory_stats": lambda *_: None, "empty_cache": lambda: None,
        "Stream": type("Stream", (), {"__new__": lambda *_: None}), "stream": lambda *_: nullcontext(), "manual_seed_all": lambda *_: None, "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": lambda *_: None,
    }  # fmt: skip
    with ExitStack() as stack:
        for name, stub in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        stack.enter_context(mock.patch.object(threading.Thread, "run", with_doubles))
        stack.enter_context(mock.patch.object(Tensor, "pin_memory", lambda tensor, *_: tensor))
        stack.enter_context(_Everywhere())
        try:
            yield _counted
        finally:
            _counted = before
