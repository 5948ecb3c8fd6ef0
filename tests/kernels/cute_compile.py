"""Compile CuTe kernels for an architecture through the adapter and the libraries' own calls, without a GPU.

    python tests/kernels/cute_compile.py 90 "cudnn forward sm_90 128 128x128"

PyTorch's tensors on the CPU are passed off as tensors of a card: to the libraries' checks, and to the compiler by the
device that DLPack names. Kernels are compiled and not launched. Prints a JSON line for every kernel of the table that
is named, or for all of the architecture: the functions that were compiled, and the bytes of their machine code.
"""

import contextlib
import ctypes
import json
import os
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

PROCESSORS, SHARED_BYTES, CACHE_BYTES = 132, 228 * 1024, 50 * 2**20
DLPACK_CUDA = 2


class OnCard:
    """A tensor whose DLPack capsule says that it is on a card, at an aligned address."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __dlpack_device__(self):
        return DLPACK_CUDA, 0

    def __dlpack__(self, **options):
        capsule = self.tensor.__dlpack__()
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        first = pointer(capsule, b"dltensor")  # void *data, then int32 device_type
        ctypes.c_uint64.from_address(first).value &= ~0xFFF
        ctypes.c_int32.from_address(first + 8).value = DLPACK_CUDA
        return capsule


class Compiler:
    """`cute.compile`, whose functions do nothing when they are called."""

    def __init__(self, compile, compiled):
        self._compile, self._compiled = compile, compiled

    def __getattr__(self, name):
        return getattr(self._compile, name)

    def __getitem__(self, options):
        return Compiler(self._compile[options], self._compiled)

    def __call__(self, function, *arguments, **options):
        self._compile(function, *arguments, no_jit_engine=True, **options)
        self._compiled.append(type(function).__name__)
        return lambda *arguments, **options: None


def pretend(architecture):
    """Make the machine look like one with a card; returns the list to which compiled functions are added."""
    import torch

    capability = divmod(architecture, 10)
    torch.Tensor.is_cuda = property(lambda tensor: True)
    torch.cuda.get_device_capability = lambda *device: capability
    torch.cuda.device = lambda device: contextlib.nullcontext()
    torch.cuda.current_device = lambda: 0
    torch.cuda.current_stream = lambda *device: SimpleNamespace(cuda_stream=0)
    torch.cuda.get_device_properties = lambda *device: SimpleNamespace(
        multi_processor_count=PROCESSORS, L2_cache_size=CACHE_BYTES
    )
    torch.cuda.nvtx.range = lambda name: contextlib.nullcontext()

    from cutlass import cute, utils
    from cutlass.base_dsl.runtime import cuda
    from cutlass.cute import runtime

    initialize = runtime._Tensor.__init__

    def on_card(self, tensor, *arguments, **options):
        initialize(self, OnCard(tensor), *arguments, **options)

    runtime._Tensor.__init__ = on_card
    cuda.get_device_attribute = lambda attribute, device=0: SHARED_BYTES
    utils.HardwareInfo = lambda *device: SimpleNamespace(
        get_max_active_clusters=lambda size, *stream: PROCESSORS // size,
        get_device_multiprocessor_count=lambda: PROCESSORS,
        get_l2_cache_size_in_bytes=lambda: CACHE_BYTES,
    )
    import cudnn.tensor_adapter

    cudnn.tensor_adapter.get_compute_capability = lambda device=None: capability
    compiled = []
    cute.compile = Compiler(cute.compile, compiled)
    return compiled


def arguments_for(kernel):
    """Arguments of the operator whose sequences fill no block, with a mask that the heads share."""
    import torch
    from blade_kernels.block_mask import BlockMask
    from blade_kernels.block_sparse.operators import Arguments

    query_block, key_block = kernel.block_size
    queries, keys = 4 * query_block - 7, 5 * key_block - 3
    dtype = kernel.row.dtypes[0]
    q, k, v = (torch.zeros(2, tokens, 3, kernel.head_size, dtype=dtype) for tokens in (queries, keys, keys))
    mask = BlockMask.from_dense(torch.ones(2, 1, 4, 5, dtype=torch.bool), kernel.block_size)
    return Arguments.of(q, k, v, mask, None, None, 0.1)


def main(architecture, names, folder):
    """Compile the kernels of an architecture, all of them or those that are named, with files in a folder."""
    os.environ |= {
        "CUTE_DSL_ARCH": f"sm_{architecture}a",
        "CUTE_DSL_KEEP": "cubin",
        "CUTE_DSL_DUMP_DIR": str(folder),
        "CUTE_DSL_NO_CACHE": "1",
        "FLASH_ATTENTION_NUM_SMS": str(PROCESSORS),
    }
    compiled = pretend(architecture)
    from blade_kernels.block_sparse import cute, cute_table

    cute.architecture = lambda device_type: architecture
    for kernel in cute_table.kernels_of(architecture):
        if names and str(kernel) not in names:
            continue
        compiled.clear()
        with cute.only_library(kernel.row.library):
            run(kernel)
        code = list(folder.rglob("*.cubin"))
        sizes = {path.name.partition(".")[0][-60:]: path.stat().st_size for path in code}
        print(json.dumps({"kernel": str(kernel), "compiled": list(compiled), "cubins": sizes}), flush=True)
        for path in code:  # kernels of other head sizes have the same names
            path.unlink()


def run(kernel):
    """Call a kernel through the adapter, and check the shapes of what it returns."""
    import torch
    from blade_kernels.block_sparse import cute

    arguments = arguments_for(kernel)
    if kernel.row.direction == "forward":
        out, lse = cute.forward(arguments)
        assert out.shape == arguments.q.shape and lse.shape == out.shape[:3]
        return
    out, sums = torch.zeros_like(arguments.q), torch.zeros(arguments.q.shape[:3])
    gradients = cute.backward(arguments, out, sums, torch.zeros_like(out), None)
    inputs = (arguments.q, arguments.k, arguments.v, arguments.pooled_k, arguments.pooled_v)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        main(int(sys.argv[1]), sys.argv[2:], Path(made))
