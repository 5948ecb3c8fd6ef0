"""A memory checker for kernels that Triton's interpreter runs.

On a GPU a lane that leaves its tensor reads whatever lies there, and the interpreter may do so too without a word.
Here each access of a lane that is not masked off must lie in a tensor that the kernel was given, between the first
and the last byte that the tensor's own shape and strides reach: a view is a fence, whatever its storage holds beside
it. In one launch no two programs may store to one place, no lanes of one store overlap, and none may load what
another one has stored, since programs run in no order. 32-bit integers may not wrap around.

It replaces methods of the interpreter's builder, which are Triton's own business: `VERSIONS` says of which versions.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any, NoReturn

import numpy as np

VERSIONS = ("3.6", "3.7", "3.8", "3.9")
"""Versions of Triton whose interpreter has been read."""

INT32 = np.iinfo(np.int32)

ARITHMETIC = (np.add, np.subtract, np.multiply)


class KernelMemoryError(AssertionError):
    """A kernel touches what is not its own, or computes with an integer that has wrapped around."""


class Launch:
    """Memory of one launch of a kernel, and the stores of its programs so far."""

    def __init__(self, kernel: str, named: list[tuple[str, Any]]) -> None:
        spans: list[tuple[int, int, str]] = []
        for low, high, name in sorted((*span, name) for name, tensor in named if (span := reach(tensor)) is not None):
            if spans and low < spans[-1][1]:  # views of one storage, such as q, k and v of one projection
                spans[-1] = (spans[-1][0], max(high, spans[-1][1]), f"{spans[-1][2]} and {name}")
            else:
                spans.append((low, high, name))
        self.kernel, self.names = kernel, [name for *_, name in spans]
        self.low = np.array([low for low, *_ in spans], np.int64)
        self.high = np.array([high for _, high, _ in spans], np.int64)
        self.owners: dict[int, np.ndarray] = {}

    def fail(self, problem: str) -> NoReturn:
        raise KernelMemoryError(f"{self.kernel}: {problem} at {kernel_line()}")

    def check(self, kind: str, addresses: np.ndarray, width: int) -> int:
        """Check addresses, in bytes, and return the span that they lie in, or -1 if there are several."""
        first, last = int(addresses.min()), int(addresses.max()) + width
        place = int(np.searchsorted(self.low, first, side="right")) - 1
        if place >= 0 and last <= self.high[place]:
            return place
        places = np.searchsorted(self.low, addresses, side="right") - 1
        outside = (places < 0) | (addresses + width > self.high[np.maximum(places, 0)])
        if outside.any():
            address = int(addresses[outside][0])
            near = int(np.argmin(np.minimum(np.abs(self.low - address), np.abs(self.high - address))))
            self.fail(
                f"{kind} of {int(outside.sum())} of {outside.size} lanes outside of every tensor, the first "
                f"{address - int(self.low[near])} bytes from the start of `{self.names[near]}`, "
                f"which has {int(self.high[near] - self.low[near])}"
            )
        return -1

    def own(self, place: int, addresses: np.ndarray, program: int, *, stores: bool) -> None:
        """Check that no other program of this launch has stored here, and note a store."""
        if not stores and place not in self.owners:
            return
        if place not in self.owners:
            self.owners[place] = np.zeros(self.high[place] - self.low[place], np.int32)
        owners, at = self.owners[place], addresses - self.low[place]
        others = owners[at]
        if ((others != 0) & (others != program)).any():
            self.fail(f"two programs store to one place of `{self.names[place]}`" if stores else
                      f"a program loads what another one stores in `{self.names[place]}`")  # fmt: skip
        if stores:
            owners[at] = program
            if np.unique(at).size != at.size:
                self.fail(f"lanes of one store overlap in `{self.names[place]}`")


def reach(tensor: Any) -> tuple[int, int] | None:
    """Return the first byte of a tensor and the one behind its last, by its own shape and strides; None if empty."""
    if not tensor.numel():
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def kernel_line() -> str:
    """Return where a kernel is: the innermost frame outside of Triton, NumPy and this file."""
    frames = reversed(traceback.extract_stack())
    other = ("/triton/", "/numpy/", __file__)
    frame = next(frame for frame in frames if not any(part in frame.filename for part in other))
    return f"{frame.filename.rpartition('/')[2]}:{frame.lineno}: {frame.line}"


@contextmanager
def checked_kernels() -> Iterator[list[str]]:
    """Check every kernel that the interpreter runs in a `with` block; yields the names of those launched.

    Raises:
        KernelMemoryError: at the first fault, inside the kernel; the interpreter wraps it in its own error.
        RuntimeError: if Triton is of another version than `VERSIONS`.
    """
    import triton.runtime.interpreter as interpreter
    from triton.tools.tensor_descriptor import TensorDescriptor

    installed = ".".join(version("triton").split(".")[:2])
    if installed not in VERSIONS:
        raise RuntimeError(f"the checker of kernels was written for Triton {', '.join(VERSIONS)}, not {installed}")
    builder, executor = type(interpreter.interpreter_builder), interpreter.GridExecutor
    launched: list[str] = []
    current = Launch("?", [])

    def tensors(value: Any) -> Iterator[Any]:
        if isinstance(value, TensorDescriptor):
            yield from tensors(value.base)
        elif isinstance(value, tuple | list):
            for item in value:
                yield from tensors(item)
        elif hasattr(value, "data_ptr") and hasattr(value, "stride"):
            yield interpreter._unwrap_tensor(value)

    def touch(self: Any, kind: str, pointers: Any, mask: Any, *, stores: bool | None) -> None:
        addresses = pointers.data.reshape(-1).astype(np.int64)
        if mask is not None:
            kept = np.broadcast_to(mask.data, pointers.data.shape).reshape(-1).astype(bool, copy=False)
            if not kept.all():
                addresses = addresses[kept]
        if not addresses.size:
            return
        place = current.check(kind, addresses, max(1, pointers.get_element_ty().primitive_bitwidth // 8))
        if stores is None:
            return
        x, y, z = self.grid_idx
        program = 1 + x + self.grid_dim[0] * (y + self.grid_dim[1] * z)
        if place >= 0:
            current.own(place, addresses, program, stores=stores)
        else:
            places = np.searchsorted(current.low, addresses, side="right") - 1
            for one in np.unique(places):
                current.own(int(one), addresses[places == one], program, stores=stores)

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        touch(self, "load", pointers, mask, stores=False)
        return originals["create_masked_load"](self, pointers, mask, *rest, **named)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        touch(self, "store", pointers, mask, stores=True)
        return originals["create_masked_store"](self, pointers, value, mask, *rest, **named)

    def exchange(self: Any, pointers: Any, *rest: Any, **named: Any) -> Any:
        touch(self, "atomic exchange", pointers, None, stores=None)
        return originals["create_atomic_cas"](self, pointers, *rest, **named)

    def update(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        touch(self, "atomic update", pointers, mask, stores=None)
        return originals["create_atomic_rmw"](self, operation, pointers, value, mask, *rest, **named)

    def compute(self: Any, left: Any, right: Any, operation: Any) -> Any:
        if operation in ARITHMETIC and left.data.dtype == right.data.dtype == np.int32:
            exact = operation(left.data, right.data, dtype=np.int64)
            if exact.size and (exact.max() > INT32.max or exact.min() < INT32.min):
                reached = exact.reshape(-1)[np.abs(exact).argmax()]
                current.fail(f"{operation.__name__} of 32-bit integers reaches {reached:,}")
        return originals["binary_op"](self, left, right, operation)

    def begin(self: Any, arguments: Any, named: Any) -> Any:
        nonlocal current
        on_host, named_on_host = begin_launch(self, arguments, named)
        values = [*zip(self.arg_names, on_host, strict=False), *named_on_host.items()]
        kernel = getattr(self.fn, "__name__", "?")
        current = Launch(kernel, [(name, tensor) for name, value in values for tensor in tensors(value)])
        launched.append(kernel)
        return on_host, named_on_host

    replacements: dict[str, Callable[..., Any]] = {
        "create_masked_load": load,
        "create_masked_store": store,
        "create_atomic_cas": exchange,
        "create_atomic_rmw": update,
        "binary_op": compute,
    }
    originals = {name: getattr(builder, name) for name in replacements}
    begin_launch = executor._init_args_hst
    for name, function in replacements.items():
        setattr(builder, name, function)
    executor._init_args_hst = begin
    try:
        yield launched
    finally:
        for name, function in originals.items():
            setattr(builder, name, function)
        executor._init_args_hst = begin_launch
